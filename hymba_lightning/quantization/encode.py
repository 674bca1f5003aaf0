"""State dict → tensors in the form that is stored: which is rounded how, and how coarse the limit wants it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping

from torch import Tensor

from hymba_lightning.model.roles import Role
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.gptq import quantize_with_hessians
from hymba_lightning.quantization.int6 import (
    MAX_COARSEN,
    QuantizedTensor,
    coarsen_rows,
    quantize_reference,
    quantize_rows,
)
from hymba_lightning.quantization.layout import Encoded
from hymba_lightning.quantization.limit import Measure, fit_to_limit
from hymba_lightning.quantization.mixed import encode_mixed
from hymba_lightning.quantization.payload import check_tensor, encode_tensor

log = logging.getLogger("hymba_lightning")


def encode_state_dict(
    state_dict: dict[str, Tensor],
    scheme: QuantizationConfig,
    quantized: dict[str, QuantizedTensor],
    hessians: dict[str, Tensor] | None,
    sensitivities: dict[str, Tensor] | None,
    measure: Measure,
    roles: Mapping[str, Role],
    code_bytes: int,
) -> tuple[list[Encoded], QuantizationConfig]:
    """Every tensor in the form that is stored, and `scheme` with the coarsening that its limit needed.

    `quantized` are tensors rounded elsewhere, kept as they are; `hessians` (for GPTQ) are those of `collect_hessians`,
    `sensitivities` (for 'mixed') of `collect_sensitivities`, without which all tensors count alike; `measure` gives
    the bytes of a file. `roles` are the tensors' and `code_bytes` what the evaluation's code takes of the limit. Raises
    ValueError naming a tensor that cannot be stored, or for Hessians or sensitivities
    missing or unasked for.
    """
    unknown = sorted(set(quantized) - set(state_dict))
    if unknown:
        raise ValueError(f"quantized tensors that the network does not have: {', '.join(unknown)}")
    if scheme.calibrated != (hessians is not None):
        raise ValueError(
            f"the scheme {scheme.scheme!r} {'needs' if hessians is None else 'takes no'} Hessians: "
            f"collect_hessians makes them from training batches, for GPTQ only"
        )
    if sensitivities is not None and scheme.scheme != "mixed":
        raise ValueError(f"the scheme {scheme.scheme!r} takes no sensitivities: they are for 'mixed'")
    for name, tensor in state_dict.items():
        check_tensor(name, tensor)
    budget = scheme.limit_bytes - code_bytes
    if scheme.scheme == "mixed":
        named = {
            name: round_nearest(name, tensor, scheme, roles[name])
            for name, tensor in state_dict.items()
            if any(pattern in name for pattern in scheme.name_bits)
        }
        fixed = {
            name: encode_tensor(name, state_dict[name], "int", rounded) for name, rounded in (named | quantized).items()
        }
        return encode_mixed(state_dict, sensitivities, hessians or {}, fixed, measure, budget, roles), scheme
    storage = {name: scheme.storage_of(name, tensor.numel(), roles[name])[0] for name, tensor in state_dict.items()}
    base = {
        name: round_nearest(name, tensor, scheme, roles[name])
        for name, tensor in state_dict.items()
        if name not in quantized and storage[name] == "int"
    }

    def encode(rounded: dict[str, QuantizedTensor]) -> list[Encoded]:
        return [
            encode_tensor(name, tensor, storage[name], quantized.get(name, rounded.get(name)))
            for name, tensor in state_dict.items()
        ]

    def nearest(factor: float) -> list[Encoded]:
        return encode(
            base
            if factor == 1
            else {name: coarsen_rows(state_dict[name], tensor, factor) for name, tensor in base.items()}
        )

    def by_gptq(factor: float) -> list[Encoded]:
        coarse = dataclasses.replace(scheme, coarsen=scheme.coarsen * factor)
        wanted = {name: state_dict[name] for name in base}
        return encode(
            {name: coarsen_rows(state_dict[name], tensor, factor) for name, tensor in base.items()}
            | quantize_with_hessians(wanted, hessians or {}, coarse, roles)
        )

    final = nearest if hessians is None else by_gptq
    if not scheme.fit_limit or scheme.scheme == "reference":
        return final(1.0), scheme
    # Rounding to nearest is cheap and packs about as small: it finds the factor, GPTQ confirms it.
    factor, encoded = fit_to_limit(nearest, measure, budget, most_coarse(scheme))
    if hessians is not None:
        factor, encoded = fit_to_limit(by_gptq, measure, budget, most_coarse(scheme), start=factor)
    if factor > 1:
        log.warning(
            "at %d bits the artifact exceeds its limit: all row scales are %.3f times as coarse (about %.2f "
            "bits a weight less)",
            scheme.bits,
            factor,
            math.log2(factor),
        )
    return encoded, dataclasses.replace(scheme, coarsen=scheme.coarsen * factor)


def round_nearest(name: str, tensor: Tensor, scheme: QuantizationConfig, role: Role) -> QuantizedTensor:
    """`tensor` as integers by the scheme, each entry on its own."""
    bits = scheme.storage_of(name, tensor.numel(), role)[1]
    if scheme.scheme == "reference":
        return quantize_reference(tensor, bits, name=name)
    rounded = quantize_rows(tensor, bits, clip_quantile=scheme.clip_quantile, clip_steps=scheme.clip_steps, name=name)
    return coarsen_rows(tensor, rounded, scheme.coarsen) if scheme.coarsen > 1 else rounded


def most_coarse(scheme: QuantizationConfig) -> float:
    """The factor at which three or four levels are left in use."""
    return min(2.0 ** (scheme.bits - 2), MAX_COARSEN / scheme.coarsen)
