"""A state dict → an artifact on disk. Apart from artifact.py, since the evaluation's code counts against the limit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from hymba_lightning.files import write_atomic
from hymba_lightning.model.config import HymbaConfig
from hymba_lightning.model.hymba import outline
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.quantization import container
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.encode import encode_state_dict
from hymba_lightning.quantization.int6 import QuantizedTensor
from hymba_lightning.quantization.layout import Encoded, boundaries, lay_out
from hymba_lightning.quantization.limit import evaluation_code_bytes
from hymba_lightning.quantization.parts import Parts
from hymba_lightning.quantization.report import ArtifactReport, build_report

# The header's numbers change by some digits when the payload does.
HEADER_SLACK = 64


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
) -> ArtifactReport:
    """Quantizes, compresses and writes `state_dict`; atomic, and the same bytes for the same arguments.

    `config`, `tokenizer` and `metadata` are plain JSON values. `hessians` (of `collect_hessians`) are what GPTQ needs,
    `sensitivities` (of `collect_sensitivities`) what the scheme 'mixed' goes by; `quantized` has tensors that are
    rounded already; `roles` are those of the config's network unless given. Raises ValueError naming the tensor or
    field that cannot be stored or is none of the network's, OSError where the file cannot be written (an earlier file
    at `path` is then untouched). An artifact that cannot be brought under its limit is written all the same: refusing
    it is `check_limit`'s part.
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
        container.check_weights_size(sum(entry.numel for entry in table), len(payload))
        return container.pack(header, payload), Parts(header, counts, table, content, len(payload))

    def measure(encoded: list[Encoded], exact: bool = False) -> int:
        """Most bytes that the file can have; a little fewer where the time is taken to compress it in earnest."""
        compress = partial(container.compress, level=scheme.zstd_level) if exact else container.draft
        return len(lay_out_file(encoded, scheme, compress)[0]) + HEADER_SLACK

    if roles is None:
        roles = roles_of(outline(HymbaConfig.from_dict(config)))
    strange = [name for name in state_dict if name not in roles]
    if strange:
        raise ValueError(f"the config's network has no tensor {', '.join(strange[:3])}")
    code_bytes = evaluation_code_bytes(config.get("mixer", "mamba"))
    encoded, final = encode_state_dict(
        state_dict, scheme, quantized or {}, hessians, sensitivities, measure, roles, code_bytes
    )
    packed, parts = lay_out_file(encoded, final, partial(container.compress, level=final.zstd_level))
    write_atomic(Path(path), packed)
    return build_report(len(packed), parts)
