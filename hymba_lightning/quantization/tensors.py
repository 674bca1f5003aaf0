"""Tensors in the form that is stored, and back: torch on one side, format.py's flat arrays on the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.quantization.format import STREAM_DTYPES, ArtifactError, Encoded, Entry
from hymba_lightning.quantization.rows import (
    QuantizedTensor,
    as_rows,
    check_finite,
    dequantize_rows,
    q_max_of,
)

# Rounding to float16 costs 2^-12 of a tensor's RMS unless entries overflow or most of them are subnormal.
FLOAT16_TOLERANCE = 2.0**-10


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises ValueError naming a tensor that is not floating point, is empty, or has inf or NaN."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        raise ValueError(
            f"{name}: only non-empty floating-point tensors can be exported, got {tensor.dtype} "
            f"of shape {list(tensor.shape)}"
        )
    check_finite(name, tensor)


def encode_tensor(name: str, tensor: Tensor, storage: str, quantized: QuantizedTensor | None) -> Encoded:
    """`tensor` as `storage` ('float16' or 'float32') says, or as `quantized` where it is rounded to integers.

    Raises ValueError where `quantized` has another shape. float16 gives way to float32 where it would lose much.
    """
    shape = list(tensor.shape) or [1]
    if quantized is not None:
        rows_RC = as_rows(tensor)
        if quantized.q.shape != rows_RC.shape:
            raise ValueError(f"{name}: quantized to {list(quantized.q.shape)}, but its rows are {list(rows_RC.shape)}")
        entry = Entry(name, shape, "int", quantized.bits, quantized.exponent)
        recentred = (quantized.q.cpu().to(torch.int16) + q_max_of(quantized.bits)).to(torch.uint8)
        columns = None if quantized.columns is None else (quantized.columns.cpu().to(torch.int16) + 128).to(torch.uint8)
        return Encoded(
            entry,
            recentred.flatten().numpy(),
            quantized.scale.cpu().numpy(),
            None if columns is None else columns.numpy(),
        )
    values = tensor.detach().float().cpu().flatten()
    if storage == "float16" and not fits_float16(values):
        storage = "float32"
    return Encoded(Entry(name, shape, storage), values.numpy().astype(STREAM_DTYPES[storage]), None)


def fits_float16(values: Tensor) -> bool:
    """Whether float16 keeps these float32 values to its usual precision: no overflow, few subnormals."""
    error = (values.half().float() - values).double().square().sum()
    return bool(error <= FLOAT16_TOLERANCE**2 * values.double().square().sum())


def decode_tensor(entry: Entry, streams: dict[str, np.ndarray]) -> Tensor:
    """The tensor as float32. Raises ArtifactError for a code outside its bits, inf or NaN."""
    if entry.storage == "int":
        q_max = q_max_of(entry.bits)
        codes = torch.from_numpy(streams["q"][entry.offset : entry.offset + entry.numel])
        if int(codes.max()) > 2 * q_max:
            raise ArtifactError(f"{entry.name} has a code over {2 * q_max}, the largest of {entry.bits} bits")
        scale = torch.from_numpy(streams["scale"][entry.scale_offset : entry.scale_offset + entry.rows])
        # 0 … 2 q_max as bytes are at most 254: less q_max they wrap round to what int8 holds.
        q_RC = (codes - q_max).view(torch.int8).view(entry.rows, -1)
        columns = None
        if entry.column_offset >= 0:
            stored = torch.from_numpy(streams["column"][entry.column_offset : entry.column_offset + entry.columns])
            columns = (stored.to(torch.int16) - 128).to(torch.int8)
        tensor = dequantize_rows(QuantizedTensor(q_RC, scale, entry.exponent, entry.bits, columns))
        # Products that overflow do so where |q| is largest.
        finite = torch.isfinite(scale).all() and all(bool(torch.isfinite(end)) for end in tensor.aminmax())
    else:
        values = streams[entry.storage][entry.offset : entry.offset + entry.numel]
        tensor = torch.from_numpy(values.astype(np.float32))
        finite = torch.isfinite(tensor).all()
    if not finite:
        raise ArtifactError(f"{entry.name} has inf or NaN")
    return tensor.view(entry.shape)
