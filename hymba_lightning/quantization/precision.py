"""Chooses every tensor's precision so that the file fits its limit with the least predicted loss.

An entropy coder charges for the levels in use, so what is chosen is a weight's step, not a width. With s a weight's
sensitivity, its rounding costs s step² / 24 nats, and half the step takes a bit, whatever the weight: steps in
proportion to s^-½ waste nothing. That settles a tensor's rows among themselves, and its columns: a weight's step is its
row's times its column's. Rounded by GPTQ, column j matters by 1 / U_jj² instead (what the columns after it cannot make
good), whose product over the columns is the Hessian's determinant, so that steps in proportion to U_jj bring the mean
of these numbers down to their geometric mean. The factor on a tensor's steps, or float16 or float32 instead, are the
options of which `allocate` takes one for each tensor. An option's loss and bytes are those of the tensor rounded and
coded by itself; what the whole file has decides.

What a weight's sensitivity is stands in sensitivity.py.

The allocation is by Lagrangian relaxation: at a price λ of a byte the best choice is each tensor's least loss + λ
bytes, and what those choices are as λ falls is a walk along the tensors' lower convex hulls, steepest step first. At
each of its stops no choice of as few bytes has less loss (Everett 1963). R rows, C columns.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hymba_lightning.model.roles import Role
from hymba_lightning.ops.threads import spread_torch
from hymba_lightning.quantization import frames
from hymba_lightning.quantization.format import ROOTS, STREAM_DTYPES, Encoded, to_planes
from hymba_lightning.quantization.gptq import SingularHessianError, inverse_factor, round_columns
from hymba_lightning.quantization.rows import (
    QuantizedTensor,
    as_rows,
    column_factors,
    normalise,
    q_max_of,
    round_to,
    search_scale,
)
from hymba_lightning.quantization.sensitivity import plain_sensitivity
from hymba_lightning.quantization.tensors import encode_tensor, fits_float16

log = logging.getLogger("hymba_lightning")

LADDER = 4  # factors per octave of the steps
SMALL = 1024  # entries up to which a tensor stays float
SAMPLE = 1 << 17  # weights of a tensor on which an option's loss and bytes are counted
# Share of the mean sensitivity that every row and column has at least, since calibration sees only a few sequences.
SMOOTHING = 0.1
# Share of the plain sensitivity that is always added: the second-order loss underestimates what it costs to round a
# tensor to zero.
LEAST = 1e-4
SCALE_TOP = 13  # the largest scale lies in [2^13, 2^14), which leaves 2^27 below it at float16's full precision
Q_MAX = q_max_of(8)
DAMPING = 0.01
ATTEMPTS = 12
AIM, CLOSE = 0.9995, 0.999  # of the budget: where to go, and what is near enough


class Measure(Protocol):
    """Bytes of the file that these tensors would make; `exact` takes the time to compress it in earnest."""

    def __call__(self, encoded: list[Encoded], exact: bool = False) -> int: ...


class Option(NamedTuple):
    """One way to store a tensor."""

    loss: float  # that it adds, in any unit
    bytes: float
    storage: str  # 'int', 'float16' or 'float32'
    factor: float = 1.0  # on the tensor's steps, for 'int'


def allocate(options: dict[str, list[Option]], budget: float) -> dict[str, Option]:
    """An option for each tensor, at most `budget` bytes together where that is possible, else the smallest ones.

    The walk along the hulls; what is left when its next step does not fit goes to the steps after it that do.
    """
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    position = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bytes for hull in hulls.values())
    queue = [(-gain(hull, 0), index, name) for index, (name, hull) in enumerate(sorted(hulls.items())) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, index, name = heapq.heappop(queue)
        hull, at = hulls[name], position[name]
        cost = hull[at + 1].bytes - hull[at].bytes
        if cost > left:
            continue  # nor would any later step of this tensor, which starts from here
        left -= cost
        position[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(queue, (-gain(hull, at + 1), index, name))
    return {name: hull[position[name]] for name, hull in hulls.items()}


def gain(hull: list[Option], at: int) -> float:
    """Predicted loss saved per byte by going from option `at` of the hull to the next, larger one."""
    return (hull[at].loss - hull[at + 1].loss) / (hull[at + 1].bytes - hull[at].bytes)


def lower_hull(options: list[Option]) -> list[Option]:
    """The options that are best for some price of a byte, smallest first; their gains per byte fall strictly."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        if hull and option.bytes == hull[-1].bytes:
            continue
        while len(hull) > 1 and gain([hull[-1], option], 0) >= gain(hull, len(hull) - 2):
            hull.pop()
        hull.append(option)
    return hull


class Candidate:
    """A tensor with its options: its rows on a ladder of steps as integers, float16, float32.

    Rows and sensitivities are in units of the columns' factors, in which all columns of a row want one step.
    """

    def __init__(self, name: str, tensor: Tensor, sensitivity: Tensor, hessian: Tensor | None, role: Role) -> None:
        self.name, self.tensor = name, tensor.detach().float()
        rows_RC = as_rows(self.tensor)
        sensitivity_RC = as_rows(sensitivity + LEAST * plain_sensitivity(role, tensor)).to(rows_RC)
        self.columns: Tensor | None = None
        self.factor: tuple[Tensor, Tensor] | None = None
        """GPTQ's Cholesky factor and order of columns; None where there is no usable Hessian."""
        self.gptq_gain = 1.0
        """What GPTQ leaves of the loss: column j's error counts 1/U_jj² instead of H_jj."""
        hessian = None if hessian is None else hessian.to(rows_RC.device)
        factor_C = torch.ones_like(rows_RC[0])
        if tensor.ndim > 1 and tensor.numel() > SMALL:
            matters_C = self._factorise(hessian) if hessian is not None else None
            if matters_C is None:
                mean_R = sensitivity_RC.double().mean(dim=1, keepdim=True)
                matters_C = (sensitivity_RC / (mean_R + SMOOTHING * mean_R.mean())).mean(dim=0)
                matters_C += SMOOTHING * matters_C.mean()
            wanted_C = -0.5 * matters_C.log2()
            self.columns = (len(ROOTS) * (wanted_C - wanted_C.mean())).round().clamp(-128, 127).to(torch.int8)
            factor_C = column_factors(self.columns)
            if hessian is not None and self.factor is not None:
                # Columns keep their order.
                upper_CC, order_C = self.factor
                self.factor = upper_CC / factor_C[order_C], order_C
                diagonal = float((hessian.diagonal().double() * factor_C.square()).mean()) * (1 + DAMPING)
                self.gptq_gain = min(float((matters_C * factor_C.square()).mean()) / diagonal, 1.0)
        self.rows_RC, self.factor_C = rows_RC / factor_C, factor_C
        self.sensitivity_RC = sensitivity_RC * factor_C.square()
        mean_R = self.sensitivity_RC.double().mean(dim=1)
        self.step_R = (mean_R + SMOOTHING * mean_R.mean()).rsqrt()
        self.finest_R, self.coarsest_R = self._finest(), 2.01 * self.rows_RC.abs().amax(dim=1).double()
        self.made: dict[tuple[float, bool], QuantizedTensor] = {}

    def _factorise(self, hessian_CC: Tensor) -> Tensor | None:
        """What each column matters once those after it have made good, 1/U_jj² (C,); None, and told, for a Hessian of
        no use."""
        try:
            self.factor = upper_CC, order_C = inverse_factor(hessian_CC, DAMPING, True)
        except SingularHessianError as error:
            log.warning("%s is rounded to nearest instead of by GPTQ: %s", self.name, error)
            return None
        matters_C = torch.empty_like(upper_CC.diagonal())
        matters_C[order_C] = upper_CC.diagonal().pow(-2)
        return matters_C

    def _finest(self) -> Tensor:
        """The steps of plain 8-bit rounding: finer ones would cut off more than they gain."""
        rows_RC, exponent = normalise(self.rows_RC, Q_MAX)
        return search_scale(rows_RC, Q_MAX, 0.999, 9).double() * 2.0**exponent

    def steps(self, factor: float) -> Tensor:
        """(R,) float64."""
        return torch.minimum(torch.maximum(self.step_R * factor, self.finest_R), self.coarsest_R)

    def options(self) -> list[Option]:
        """All of them, finest first."""
        rows_RC, sensitivity_RC = self.rows_RC, self.sensitivity_RC
        planes = to_planes(self.tensor.cpu().flatten().numpy().astype(STREAM_DTYPES["float32"]))
        options = [Option(0.0, len(frames.draft(planes)), "float32")]
        if fits_float16(self.tensor.cpu().flatten()):
            half = self.tensor.half()
            planes = to_planes(half.cpu().flatten().numpy().astype(STREAM_DTYPES["float16"]))
            options.append(
                Option(
                    self._loss(as_rows(half.float() - self.tensor) / self.factor_C, sensitivity_RC),
                    len(frames.draft(planes)),
                    "float16",
                )
            )
        if rows_RC.numel() <= SMALL:
            return options
        n_rows = len(rows_RC)
        picked = torch.linspace(0, n_rows - 1, max(min(n_rows, SAMPLE // rows_RC.shape[1]), 1)).long()
        rows_RC, sensitivity_RC, share = rows_RC[picked], sensitivity_RC[picked], n_rows / len(picked)
        scales = 2 * n_rows + (0 if self.columns is None else len(self.columns) // 2)
        live_R = self.coarsest_R > 0
        lowest = float((self.finest_R / self.step_R)[live_R].min()) if live_R.any() else 1.0
        highest = float((self.coarsest_R / self.step_R)[live_R].max()) if live_R.any() else 1.0
        for index in range(math.floor(LADDER * math.log2(lowest)), math.ceil(LADDER * math.log2(highest)) + 1):
            factor = 2.0 ** (index / LADDER)
            step_R = self.steps(factor)[picked].float().clamp_min(1e-38)
            q_RC = round_to(rows_RC, step_R, Q_MAX)
            loss = self._loss(q_RC * step_R[:, None] - rows_RC, sensitivity_RC) * share * self.gptq_gain
            codes = (q_RC + Q_MAX).to(torch.uint8).cpu().numpy().tobytes()
            options.append(Option(loss, len(frames.frame(codes, 1)) * share + scales, "int", factor))
        return options

    @staticmethod
    def _loss(error_RC: Tensor, sensitivity_RC: Tensor) -> float:
        """Nats a token."""
        return 0.5 * float((error_RC.square() * sensitivity_RC).sum(dtype=torch.float64))

    def quantize(self, factor: float, by_gptq: bool) -> QuantizedTensor:
        """The tensor in the steps of `factor`, with as many bits as its codes take."""
        if (factor, by_gptq) not in self.made:
            step_R = self.steps(factor)
            exponent = max(math.frexp(float(step_R.max()))[1], -126) - 1 - SCALE_TOP
            scale_R = (step_R * 2.0**-exponent).half().float().clamp_min(2.0**-24)
            rows_RC = (self.rows_RC.double() * 2.0**-exponent).float()
            if by_gptq and self.factor is not None:
                upper_CC, order_C = self.factor
                q_RC = torch.empty_like(rows_RC)
                q_RC[:, order_C] = round_columns(rows_RC[:, order_C], upper_CC.to(rows_RC), scale_R, Q_MAX, 128)
            else:
                q_RC = round_to(rows_RC, scale_R, Q_MAX)
            bits = max(int(q_RC.abs().max()).bit_length() + 1, 2)
            self.made[factor, by_gptq] = QuantizedTensor(
                q_RC.to(torch.int8), scale_R.half(), exponent, bits, self.columns
            )
        return self.made[factor, by_gptq]


def encode_mixed(
    state_dict: dict[str, Tensor],
    sensitivities: dict[str, Tensor] | None,
    hessians: dict[str, Tensor],
    fixed: dict[str, Encoded],
    measure: Measure,
    budget: int,
    roles: Mapping[str, Role],
) -> list[Encoded]:
    """Every tensor encoded, in a file of at most `budget` bytes where that is possible.

    `sensitivities` has a tensor for every name (None: plain ones), `hessians` those of linears to be rounded by GPTQ,
    `fixed` tensors that are encoded already, `measure` gives the bytes of the whole file, `roles` are the tensors'.
    Raises ValueError naming a tensor of no or unusable sensitivity.
    """
    for name, tensor in state_dict.items() if sensitivities is not None else ():
        given = sensitivities.get(name) if sensitivities else None
        # Least and largest are NaN where any is.
        if given is None or given.shape != tensor.shape or not (given.amin() >= 0 and given.amax() < math.inf):
            raise ValueError(f"{name} has no finite sensitivities of its shape {list(tensor.shape)}")
    leaders: dict[tuple, str] = {}
    leader_of = {
        name: leaders.setdefault((tuple(tensor.shape), digest(tensor)), name)
        for name, tensor in state_dict.items()
        if name not in fixed
    }
    names = list(leaders.values())
    candidates: dict[str, Candidate] = {}
    options: dict[str, list[Option]] = {}

    # Everything here is small steps one after the other: a thread for each tensor, not for each step.
    def consider(item: int) -> None:
        name, tensor = names[item], state_dict[names[item]]
        sensitivity = plain_sensitivity(roles[name], tensor) if sensitivities is None else sensitivities[name]
        candidates[name] = Candidate(name, tensor, sensitivity, hessians.get(name), roles[name])
        options[name] = candidates[name].options()

    def encode(by_gptq: bool, choice: dict[str, Option]) -> list[Encoded]:
        integers = [name for name in names if choice[name].storage == "int"]

        def quantize(item: int) -> None:
            candidates[integers[item]].quantize(choice[integers[item]].factor, by_gptq)

        spread_torch(quantize, len(integers))
        encoded = list(fixed.values())
        for name, leader in leader_of.items():
            option = choice[leader]
            rounded = candidates[leader].quantize(option.factor, by_gptq) if option.storage == "int" else None
            encoded.append(encode_tensor(name, state_dict[name], option.storage, rounded))
        return encoded

    spread_torch(consider, len(names))
    options = {name: options[name] for name in names}
    # Rounding to nearest and drafts of the file are quick: they find the way, the real ones go the last steps.
    *_, estimate = search(options, partial(encode, False), measure, budget, float(budget))
    encoded, loss, _ = search(options, partial(encode, bool(hessians)), partial(measure, exact=True), budget, estimate)
    if math.isinf(loss) and hessians:
        # In the coarsest steps GPTQ leaves codes where rounding to nearest leaves zeros.
        encoded, loss, _ = search(options, partial(encode, False), partial(measure, exact=True), budget, estimate)
    if math.isinf(loss):
        log.warning("no division of the bytes brings the artifact under its limit: exported at its smallest")
    elif sensitivities is not None:
        log.info("mixed precision: %.5f nats a token are predicted to be lost", loss)
    return encoded


def search(
    options: dict[str, list[Option]],
    encode: Callable[[dict[str, Option]], list[Encoded]],
    measure: Callable[[list[Encoded]], int],
    budget: int,
    estimate: float,
) -> tuple[list[Encoded], float, float]:
    """Allocates `estimate` bytes, and more or less of them until the real file just fits into `budget`.

    Returns the encoded tensors of least predicted loss that fit, that loss, and the estimate to which they belong; the
    smallest ones and infinity where nothing fits.
    """
    best: tuple[list[Encoded], float, float] | None = None
    sizes: dict[tuple[Option, ...], int] = {}
    smallest = allocate(options, 0)
    for _ in range(ATTEMPTS):
        choice = allocate(options, estimate)
        key = tuple(choice.values())
        if key not in sizes:
            encoded = encode(choice)
            sizes[key] = measure(encoded)
            loss = sum(option.loss for option in key)
            if sizes[key] <= budget and (best is None or loss < best[1]):
                best = encoded, loss, estimate
        elif sizes[key] <= budget:
            break
        if CLOSE * budget <= sizes[key] <= budget or (sizes[key] > budget and choice == smallest):
            break
        estimate += AIM * budget - sizes[key]
    if best is None:
        encoded = encode(smallest)
        return encoded, math.inf if measure(encoded) > budget else sum(o.loss for o in smallest.values()), estimate
    return best


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of the tensor's values in float32: equal for equal tensors."""
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).digest()
