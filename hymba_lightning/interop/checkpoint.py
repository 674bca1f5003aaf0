"""Reads the reference run's files: final_model.pt, a state dict, and final_model.int8.ptz, a compressed dictionary.

Both are pickles underneath. They are read with torch's weights_only reader, which builds tensors and plain containers
and executes nothing else; what is unpacked is bounded.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zstandard
from torch import Tensor

from hymba_lightning.checkpoints import READ_ERRORS, check_archive
from hymba_lightning.quantization.rows import QuantizedTensor

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Quantized weights shrink by a third; only a bomb unpacks to more than this.
MAX_UNPACKED_FLOOR, MAX_RATIO = 64 << 20, 16
CHUNK = 1 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NEEDED = ("__quant_format__", "quantized", "scales", "dtypes", "passthrough")
OPTIONAL = ("qmeta", "passthrough_orig_dtypes")


class ReferenceFileError(ValueError):
    """The file is none of the reference's, or is damaged."""


class ReferenceWeights(NamedTuple):
    """What a reference file holds, under the reference's names."""

    state_dict: dict[str, Tensor]  # float32
    quantized: dict[str, QuantizedTensor]  # matrices that the file has as integers with one float16 scale per row


def read_reference_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The float32 state dict, with the reference's names, in either of the reference's files.

    Raises FileNotFoundError, or ReferenceFileError naming the file and what is wrong with it.
    """
    return read_reference_file(path).state_dict


def read_reference_file(path: str | Path) -> ReferenceWeights:
    """As `read_reference_checkpoint`, with the integers of a quantized file kept."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = path.read_bytes()
    try:
        unpacked = unpack(content)
        values = load_plain(content if unpacked is None else unpacked)
        if "quantized" in values:
            return dequantize(values)
        return ReferenceWeights({name: as_weight(name, tensor) for name, tensor in values.items()}, {})
    except ReferenceFileError as error:
        raise ReferenceFileError(f"{path} cannot be read: {error}") from error


def unpack(content: bytes) -> bytes | None:
    """The content of a zstd or zlib stream, bounded; None where `content` is neither."""
    most = MAX_UNPACKED_FLOOR + MAX_RATIO * len(content)
    try:
        if content.startswith(ZSTD_MAGIC):
            reader = zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(content)
            return read_bounded(reader.read, most)
        if content[:1] == b"\x78":
            stream = zlib.decompressobj()
            pending = [content]

            def read(size: int) -> bytes:
                piece = stream.decompress(pending[0], size)
                pending[0] = stream.unconsumed_tail
                return piece

            unpacked = read_bounded(read, most)
            if not stream.eof:
                raise ReferenceFileError("its zlib stream is truncated")
            return unpacked
    except (zstandard.ZstdError, zlib.error) as error:
        raise ReferenceFileError(f"its compressed stream is damaged ({error})") from error
    return None


def read_bounded(read: Any, most: int) -> bytes:
    """All that `read(size)` gives, refused past `most` bytes."""
    pieces, total = [], 0
    while piece := read(CHUNK):
        total += len(piece)
        if total > most:
            raise ReferenceFileError(f"it unpacks to more than {most} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def load_plain(content: bytes) -> dict[str, Any]:
    """The dictionary that torch saved as `content`; nothing but tensors and plain containers is built."""
    try:
        check_archive(io.BytesIO(content))
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        reason = str(error).split("\n")[0]
        raise ReferenceFileError(f"it is no file of torch.save with weights alone ({reason})") from error
    if not isinstance(values, dict) or not values or not all(isinstance(name, str) for name in values):
        raise ReferenceFileError("it holds no dictionary of named tensors")
    return values


def as_weight(name: str, tensor: Any) -> Tensor:
    """A finite, dense floating-point tensor as float32."""
    if not is_dense(tensor) or not tensor.is_floating_point():
        raise ReferenceFileError(f"{name} is no dense floating-point tensor")
    tensor = tensor.detach().float()
    if not torch.isfinite(tensor).all():
        raise ReferenceFileError(f"{name} has inf or NaN")
    return tensor.contiguous()


def is_dense(tensor: Any) -> bool:
    """Whether `tensor` has memory for every one of its entries: no meta, sparse, nested or repeated ones."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def dequantize(values: dict[str, Any]) -> ReferenceWeights:
    """The weights in the reference's dictionary of quantized and kept tensors."""
    missing = [key for key in NEEDED if key not in values]
    unknown = sorted(set(values) - {*NEEDED, *OPTIONAL})
    if missing or unknown:
        raise ReferenceFileError(f"its dictionary has missing parts {missing} and unknown ones {unknown}")
    parts = [values.get(key, {}) for key in (*NEEDED[1:], *OPTIONAL)]
    if not all(isinstance(part, dict) and all(isinstance(name, str) for name in part) for part in parts):
        raise ReferenceFileError("a part of its dictionary is no dictionary of names")
    integers, scales, dtypes, passthrough, _, kept_dtypes = parts
    state_dict, quantized = {}, {}
    for name, q in integers.items():
        if not is_dense(q) or q.dtype != torch.int8 or q.ndim == 0:
            raise ReferenceFileError(f"{name} is no int8 tensor")
        scale, dtype = as_weight(f"the scale of {name}", scales.get(name)), dtype_of(name, dtypes.get(name))
        if scale.ndim and scale.shape != q.shape[:1]:
            raise ReferenceFileError(f"{name} has {list(scale.shape)} scales for a shape of {list(q.shape)}")
        factor = scale.view(-1, *[1] * (q.ndim - 1)) if scale.ndim else scale
        state_dict[name] = as_weight(name, (q.float() * factor).to(dtype))
        if q.ndim == 2 and scales[name].dtype == torch.float16 and scale.ndim and dtype == torch.float32:
            largest = int(q.int().abs().max())
            if largest <= 127:
                bits = 6 if largest <= 31 else 8
                quantized[name] = QuantizedTensor(q, scales[name], 0, bits)
    for name, tensor in passthrough.items():
        if name in state_dict:
            raise ReferenceFileError(f"{name} is there twice")
        kept = as_weight(name, tensor)
        state_dict[name] = kept.to(dtype_of(name, kept_dtypes[name])).float() if name in kept_dtypes else kept
    return ReferenceWeights(state_dict, quantized)


def dtype_of(name: str, word: Any) -> torch.dtype:
    """The torch dtype of the reference's word for it."""
    if not isinstance(word, str) or word not in DTYPES:
        raise ReferenceFileError(f"{name} has the unknown dtype {word!r}; known are {', '.join(DTYPES)}")
    return DTYPES[word]
