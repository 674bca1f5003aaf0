"""What an update of test-time training moves: chosen weights or thin factors, by SGD, Muon or both.

Every rank calls the same methods with the same numbers; gradients are summed over the ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.evaluation.score import sum_over_ranks, world
from hymba_lightning.model import Hymba
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.muon import Muon

# Factors start the same on every rank and in every run.
FACTOR_SEED = 0
# What ttt.parameters calls scalars: all that is no matrix and no table.
SCALARS = (Role.CONVOLUTION, Role.DYNAMICS, Role.CONTROL, Role.SCALAR)


def matrices_of(module: nn.Module) -> set[int]:
    """Ids of the parameters of `module` that are matrices."""
    roles = roles_of(module)
    return {id(p) for name, p in module.named_parameters() if roles[name] is Role.MATRIX}


def select_parameters(net: Hymba, config: TTTConfig) -> list[nn.Parameter]:
    """The parameters that `config` lets adapt. Raises ValueError when none is left."""
    if config.parameters == "scalars":
        roles = roles_of(net)
        chosen = {id(p) for name, p in net.named_parameters() if roles[name] in SCALARS}
    elif config.parameters == "mlp":
        chosen = {matrix for block in net.layers for matrix in matrices_of(block.mlp)}
    elif config.parameters == "low_rank" or (config.optimizer == "muon" and not config.rest_lr):
        chosen = matrices_of(net.blocks)
    else:
        chosen = {id(p) for p in net.parameters()}
    frozen = {id(p) for block in net.layers[: config.freeze_blocks] for p in block.parameters()}
    params = [p for p in net.parameters() if id(p) in chosen - frozen]
    if not params:
        raise ValueError("no parameter is left to adapt: lower ttt.freeze_blocks or set ttt.epochs to 0")
    return params


class MuonSteps(torch.optim.Optimizer):
    """Training's Muon by itself, with constant momentum and without decay: torch's rule, but matrices of a shape are
    orthogonalised together by a GPU's own kernels.

    Every rank does all of it: gradients are the same on each, and an update's matrices are few.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self._rule = Muon(shard=False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices by their gradients."""
        for group in self.param_groups:
            matrices = group["params"]
            for p in matrices:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p, dtype=torch.float32)
            self._rule.step(
                matrices,
                [p.grad for p in matrices],
                [self.state[p]["momentum"] for p in matrices],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=0.0,
            )


class Adapter:
    """Moves a network's weights during test-time training.

    Under 'low_rank' each matrix W is W0 + B A, with B (rows, rank) starting at 0 and A (rank, cols) at random; the
    factors' gradients follow from W's by the chain rule, so that the network itself stays as it is.
    """

    def __init__(self, net: Hymba, config: TTTConfig) -> None:
        self.config = config
        self.weights = select_parameters(net, config)
        self._matrices = matrices_of(net.blocks)
        self._start = [p.detach().clone() for p in self.weights] if self._remembers_start else []
        self._make_trainable()

    @property
    def _remembers_start(self) -> bool:
        return self.config.parameters == "low_rank" or self.config.anchor > 0 or self.config.reset_at_bos

    def _make_trainable(self) -> None:
        config = self.config
        self.factors: list[tuple[Tensor, Tensor]] = []
        if config.parameters == "low_rank":
            generator = torch.Generator().manual_seed(FACTOR_SEED)
            for p in self.weights:
                rank = min(config.rank, *p.shape)
                a = torch.randn(rank, p.size(1), generator=generator) / p.size(1) ** 0.5
                self.factors.append((p.new_zeros(p.size(0), rank), a.to(p)))
        trainable: list[Tensor] = [f for pair in self.factors for f in pair] or [*self.weights]
        self.trainable = trainable
        self.optimizers: list[torch.optim.Optimizer] = []
        if config.optimizer == "muon":
            matrices = [p for p in trainable if id(p) in self._matrices]
            rest = [p for p in trainable if id(p) not in self._matrices]
            if matrices:
                self.optimizers.append(self._muon(matrices))
            if rest:
                self.optimizers.append(torch.optim.SGD(rest, lr=config.rest_lr, momentum=config.momentum))
        else:
            self.optimizers.append(torch.optim.SGD(trainable, lr=config.lr, momentum=config.momentum))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]

    def _muon(self, matrices: list[Tensor]) -> torch.optim.Optimizer:
        lr, momentum = self.config.lr, self.config.momentum
        if matrices[0].is_cuda:
            return MuonSteps(matrices, lr, momentum)
        # In bfloat16, which takes CPUs that multiply it a quarter of float32's time.
        return torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, momentum=momentum)

    def clear_gradients(self) -> None:
        """Sets all gradients to zero, before the first backward pass of an update."""
        for p in self.weights:
            p.grad = None

    def update(self, lr: float, loss: Tensor) -> Tensor:
        """One step on the gradients that this rank's backward passes left; returns `loss` summed over the ranks."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.weights]
        if self.factors:
            grads = [g for grad, (b, a) in zip(grads, self.factors, strict=True) for g in (grad @ a.T, b.T @ grad)]
        if world()[1] > 1:
            flat = sum_over_ranks(torch.cat([g.float().flatten() for g in grads] + [loss[None]]))
            loss = flat[-1]
            grads = list(flat[:-1].split([g.numel() for g in grads]))
        for p, grad in zip(self.trainable, grads, strict=True):
            p.grad = grad.view_as(p).to(p.dtype)
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.config.grad_clip)
        scale = lr / self.config.lr if self.config.lr else 0.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["initial_lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.clear_gradients()
        self._write_back()
        return loss

    @torch.no_grad()
    def _write_back(self) -> None:
        if not self.factors:
            if self.config.anchor:
                for p, start in zip(self.weights, self._start, strict=True):
                    p.lerp_(start, self.config.anchor)
            return
        for p, start, (b, a) in zip(self.weights, self._start, self.factors, strict=True):
            b.mul_(1 - self.config.anchor)
            p.copy_(start + b @ a)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the weights of the start, without momentum."""
        for p, start in zip(self.weights, self._start, strict=True):
            p.copy_(start)
        self._make_trainable()
