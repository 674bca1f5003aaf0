"""The quantization schemes: how weights become integers and floats. Each file here is one, chosen by its name.

Its `SCHEME` is an object of a class made from `Scheme`. What most schemes differ in is `round`; the rest (which tensor
is kept as it is, the limit in bytes, GPTQ) is here.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hymba_lightning.model.hymba import Hymba
from hymba_lightning.model.roles import Role
from hymba_lightning.quantization.config import SCHEMES, QuantizationConfig
from hymba_lightning.quantization.format import Encoded
from hymba_lightning.quantization.gptq import collect_hessians, quantize_with_hessians
from hymba_lightning.quantization.precision import Measure
from hymba_lightning.quantization.rows import MAX_COARSEN, QuantizedTensor, coarsen_rows
from hymba_lightning.quantization.sensitivity import collect_fisher, random_batches
from hymba_lightning.quantization.tensors import check_tensor, encode_tensor

log = logging.getLogger("hymba_lightning")

MAX_ATTEMPTS = 6
AIM, CLOSE = 0.998, 0.995  # of the budget: where to go, and what is near enough


@dataclass(frozen=True)
class Weights:
    """The tensors to be stored, and what a scheme may know about them."""

    tensors: dict[str, Tensor]
    quantized: dict[str, QuantizedTensor]
    """Those rounded elsewhere, kept as they are."""
    hessians: dict[str, Tensor] | None
    """Of `calibrate`, for GPTQ."""
    sensitivities: dict[str, Tensor] | None
    """Of `calibrate`, likewise."""
    measure: Measure
    budget: int
    """Most bytes of the file."""
    roles: Mapping[str, Role]
    """What each of the tensors is to the network."""


class Calibration(NamedTuple):
    """What runs of the network on training batches tell a scheme before it rounds: keyword arguments of
    `save_artifact`."""

    hessians: dict[str, Tensor] | None
    sensitivities: dict[str, Tensor] | None

    def tensors(self) -> list[Tensor]:
        """All tensors in it, each once, also where several names share one."""
        known = [*(self.hessians or {}).values(), *(self.sensitivities or {}).values()]
        return list({id(tensor): tensor for tensor in known}.values())

    def cpu(self) -> Calibration:
        """A copy in main memory; names that share a tensor share its copy."""
        moved = {id(tensor): tensor.cpu() for tensor in self.tensors()}
        return Calibration(*(known and {name: moved[id(tensor)] for name, tensor in known.items()} for known in self))

    def with_prior(self, n_tokens: int) -> Calibration:
        """The Hessians, of `n_tokens` in all, as if as many inputs as a matrix has columns had been seen besides, alike
        in all directions: few tokens leave directions that look free, and GPTQ pushes all its errors there. In
        place."""
        for hessian_CC in {id(hessian): hessian for hessian in (self.hessians or {}).values()}.values():
            diagonal_C = hessian_CC.diagonal()
            diagonal_C += len(hessian_CC) / n_tokens * diagonal_C.mean()
        return self


class Scheme:
    """How a network's weights become what an artifact stores.

    By default every large tensor is rounded by itself, and all row scales are coarsened by one factor, as far as the
    limit in bytes needs. A scheme overrides what it does otherwise, most often `round` alone.
    """

    summary = ""
    """For help: a sentence."""
    measures_sensitivities = False
    """Whether `encode` goes by sensitivities."""
    fits_limit = True
    """Whether scales may be coarsened, and GPTQ may round."""

    def check(self, config: QuantizationConfig) -> None:
        """Raises ValueError for settings that this scheme cannot honour."""
        name = config.scheme
        if not self.fits_limit and config.gptq:
            raise ValueError(f"gptq goes with every scheme but {name!r}")
        if not self.fits_limit and config.coarsen > 1:
            raise ValueError(f"coarsen={config.coarsen} must be 1 for the scheme {name!r}")

    def needs_hessians(self, config: QuantizationConfig) -> bool:
        """Whether it rounds by GPTQ, which needs training batches."""
        return config.gptq

    def round(self, name: str, tensor: Tensor, bits: int, config: QuantizationConfig) -> QuantizedTensor:
        """`tensor` as integers of at most `bits` bits and row scales. Raises ValueError naming it for inf or NaN."""
        raise NotImplementedError

    def rounded(self, name: str, tensor: Tensor, role: Role, config: QuantizationConfig) -> QuantizedTensor:
        """`round` to the tensor's bits by the settings, its row scales then multiplied by `config.coarsen`."""
        rounded = self.round(name, tensor, config.storage_of(name, tensor.numel(), role)[1], config)
        return coarsen_rows(tensor, rounded, config.coarsen) if config.coarsen > 1 else rounded

    def encode(self, weights: Weights, config: QuantizationConfig) -> tuple[list[Encoded], QuantizationConfig]:
        """Every tensor in the form that is stored, and `config` with the coarsening that the limit needed."""
        storage = {
            name: config.storage_of(name, tensor.numel(), weights.roles[name])[0]
            for name, tensor in weights.tensors.items()
        }
        base = {
            name: self.rounded(name, tensor, weights.roles[name], config)
            for name, tensor in weights.tensors.items()
            if name not in weights.quantized and storage[name] == "int"
        }

        def encode(rounded: dict[str, QuantizedTensor]) -> list[Encoded]:
            known = rounded | weights.quantized
            return [
                encode_tensor(name, tensor, storage[name], known.get(name)) for name, tensor in weights.tensors.items()
            ]

        def coarsened(factor: float) -> dict[str, QuantizedTensor]:
            if factor == 1:
                return base
            return {name: coarsen_rows(weights.tensors[name], tensor, factor) for name, tensor in base.items()}

        def nearest(factor: float) -> list[Encoded]:
            return encode(coarsened(factor))

        def by_gptq(factor: float) -> list[Encoded]:
            coarse = dataclasses.replace(config, coarsen=config.coarsen * factor)
            wanted = {name: weights.tensors[name] for name in base}
            return encode(
                coarsened(factor) | quantize_with_hessians(wanted, weights.hessians or {}, coarse, weights.roles)
            )

        final = nearest if weights.hessians is None else by_gptq
        if not config.fit_limit or not self.fits_limit:
            return final(1.0), config
        # Rounding to nearest is cheap and packs about as small: it finds the factor, GPTQ confirms it.
        most = most_coarse(config)
        factor, encoded = fit_to_limit(nearest, weights.measure, weights.budget, most)
        if weights.hessians is not None:
            factor, encoded = fit_to_limit(by_gptq, weights.measure, weights.budget, most, start=factor)
        if factor > 1:
            log.warning(
                "at %d bits the artifact exceeds its limit: all row scales are %.3f times as coarse (about %.2f "
                "bits a weight less)",
                config.bits,
                factor,
                math.log2(factor),
            )
        return encoded, dataclasses.replace(config, coarsen=config.coarsen * factor)


def scheme_of(config: QuantizationConfig) -> Scheme:
    """The object that `config.scheme` names."""
    return importlib.import_module(f"{__name__}.{config.scheme}").SCHEME


def in_words() -> str:
    """The schemes for a line of help."""
    return "; ".join(f"'{name}': {importlib.import_module(f'{__name__}.{name}').SCHEME.summary}" for name in SCHEMES)


def calibrate(net: Hymba, config: QuantizationConfig, batches: list[Tensor], seed: int = 0) -> Calibration:
    """What `config` needs, from `batches` of token ids (B, T) on the net's device; `seed` of the tokens that are drawn.

    Without batches there are no Hessians, and sensitivities come from random ids: no data is used then.
    """
    found = look(net, config, batches, seed)
    return found.with_prior(sum(batch.numel() for batch in batches)) if batches else found


def look(net: Hymba, config: QuantizationConfig, batches: list[Tensor], seed: int = 0) -> Calibration:
    """Like `calibrate`, of a part of the batches: without the prior, which is added once the parts are summed."""
    scheme, hessians, sensitivities = scheme_of(config), None, None
    if scheme.needs_hessians(config) and batches:
        hessians = collect_hessians(net, batches)
    if scheme.measures_sensitivities:
        device = net.tok_emb.weight.device
        fisher = collect_fisher(net, batches or (ids.to(device) for ids in random_batches(net.config)), seed)
        sensitivities = fisher.sensitivities
        if hessians is not None:
            hessians = fisher.columns | hessians
    return Calibration(hessians, sensitivities)


def encode_weights(weights: Weights, config: QuantizationConfig) -> tuple[list[Encoded], QuantizationConfig]:
    """Every tensor in the form that is stored, and `config` with the coarsening that the limit needed.

    Without sensitivities all tensors count alike. Raises ValueError naming a tensor that cannot be stored, or for
    Hessians or sensitivities missing or unasked for.
    """
    scheme = scheme_of(config)
    unknown = sorted(set(weights.quantized) - set(weights.tensors))
    if unknown:
        raise ValueError(f"quantized tensors that the network does not have: {', '.join(unknown)}")
    if scheme.needs_hessians(config) != (weights.hessians is not None):
        raise ValueError(
            f"the scheme {config.scheme!r} {'needs' if weights.hessians is None else 'takes no'} Hessians: "
            f"calibrate makes them from training batches, for GPTQ only"
        )
    if weights.sensitivities is not None and not scheme.measures_sensitivities:
        raise ValueError(f"the scheme {config.scheme!r} takes no sensitivities")
    for name, tensor in weights.tensors.items():
        check_tensor(name, tensor)
    return scheme.encode(weights, config)


def most_coarse(config: QuantizationConfig) -> float:
    """The largest factor on the row scales worth trying: about three or four levels are left in use there."""
    return min(2.0 ** (config.bits - 2), MAX_COARSEN / config.coarsen)


def fit_to_limit(
    encode: Callable[[float], list[Encoded]], measure: Measure, budget: int, max_factor: float, start: float = 1.0
) -> tuple[float, list[Encoded]]:
    """The least factor on the row scales, from `start` up, at which the artifact has at most `budget` bytes.

    `encode(factor)` gives all tensors at that factor, `measure` the bytes of a file of them. Doubling the scales saves
    the entropy coder about a bit a weight, so the first attempt knows nearly how far to go, and later ones go by the
    saving they saw. Returns the factor and its tensors; where no factor up to `max_factor` would do, those of `start`.
    """
    first, log_start = encode(start), math.log2(start)
    log_factor, encoded, best = log_start, first, None
    n_weights = sum(tensor.entry.numel for tensor in first if tensor.entry.storage == "int")
    sizes: dict[float, int] = {}
    for _ in range(MAX_ATTEMPTS):
        sizes[log_factor] = measure(encoded)
        if sizes[log_factor] <= budget:
            best = (2**log_factor, encoded)
            if log_factor == log_start or sizes[log_factor] >= CLOSE * budget:
                break
        saved_per_doubling = n_weights / 8
        if len(sizes) > 1:
            (low, large), *_, (high, small) = sorted(sizes.items())
            saved_per_doubling = (large - small) / (high - low)
        if saved_per_doubling <= 0:
            break
        log_factor = max(log_start, log_factor + (sizes[log_factor] - AIM * budget) / saved_per_doubling)
        if 2**log_factor > max_factor or log_factor in sizes:
            break
        encoded = encode(2**log_factor)
    if best is None:
        log.warning("no coarser scales bring the artifact under its limit: exported without")
        return start, first
    return best
