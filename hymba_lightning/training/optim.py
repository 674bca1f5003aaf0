"""The optimizer of the network: one rule for its matrices, Adam for the rest, as one `torch.optim.Optimizer`.

One object, because Lightning's automatic optimization (gradient accumulation, clipping, resume, `global_step`) takes
exactly one.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.training.optim_config import OptimizerConfig
from hymba_lightning.training.optimizers import optimizer_class
from hymba_lightning.training.param_groups import assign_parameters, build_rules

__all__ = ["HymbaOptimizer", "OptimizerConfig", "build_optimizer"]


class HymbaOptimizer(Optimizer):
    """A rule of its own for the groups that it takes, and Adam for the others, behind one optimizer.

    Every parameter group has `name`, `algorithm` (the rule's, "adam" or "none"), `base_lr` and `lr`. Groups of
    algorithm "none" are not updated but have their gradients cleared. The Adam groups and their state are shared with a
    `torch.optim.AdamW`, whose own kernels (fused on CUDA, foreach elsewhere) do the work.

    An optimizer of one's own is a file in optimizers/ with a subclass `Optimizer` of this, which gives `update` and
    whatever differs of the rest.

    Args:
        groups: dictionaries with the keys above and `params`; without `lr` it is `base_lr`.
        config: the numbers that are the same for all groups.

    Raises:
        ValueError: a group lacks a key, or config.options has a name that the optimizer does not know.
    """

    algorithm: ClassVar[str] = "adam"
    """What its own rule is called."""
    takes: ClassVar[tuple[str, ...]] = ("matrices",)
    """Names of the groups that its own rule updates."""
    matrix_lr: ClassVar[float]
    """The matrices' learning rate where config.matrix_lr is None."""
    options: ClassVar[dict[str, float]] = {}
    """What config.options may set, with the defaults."""
    float32_state: ClassVar[tuple[str, ...]] = ()
    """Keys of its own state that stays float32 whatever dtype the parameters have."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        for group in groups:
            missing = {"name", "algorithm", "base_lr", "params"} - group.keys()
            if missing:
                raise ValueError(f"optimizer group {group.get('name')!r} lacks {sorted(missing)}")
            group.setdefault("lr", group["base_lr"])
            group.setdefault("base_weight_decay", group.get("weight_decay", 0.0))
        unknown = sorted(set(config.options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise ValueError(f"optimizer.options has {', '.join(unknown)}, and {config.name!r} takes {known}")
        self.rule = self.prepare([group for group in groups if group["name"] in self.takes], config)
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": 0.0})
        self._decay_with_lr = config.decay_with_lr
        self._adam = torch.optim.AdamW(
            self.groups_of("adam"), lr=0.0, betas=config.adam_betas, eps=config.adam_eps, weight_decay=0.0
        )
        self._share_with_adam()

    def prepare(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> Any:
        """Whatever `update` needs, kept as `rule`; what is put into its `groups` is kept there. By default the numbers
        of `options` as they are set."""
        return self.options | config.options

    def update(self, group: dict[str, Any]) -> None:
        """Moves the parameters of a group of its own that have a gradient, by `lr` and `weight_decay` of the group;
        what must last is kept in `self.state[parameter]`."""
        raise NotImplementedError

    def set_schedule(self, lr_scale: float, momentum: float) -> None:
        """Set every learning rate to `base_lr * lr_scale`, and Muon's momentum; under `decay_with_lr` every weight
        decay to `base_weight_decay * lr_scale`."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
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
        if self.algorithm != "adam":
            for group in self.groups_of(self.algorithm):
                self.update(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; settings of the groups stay what they are here.

        Raises:
            ValueError: the groups' names, sizes or algorithms are not those of this optimizer.
        """
        ours = [(group["name"], len(group["params"])) for group in self.param_groups]
        theirs = [(group.get("name"), len(group["params"])) for group in state_dict["param_groups"]]
        if ours != theirs:
            raise ValueError(
                f"the checkpoint's optimizer groups {theirs} are not this run's {ours}; "
                "resume with the network and optimizer switches that the checkpoint was made with"
            )
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if saved.get("algorithm", group["algorithm"]) != group["algorithm"]:
                raise ValueError(
                    f"the checkpoint's optimizer updates {group['name']} by {saved['algorithm']}, this run's by "
                    f"{group['algorithm']}: resume with the model.optimizer.name that it was made with"
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
                for key in self.float32_state:
                    if key in state:
                        # The base class casts state to the parameter's dtype.
                        buffer = state_dict["state"][index][key]
                        state[key] = buffer.detach().to(parameter.device, copy=True)
                if "step" in state:
                    # Fused kernels count on the parameter's device, foreach on the CPU.
                    state["step"] = state["step"].to(parameter.device if group["fused"] else "cpu")

    def __getstate__(self) -> dict[str, Any]:
        own = {"rule": self.rule, "_adam": self._adam, "_decay_with_lr": self._decay_with_lr}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_adam" in self.__dict__:
            self._share_with_adam()

    def groups_of(self, algorithm: str) -> list[dict[str, Any]]:
        """The groups that an algorithm updates."""
        return [group for group in self.param_groups if group["algorithm"] == algorithm]

    def _share_with_adam(self) -> None:
        self._adam.param_groups = self.groups_of("adam")
        self._adam.state = self.state

    def _choose_kernels(self) -> None:
        for group in self._adam.param_groups:
            on_cuda = all(p.is_cuda for p in group["params"])
            group["fused"], group["foreach"] = on_cuda, not on_cuda


def build_optimizer(net: nn.Module, config: OptimizerConfig) -> HymbaOptimizer:
    """Group a network's parameters by role and build their optimizer.

    Args:
        net: its parameters have roles.
        config: which optimizer, learning rates and switches.

    Raises:
        RoleError: a parameter has no role.
        ParameterGroupError: a parameter belongs to no group, or a group that must not be empty is.
    """
    tied = Role.HEAD not in roles_of(net).values()
    rules = build_rules(tied=tied, train_conv=config.train_conv, dynamics_in_muon=config.dynamics_in_muon)
    members = assign_parameters(net, rules)
    kind = optimizer_class(config.name)
    base_lr = {
        "embed": config.embed_lr if config.embed_lr is not None else (0.02 if tied else 0.6),
        "head": config.head_lr,
        "conv": config.conv_lr,
        "untrained": 0.0,
        "dynamics": config.dynamics_lr,
        "matrices": kind.matrix_lr if config.matrix_lr is None else config.matrix_lr,
        "scalars": config.scalar_lr,
    }
    groups = [
        {
            "name": rule.name,
            "algorithm": "none" if not rule.trained else kind.algorithm if rule.name in kind.takes else "adam",
            "base_lr": base_lr[rule.name],
            "weight_decay": {"matrices": config.weight_decay, "embed": config.embed_decay}.get(rule.name, 0.0),
            "params": members[rule.name],
        }
        for rule in rules
        if rule.name in members
    ]
    return kind(groups, config)
