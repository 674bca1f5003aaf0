"""Which parameter belongs to which optimizer group: an ordered table of roles, first match wins.

A parameter without a role and a group that must have parameters but has none are errors: nothing goes untrained in
silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hymba_lightning.model.roles import Role, roles_of


class ParameterGroupError(ValueError):
    """A parameter that no group claims, or a required group without parameters."""


@dataclass(frozen=True)
class GroupRule:
    """One row of the table: the parameters of `roles` form the group `name`."""

    name: str
    """Group name, as it appears in `optimizer.param_groups` and in the logs."""
    roles: tuple[Role, ...]
    """Roles it claims."""
    required: bool = True
    """Whether an empty group is an error; one that may be empty, and is so, is left out."""
    trained: bool = True
    """False for parameters that are deliberately left untrained."""
    matrices_only: bool = False
    """Whether it claims two-dimensional parameters only."""


def build_rules(*, tied: bool, train_conv: bool, dynamics_in_muon: bool) -> list[GroupRule]:
    """The table for a network.

    Args:
        tied: the head shares the token table, so that there is no head group.
        train_conv: False leaves the conv weights in an explicit untrained group, a defect of the reference.
        dynamics_in_muon: True puts A_log and the dt projection among the matrices, a defect of the reference.
    """
    dynamics = (Role.DYNAMICS, Role.DYNAMICS_MATRIX)
    rules = [GroupRule("embed", (Role.EMBEDDING,))]
    if not tied:
        rules.append(GroupRule("head", (Role.HEAD,)))
    conv = "conv" if train_conv else "untrained"
    rules.append(GroupRule(conv, (Role.CONVOLUTION,), required=False, trained=train_conv))
    if dynamics_in_muon:
        rules.append(GroupRule("matrices", (Role.MATRIX, *dynamics), matrices_only=True))
    else:
        rules.append(GroupRule("dynamics", dynamics, required=False))
        rules.append(GroupRule("matrices", (Role.MATRIX,)))
    rules.append(GroupRule("scalars", (Role.CONTROL, Role.SCALAR, Role.TABLE, Role.DYNAMICS)))
    return rules


def assign_parameters(net: nn.Module, rules: list[GroupRule]) -> dict[str, list[nn.Parameter]]:
    """Sort a network's parameters into the groups of `rules`, a shared one under its first name.

    Returns:
        group name -> parameters, in the order of `rules`; groups that may be empty and are so are left out.

    Raises:
        RoleError: a parameter has no role.
        ParameterGroupError: no group claims a parameter, or a required group is empty.
    """
    groups: dict[str, list[nn.Parameter]] = {rule.name: [] for rule in rules}
    roles = roles_of(net)
    for name, parameter in net.named_parameters():
        rule = next((r for r in rules if roles[name] in r.roles and (parameter.ndim == 2 or not r.matrices_only)), None)
        if rule is None:
            raise ParameterGroupError(f"no optimizer group claims {name}, a parameter for {roles[name].value}")
        groups[rule.name].append(parameter)
    for rule in rules:
        if rule.required and not groups[rule.name]:
            wanted = " or ".join(role.value for role in rule.roles)
            raise ParameterGroupError(f"optimizer group {rule.name!r} is empty: the network has no {wanted} parameter")
    return {name: members for name, members in groups.items() if members}
