"""A state dict → an artifact on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from hymba_lightning.files import write_atomic
from hymba_lightning.model.config import HymbaConfig
from hymba_lightning.model.hymba import Hymba, outline
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.quantization import format, frames
from hymba_lightning.quantization.artifact import Parts
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.format import Encoded, boundaries, lay_out
from hymba_lightning.quantization.listing import ArtifactReport, build_report
from hymba_lightning.quantization.rows import QuantizedTensor
from hymba_lightning.quantization.schemes import Weights, encode_weights

# The header's numbers change by some digits when the payload does.
HEADER_SLACK = 64


class ArtifactTooLargeError(ValueError):
    """Artifact and evaluation code together exceed the limit."""


def save_artifact(
    path: str | os.PathLike,
    state_dict: dict[str, Tensor],
    *,
    config: dict,
    tokenizer: dict,
    metadata: dict,
    scheme: QuantizationConfig,
    quantized: dict[str, QuantizedTensor] | None = None,
    hessians: dict[str, Tensor] | None = None,
    sensitivities: dict[str, Tensor] | None = None,
    roles: Mapping[str, Role] | None = None,
    code_bytes: int = 0,
) -> ArtifactReport:
    """Quantizes, compresses and writes `state_dict`; atomic, and the same bytes for the same arguments.

    `config`, `tokenizer` and `metadata` are plain JSON values. Of `calibrate` are `hessians`, which GPTQ needs, and
    `sensitivities`, which the scheme 'mixed' goes by; `quantized` has tensors that are rounded already; `roles` are
    those of the config's network unless given; `code_bytes` of the scheme's limit are left to the evaluation's code.
    Raises ValueError naming the tensor or field that cannot be stored, is none of the network's or, unless `roles` are
    given, is missing or of another shape; OSError where the file cannot be written (an earlier file at `path` is then
    untouched). An artifact that cannot be brought under its limit is written all the same: refusing it is
    `check_limit`'s part.
    """
    if not state_dict:
        raise ValueError("there are no tensors to export")

    def lay_out_file(
        encoded: list[Encoded], scheme: QuantizationConfig, compress: Callable[..., bytes]
    ) -> tuple[bytes, Parts]:
        content, counts, table = lay_out(encoded)
        header = {
            "config": config,
            "tokenizer": tokenizer,
            "metadata": metadata,
            "quantization": dataclasses.asdict(scheme),
            "streams": counts,
            "tensors": [entry.to_dict() for entry in table],
        }
        payload = compress(content, cuts=boundaries(counts, table))
        format.check_weights_size(sum(entry.numel for entry in table), len(payload))
        return format.pack(header, payload), Parts(header, counts, table, content, len(payload))

    # What is written is mostly among the last that were measured.
    compressed = lru_cache(maxsize=4)(frames.compress)

    def compress_in_earnest(content: bytes, cuts: Sequence[int], level: int) -> bytes:
        return compressed(content, level, tuple(cuts))

    def measure(encoded: list[Encoded], exact: bool = False) -> int:
        """Most bytes that the file can have; a little fewer where the time is taken to compress it in earnest."""
        compress = partial(compress_in_earnest, level=scheme.zstd_level) if exact else frames.draft
        return len(lay_out_file(encoded, scheme, compress)[0]) + HEADER_SLACK

    net = outline(HymbaConfig.from_dict(config)) if roles is None else None
    roles = roles_of(net) if roles is None and net is not None else roles or {}
    strange = [name for name in state_dict if name not in roles]
    if strange:
        raise ValueError(f"the config's network has no tensor {', '.join(strange[:3])}")
    if net is not None:
        _check_all_there(state_dict, net)
    budget = scheme.limit_bytes - code_bytes
    weights = Weights(state_dict, quantized or {}, hessians, sensitivities, measure, budget, roles)
    encoded, final = encode_weights(weights, scheme)
    packed, parts = lay_out_file(encoded, final, partial(compress_in_earnest, level=final.zstd_level))
    write_atomic(Path(path), packed)
    return build_report(len(packed), parts)


def _check_all_there(state_dict: dict[str, Tensor], net: Hymba) -> None:
    """Raises ValueError for a tensor of the network's that is missing or has another shape: nobody could load it."""
    for name, parameter in net.named_parameters():
        if name not in state_dict:
            raise ValueError(f"the config's network has a tensor {name}, and the weights do not")
        shape = tuple(state_dict[name].shape)
        if shape != tuple(parameter.shape):
            raise ValueError(f"{name} is {shape}, and in the config's network {tuple(parameter.shape)}")


def check_limit(artifact_bytes: int, code_bytes: int, limit: int, report: ArtifactReport | None = None) -> None:
    """Raises ArtifactTooLargeError with the largest tensors and what to do where the sum exceeds `limit` bytes."""
    total = artifact_bytes + code_bytes
    if total <= limit:
        return
    largest = f"\n{report.table()}" if report else ""
    raise ArtifactTooLargeError(
        f"the artifact ({artifact_bytes:,} bytes) and the code for its evaluation ({code_bytes:,}) have {total:,} "
        f"bytes together, {total - limit:,} over the limit of {limit:,}. Lower bits, give the large tensors fewer bits "
        f"(name_bits, e.g. {{tok_emb: 8}}), train with more weight decay, or make the network smaller.{largest}"
    )
