"""Loads an artifact, a checkpoint or a saved folder as a `transformers` model with its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from hymba_lightning.data.tokenizer import load_tokenizer
from hymba_lightning.generation.loading import find_tokenizer, load_network, local_path
from hymba_lightning.hf.configuration import HymbaPretrainedConfig
from hymba_lightning.hf.modeling import HymbaForCausalLM
from hymba_lightning.hf.tokenization import tokenizer_of
from hymba_lightning.interop.official import is_official, own_content
from hymba_lightning.interop.pretrained import CONFIG, folder_config, generation_settings, read_json
from hymba_lightning.model import RuntimeConfig


def load(
    weights: str | Path,
    tokenizer: str | Path | None = None,
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008 - frozen
    device: str = "cpu",
) -> tuple[HymbaForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of an artifact, a checkpoint of `hymba fit`, a folder or repository of `save_pretrained`, or
    one of the released Hymba models, e.g. hf:nvidia/Hymba-1.5B-Base.

    Args:
        weights: The file, folder or hf:owner/name.
        tokenizer: SentencePiece model; by default the one that lies beside, or that the run's config.yaml names. A
            released model's own files are read by transformers.
        runtime: How the network is executed.
        device: Where the model is put.

    Raises:
        FileNotFoundError: weights or tokenizer are not found.
        ValueError: a file is damaged, or the tokenizer is not that of the weights.
    """
    net, fingerprint = load_network(weights, runtime, device)
    folder = local_path(weights)
    made: PreTrainedTokenizerBase
    if tokenizer is None and is_official(folder):
        made = AutoTokenizer.from_pretrained(folder)
        values = own_content(net.config, read_json(folder / CONFIG))
    else:
        model_file = find_tokenizer(weights, None if tokenizer is None else str(tokenizer), fingerprint)
        made = tokenizer_of(model_file)
        values = folder_config(net.config, load_tokenizer(model_file), fingerprint)
    config = HymbaPretrainedConfig.from_dict(values | {"runtime": dataclasses.asdict(runtime)})
    model = HymbaForCausalLM(config)
    model.net.load_state_dict(net.state_dict())
    model.generation_config = GenerationConfig(**generation_settings(values))
    model.net.to(device)
    return model.eval(), made
