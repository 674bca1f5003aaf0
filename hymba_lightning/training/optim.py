"""The optimizer of the network: Muon for matrices, Adam for the rest, as one `torch.optim.Optimizer`.

One object, because Lightning's automatic optimization (gradient accumulation, clipping, resume, `global_step`) takes
exactly one.
"""

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hymba_lightning.training.muon import Muon
from hymba_lightning.training.optim_config import MUON_DTYPES, OptimizerConfig
from hymba_lightning.training.param_groups import assign_parameters, build_rules

__all__ = ["HymbaOptimizer", "OptimizerConfig", "build_optimizer"]


class HymbaOptimizer(Optimizer):
    """Muon and Adam behind one optimizer.

    Every parameter group has `name`, `algorithm` ("muon", "adam" or "none"), `base_lr` and `lr`; Muon's also have
    `momentum` and `weight_decay`. Groups of algorithm "none" are not updated but have their gradients cleared. The
    Adam groups and their state are shared with a `torch.optim.AdamW`, whose own kernels (fused on CUDA, foreach
    elsewhere) do the work.

    Args:
        groups: dictionaries with the keys above and `params`.
        config: the numbers that are the same for all groups.

    Raises:
        ValueError: a group lacks `name`, `algorithm` or `base_lr`, or a Muon parameter is not a matrix.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        for group in groups:
            missing = {"name", "algorithm", "base_lr", "params"} - group.keys()
            if missing:
                raise ValueError(f"optimizer group {group.get('name')!r} lacks {sorted(missing)}")
            group.setdefault("lr", group["base_lr"])
            group.setdefault("base_weight_decay", group.get("weight_decay", 0.0))
            if group["algorithm"] == "muon":
                group.setdefault("momentum", config.first_momentum)
                not_matrices = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
                if not_matrices:
                    raise ValueError(f"Muon group {group['name']!r} holds parameters of shape {not_matrices}")
        self._muon = Muon(
            ns_steps=config.ns_steps,
            coefficients=config.muon_coefficients,
            nesterov=config.muon_nesterov,
            row_normalize=config.muon_row_normalize,
            shard=config.muon_shard,
            dtype=MUON_DTYPES[config.muon_dtype],
            neuron_beta=config.muon_neuron_beta,
            cautious=config.cautious_decay,
        )
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": 0.0})
        self._decay_with_lr = config.decay_with_lr
        self._adam = torch.optim.AdamW(
            self._groups_of("adam"), lr=0.0, betas=config.adam_betas, eps=config.adam_eps, weight_decay=0.0
        )
        self._share_with_adam()

    def set_schedule(self, lr_scale: float, momentum: float) -> None:
        """Set every learning rate to `base_lr * lr_scale`, and Muon's momentum; under `decay_with_lr` every weight
        decay to `base_weight_decay * lr_scale`."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
            if group["algorithm"] == "muon":
                group["momentum"] = momentum
            if self._decay_with_lr:
                group["weight_decay"] = group["base_weight_decay"] * lr_scale

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run `closure` (forward and backward) if given, then update every trained parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._choose_kernels()
        self._adam.step()
        for group in self._groups_of("muon"):
            params = [p for p in group["params"] if p.grad is not None]
            self._muon.step(
                params,
                [p.grad for p in params],
                [self._momentum_buffer(p) for p in params],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                neurons=[self._neuron_moment(p) for p in params] if self._muon.neuron_beta else None,
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; settings of the groups stay what they are here.

        Raises:
            ValueError: the groups' names or sizes are not those of this optimizer.
        """
        ours = [(group["name"], len(group["params"])) for group in self.param_groups]
        theirs = [(group.get("name"), len(group["params"])) for group in state_dict["param_groups"]]
        if ours != theirs:
            raise ValueError(
                f"the checkpoint's optimizer groups {theirs} are not this run's {ours}; "
                "resume with the network and optimizer switches that the checkpoint was made with"
            )
        # State comes from the checkpoint; rates, decay and kernels are this run's: a resumed run does what it was told.
        self._choose_kernels()
        state_dict = copy(state_dict)
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        state_dict["param_groups"] = [
            saved | own for saved, own in zip(state_dict["param_groups"], settings, strict=True)
        ]
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                state = self.state.get(parameter, {})
                for key in ("momentum_buffer", "neuron_moment"):
                    if key in state:
                        # The base class casts state to the parameter's dtype; momentum stays float32.
                        buffer = state_dict["state"][index][key]
                        state[key] = buffer.detach().to(parameter.device, copy=True)
                if "step" in state:
                    # Fused kernels count on the parameter's device, foreach on the CPU.
                    state["step"] = state["step"].to(parameter.device if group["fused"] else "cpu")

    def __getstate__(self) -> dict[str, Any]:
        own = {"_muon": self._muon, "_adam": self._adam, "_decay_with_lr": self._decay_with_lr}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_adam" in self.__dict__:
            self._share_with_adam()

    def _groups_of(self, algorithm: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["algorithm"] == algorithm]

    def _share_with_adam(self) -> None:
        self._adam.param_groups = self._groups_of("adam")
        self._adam.state = self.state

    def _choose_kernels(self) -> None:
        for group in self._adam.param_groups:
            on_cuda = all(p.is_cuda for p in group["params"])
            group["fused"], group["foreach"] = on_cuda, not on_cuda

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state["momentum_buffer"]

    def _neuron_moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "neuron_moment" not in state:
            state["neuron_moment"] = torch.zeros(len(parameter), 1, dtype=torch.float32, device=parameter.device)
        return state["neuron_moment"]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, tied: bool
) -> HymbaOptimizer:
    """Group the network's parameters by name and build their optimizer.

    Args:
        named_parameters: of the network; a leading `net.` is ignored.
        config: learning rates and switches.
        tied: whether the head is the token table.

    Raises:
        ParameterGroupError: a parameter belongs to no group, or a group that must not be empty is.
    """
    rules = build_rules(tied=tied, train_conv=config.train_conv, dynamics_in_muon=config.dynamics_in_muon)
    members = assign_parameters(named_parameters, rules)
    embed_lr = config.embed_lr if config.embed_lr is not None else (0.02 if tied else 0.6)
    base_lr = {
        "embed": embed_lr,
        "head": config.head_lr,
        "conv": config.conv_lr,
        "untrained": 0.0,
        "dynamics": config.dynamics_lr,
        "matrices": config.matrix_lr,
        "scalars": config.scalar_lr,
    }
    groups = [
        {
            "name": rule.name,
            "algorithm": rule.algorithm,
            "base_lr": base_lr[rule.name],
            "weight_decay": {"matrices": config.weight_decay, "embed": config.embed_decay}.get(rule.name, 0.0),
            "params": [parameter for _, parameter in members[rule.name]],
        }
        for rule in rules
        if rule.name in members
    ]
    return HymbaOptimizer(groups, config)
