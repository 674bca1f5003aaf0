"""Muon: momentum, then orthogonalisation by Newton-Schulz; same-shape matrices in banks, banks shared out over ranks.

Shapes: n matrices of a bank, R rows, C columns, R <= C after transposition.
Sources: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), for the update and the
quintic iteration; Amsel et al., "The Polar Express" (arXiv:2505.16932) for the coefficients that change per step;
Li et al., "NorMuon" (arXiv:2510.05491), for the second moments of neurons; Chen et al., "Cautious Weight Decay"
(arXiv:2510.12402).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hymba_lightning.ops.muon_passes import Bank, Passes, Update, passes, plan_banks
from hymba_lightning.ops.muon_passes.backend_torch import normalized
from hymba_lightning.ops.newton_schulz import newton_schulz_step

QUINTIC = (3.4445, -4.7750, 2.0315)

# Minimax odd quintics for singular values in [1e-3, 1], one per step; the last repeats.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# bf16 rounding may lift a singular value above 1, where the polynomials diverge: leave room.
POLAR_EXPRESS_SAFETY = 1.01

# So many times wider than high a float32 matrix is worth the detour over its Gram matrix.
GRAM_COLUMNS = 2


def iteration_coefficients(name: str, steps: int) -> list[tuple[float, float, float]]:
    """`steps` triples (a, b, c) of x -> a x + b x³ + c x⁵.

    Raises:
        ValueError: `name` is neither "quintic" nor "polar_express".
    """
    if name == "quintic":
        return [QUINTIC] * steps
    if name == "polar_express":
        s = POLAR_EXPRESS_SAFETY
        damped = [(a / s, b / s**3, c / s**5) for a, b, c in POLAR_EXPRESS[:-1]] + [POLAR_EXPRESS[-1]]
        return [damped[min(i, len(damped) - 1)] for i in range(steps)]
    raise ValueError(f"muon_coefficients {name!r} is unknown; use 'quintic' or 'polar_express'")


def orthogonalize(bank_nRC: Tensor, coefficients: Sequence[tuple[float, float, float]], dtype: torch.dtype) -> Tensor:
    """Push the singular values of every matrix of a bank towards 1.

    Args:
        bank_nRC: (n, R, C), R <= C, any floating dtype.
        coefficients: (a, b, c) per step.
        dtype: of the iteration and of the result.

    Returns:
        (n, R, C) in `dtype`.
    """
    return _iterate(normalized(bank_nRC, dtype), coefficients)


def _iterate(x_nRC: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The steps, for matrices of Frobenius norm 1."""
    if x_nRC.dtype == torch.float32 and GRAM_COLUMNS * x_nRC.size(1) <= x_nRC.size(2):
        return _of_gram(x_nRC, coefficients)
    for a, b, c in coefficients:
        x_nRC = newton_schulz_step(x_nRC, a, b, c)
    return x_nRC


def _of_gram(x_nRC: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The iteration by square products alone: each step multiplies X by a polynomial of G = X Xᵀ, by which the next G
    follows from this one, so that wide matrices are multiplied twice
    instead of in every step. It costs digits, of which float32 keeps more by it than bfloat16 has."""
    gram_nRR = x_nRC @ x_nRC.mT
    total_nRR = None
    for step, (a, b, c) in enumerate(coefficients):
        factor_nRR = torch.baddbmm(gram_nRR, gram_nRR, gram_nRR, beta=b, alpha=c)
        factor_nRR.diagonal(dim1=-2, dim2=-1).add_(a)
        total_nRR = factor_nRR if total_nRR is None else factor_nRR @ total_nRR
        if step + 1 < len(coefficients):
            gram_nRR = factor_nRR @ (factor_nRR @ gram_nRR)
    return x_nRC if total_nRR is None else total_nRR @ x_nRC


class Muon:
    """The update rule, without parameters of its own: `step` changes parameters and momentum in place.

    Momentum is heavy-ball (m <- μ m + g) and replicated on every rank in float32: gradients already are the mean over
    ranks, so that replicas agree and a checkpoint of rank 0 is complete. Only the Newton-Schulz work is shared out:
    a rank orthogonalises its slice of every bank, then one all-gather hands out the updates.

    Args:
        ns_steps: Newton-Schulz steps.
        coefficients: "quintic" or "polar_express".
        nesterov: orthogonalise g + μ m instead of m.
        row_normalize: scale the rows of what is orthogonalised to length 1 (MuonEq-R).
        shard: share the work out over ranks.
        dtype: of the Newton-Schulz steps; None takes bfloat16 on a GPU and float32 on a CPU, where that is faster.
        neuron_beta: decay of a second moment per row, by whose root a row's update is divided before the matrix gets
            back the norm it had (NorMuon); 0 for none.
        cautious: decay only the weights that the update moves towards zero.
        backend: of the passes over the parameters (ops/muon_passes).
    """

    def __init__(
        self,
        *,
        ns_steps: int = 5,
        coefficients: str = "quintic",
        nesterov: bool = True,
        row_normalize: bool = False,
        shard: bool = True,
        dtype: torch.dtype | None = None,
        neuron_beta: float = 0.0,
        cautious: bool = False,
        backend: str = "auto",
    ) -> None:
        self.coefficients = iteration_coefficients(coefficients, ns_steps)
        self.nesterov = nesterov
        self.row_normalize = row_normalize
        self.shard = shard
        self.dtype = dtype
        self.neuron_beta = neuron_beta
        self.cautious = cautious
        self.backend = backend
        self._plans: dict[tuple[tuple[torch.Size, ...], int], tuple[list[Bank], int]] = {}

    @torch.no_grad()
    def step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        neurons: list[Tensor] | None = None,
    ) -> None:
        """One update: p <- (1 − lr·weight_decay) p − lr·max(1, rows/columns)^½ · orthogonalize(m or g + μ m).

        Args:
            params: matrices (rows, columns).
            grads: their gradients.
            momenta: their float32 momentum buffers.
            lr: learning rate of this step.
            momentum: μ of this step.
            weight_decay: decoupled weight decay.
            neurons: float32 second moments (rows, 1), starting at 0, which `neuron_beta` needs.
        """
        if not params:
            return
        update = Update(
            params,
            [g.float() for g in grads],
            momenta,
            lr,
            momentum,
            weight_decay,
            nesterov=self.nesterov,
            row_normalize=self.row_normalize,
            cautious=self.cautious,
            neuron_beta=self.neuron_beta,
            neurons=neurons or [],
        )
        world_size, rank = 1, 0
        if self.shard and dist.is_available() and dist.is_initialized():
            world_size, rank = dist.get_world_size(), dist.get_rank()
        key = (tuple(p.shape for p in params), world_size)
        if key not in self._plans:
            self._plans[key] = plan_banks(key[0], world_size)
        banks, flat_size = self._plans[key]
        device = params[0].device
        dtype = self.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)

        of_update = passes(update, banks, backend=self.backend)
        of_update.momentum()
        if world_size == 1:
            for bank in banks:
                of_update.apply(bank, self._orthogonal(of_update, bank, 0, len(bank.members), dtype).reshape(1, -1))
            return
        flat_S = torch.empty(flat_size, dtype=dtype, device=device)
        for bank in banks:
            first = min(rank * bank.share, len(bank.members))
            last = min(first + bank.share, len(bank.members))
            if first < last:
                x_nRC = self._orthogonal(of_update, bank, first, last, dtype)
                flat_S[bank.offset :][: x_nRC.numel()].view_as(x_nRC).copy_(x_nRC)
        flat_WS = torch.empty(world_size, flat_size, dtype=dtype, device=device)
        # Bytes, because not every backend carries bf16.
        dist.all_gather(list(flat_WS.view(torch.uint8)), flat_S.view(torch.uint8))
        for bank in banks:
            of_update.apply(bank, flat_WS[:, bank.offset : bank.offset + bank.share * bank.numel])

    def _orthogonal(self, of_update: Passes, bank: Bank, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """(last − first, R, C): members `first` to `last` of a bank, orthogonalised."""
        return _iterate(of_update.bank(bank, first, last, dtype), self.coefficients)
