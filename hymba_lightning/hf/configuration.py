"""The network's config as `transformers` wants it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from hymba_lightning.interop.pretrained import MODEL_TYPE
from hymba_lightning.model import HymbaConfig, RuntimeConfig

# Names that other libraries look for → the network's fields.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
}


class HymbaPretrainedConfig(PretrainedConfig):
    """Our HymbaConfig (as a dictionary under `net`) and the names under which other libraries look for its sizes.

    Args:
        net: Fields of HymbaConfig, which has their meaning; the rest have its defaults.
        runtime: Fields of RuntimeConfig: how the network is executed. Not saved.
        kwargs: Those of every PretrainedConfig.

    Raises:
        ValueError: a field is unknown or out of range, or one of those names says another size than `net`.
    """

    model_type = MODEL_TYPE
    # A list: Trainer adds others to it.
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - transformers reads the class's

    def __init__(self, net: dict[str, Any] | None = None, runtime: dict[str, Any] | None = None, **kwargs: Any) -> None:
        config = HymbaConfig.from_dict(net or {})
        self.net = config.to_dict()
        self.runtime = dict(runtime or {})
        self._made_runtime("float32")
        for name, field in SIZES.items():
            setattr(self, name, getattr(config, field))
            _check_size(name, kwargs.pop(name, None), config)
        # What training scripts set for every model; the cache is made where it is asked for.
        self.use_cache = kwargs.pop("use_cache", True)
        # Concerns weights that layers share; whether head and embedding are one is the network's affair.
        kwargs["tie_word_embeddings"] = True
        kwargs.setdefault("bos_token_id", config.bos_id)
        kwargs.setdefault("eos_token_id", kwargs["bos_token_id"])
        kwargs.setdefault("pad_token_id", kwargs["bos_token_id"])
        super().__init__(**kwargs)

    def network_config(self) -> HymbaConfig:
        """The network's own config. Raises ValueError where one of the other names was set to another size."""
        config = HymbaConfig.from_dict(self.net)
        for name in SIZES:
            _check_size(name, getattr(self, name, None), config)
        return config

    def runtime_config(self) -> RuntimeConfig:
        """How it is executed: bfloat16 where that was asked for as `dtype`, weights float32 either way."""
        dtype = str(getattr(self, "dtype", None)).removeprefix("torch.")
        return self._made_runtime("bfloat16" if dtype in ("bfloat16", "float16") else "float32")

    def _made_runtime(self, compute_dtype: str) -> RuntimeConfig:
        known = [field.name for field in dataclasses.fields(RuntimeConfig)]
        unknown = sorted(map(str, self.runtime.keys() - known))
        if unknown:
            raise ValueError(f"runtime has no {', '.join(unknown)}: choose from {', '.join(known)}")
        return RuntimeConfig(**({"compute_dtype": compute_dtype} | self.runtime))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the runtime."""
        values = super().to_dict()
        values.pop("runtime", None)
        return values


def _check_size(name: str, given: Any, config: HymbaConfig) -> None:
    own = getattr(config, SIZES[name])
    if given not in (None, own):
        raise ValueError(f"{name}={given!r} is not the network's, whose {SIZES[name]} is {own}: give net={{…}} instead")
