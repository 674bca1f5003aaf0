"""Text from a trained network: constant memory and time per token, whatever the length of the context."""

from hymba_lightning.generation.loading import find_tokenizer, load_network
from hymba_lightning.generation.sampler import SamplingConfig, distribution, generate
from hymba_lightning.generation.text import TextStream

__all__ = ["SamplingConfig", "TextStream", "distribution", "find_tokenizer", "generate", "load_network"]
