"""Hymba for `transformers`: importing this registers the classes with its Auto classes.

    import hymba_lightning.hf
    from transformers import pipeline
    print(pipeline("text-generation", "runs/mine/hf")("Once upon a time")[0]["generated_text"])

Raises ImportError with the command that installs transformers where it is missing.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError("hymba_lightning.hf needs transformers: pip install 'hymba-lightning[hf]'") from error

from transformers.models.auto import tokenization_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hymba_lightning.hf.backbone import HymbaModel
from hymba_lightning.hf.cache import HymbaCache
from hymba_lightning.hf.configuration import HymbaPretrainedConfig
from hymba_lightning.hf.loading import load
from hymba_lightning.hf.modeling import HymbaForCausalLM, without_head
from hymba_lightning.hf.tokenization import HymbaTokenizer, tokenizer_of

__all__ = [
    "HymbaCache",
    "HymbaForCausalLM",
    "HymbaModel",
    "HymbaPretrainedConfig",
    "HymbaTokenizer",
    "load",
    "tokenizer_of",
]

transformers.AutoConfig.register(HymbaPretrainedConfig.model_type, HymbaPretrainedConfig, exist_ok=True)
transformers.AutoModel.register(HymbaPretrainedConfig, HymbaModel, exist_ok=True)
for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForPreTraining):
    auto.register(HymbaPretrainedConfig, HymbaForCausalLM, exist_ok=True)
for auto in (
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForQuestionAnswering,
    transformers.AutoModelForMultipleChoice,
    transformers.AutoModelForNextSentencePrediction,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForSeq2SeqLM,
):
    auto.register(HymbaPretrainedConfig, without_head(auto.__name__), exist_ok=True)
# By these names Trainer knows whose labels it has to shift, where it computes the loss itself (label smoothing).
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HymbaPretrainedConfig.model_type] = HymbaForCausalLM.__name__
transformers.AutoTokenizer.register(HymbaPretrainedConfig, HymbaTokenizer, exist_ok=True)
# So that AutoTokenizer asks ours, which knows what has to lie beside a network, whatever class a folder's file names.
tokenization_auto.TOKENIZER_MAPPING_NAMES[HymbaPretrainedConfig.model_type] = HymbaTokenizer.__name__
# Not public: where it is gone, a folder's file decides.
asked: set[str] = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
asked.add(HymbaPretrainedConfig.model_type)
