"""The network's config as `transformers` wants it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from hymba_lightning.interop.pretrained import MODEL_TYPE
from hymba_lightning.model import HymbaConfig, RuntimeConfig


class HymbaPretrainedConfig(PretrainedConfig):
    """Our HymbaConfig (as a dictionary under `net`) and the names under which other libraries look for its sizes.

    Args:
        net: Fields of HymbaConfig, which has their meaning; the rest have its defaults.
        runtime: Fields of RuntimeConfig: how the network is executed. Not saved.
        kwargs: Those of every PretrainedConfig.

    Raises:
        ValueError: a field is unknown or out of range.
    """

    model_type = MODEL_TYPE
    # A list: Trainer adds others to it.
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - transformers reads the class's

    def __init__(self, net: dict[str, Any] | None = None, runtime: dict[str, Any] | None = None, **kwargs: Any) -> None:
        config = HymbaConfig.from_dict(net or {})
        self.net = config.to_dict()
        self.runtime = dict(runtime or {})
        self.vocab_size = config.vocab_size
        self.hidden_size = config.d_model
        self.num_hidden_layers = config.n_layers
        self.num_attention_heads = config.n_heads
        self.num_key_value_heads = config.n_kv_heads
        # What training scripts set for every model; the cache is made where it is asked for.
        self.use_cache = kwargs.pop("use_cache", True)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            kwargs.pop(name, None)
        # Concerns weights that layers share; whether head and embedding are one is the network's affair.
        kwargs["tie_word_embeddings"] = True
        kwargs.setdefault("bos_token_id", config.bos_id)
        kwargs.setdefault("eos_token_id", kwargs["bos_token_id"])
        kwargs.setdefault("pad_token_id", kwargs["bos_token_id"])
        super().__init__(**kwargs)

    def network_config(self) -> HymbaConfig:
        """The network's own config."""
        return HymbaConfig.from_dict(self.net)

    def runtime_config(self) -> RuntimeConfig:
        """How it is executed: bfloat16 where that was asked for as `dtype`, weights float32 either way."""
        dtype = str(getattr(self, "dtype", None)).removeprefix("torch.")
        compute = {"compute_dtype": "bfloat16"} if dtype in ("bfloat16", "float16") else {}
        return RuntimeConfig(**(compute | self.runtime))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the runtime."""
        values = super().to_dict()
        values.pop("runtime", None)
        return values
