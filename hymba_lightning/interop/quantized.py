"""Writes the reference's final_model.int8.ptz: its quantizer, its dictionary, its torch.save and zstd."""

from __future__ import annotations

import io

import torch
import zstandard
from torch import Tensor

from hymba_lightning.quantization.schemes.reference import quantize_reference

KEEP_FLOAT_NUMEL = 65_536
# By these parts of its names the reference knows what it keeps float32.
CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smeargate", "merge_alpha")


def quantized_reference_file(state_dict: dict[str, Tensor], bits: int = 6, level: int = 22) -> bytes:
    """The bytes of the reference's quantized file of these weights, which `read_reference_file` reads.

    state_dict: the reference's names (`to_reference` gives them). As the reference does, matrices of more than 65,536
    entries become integers, the token table and the rest float16, control vectors float32; a projection that layers
    share is stored once for each. Raises ValueError naming a large tensor that is no matrix or has inf or NaN.
    """
    parts: dict[str, dict] = {
        name: {} for name in ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    }
    for name, tensor in state_dict.items():
        values = tensor.detach().float().cpu()
        if any(control in name for control in CONTROL_NAMES):
            parts["passthrough"][name] = values.contiguous()
        elif "tok_emb" in name or values.numel() <= KEEP_FLOAT_NUMEL:
            parts["passthrough"][name] = values.half().contiguous()
            parts["passthrough_orig_dtypes"][name] = "float32"
        else:
            if values.ndim != 2:
                raise ValueError(
                    f"{name} is no matrix ({list(values.shape)}), which the reference's file has no integers for"
                )
            rounded = quantize_reference(values, bits, name=name)
            parts["quantized"][name], parts["scales"][name] = rounded.q.contiguous(), rounded.scale
            parts["dtypes"][name], parts["qmeta"][name] = "float32", {"scheme": "per_row", "axis": 0}
    buffer = io.BytesIO()
    torch.save({"__quant_format__": "int8_clean_per_row_v1", **parts}, buffer)
    return zstandard.ZstdCompressor(level=level).compress(buffer.getvalue())
