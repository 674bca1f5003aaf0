"""Which parameter belongs to which optimizer group: an ordered table of name patterns, first match wins.

A parameter that no pattern claims and a required group that stays empty are errors, so that a renamed module cannot
silently go untrained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

Algorithm = Literal["muon", "adam", "none"]

EMBED = ("tok_emb.weight",)
HEAD = ("lm_head.weight",)
CONV = ("*.conv1d.weight",)
# Parameters of the state-space recurrence: what sets the decay of the state.
DYNAMICS = ("*.A_log", "*.dt_proj.bias", "*.dt_proj.weight")
# The two matrices among them that a rule "two-dimensional means Muon" would orthogonalise.
DYNAMICS_MATRICES = ("*.A_log", "*.dt_proj.weight")
MATRICES = (
    "*.attn.c_q.weight",
    "*.attn.kv_proj.weight",
    "*.attn.mamba_proj.weight",
    "*.attn.x_proj.weight",
    "*.attn.mamba_out_proj.weight",
    "*.attn.proj.weight",
    "*.mlp.fc.weight",
    "*.mlp.proj.weight",
    "bigram_hash.proj.weight",
)
SCALARS = (
    "*.attn_scale",
    "*.mlp_scale",
    "*.resid_mix",
    "*.q_gain",
    "*.merge_alpha",
    "*.branch_gate",
    "*.attn.D",
    "*.conv1d.bias",
    "*.dt_proj.bias",
    "*norm.weight",
    "bigram_hash.table.weight",
    "smeargate.gate",
    "skip_weights",
    "meta_tokens",
)


class ParameterGroupError(ValueError):
    """A parameter that no group claims, or a required group without parameters."""


@dataclass(frozen=True)
class GroupRule:
    """One row of the table: the parameters that match `patterns` form the group `name`."""

    name: str
    """Group name, as it appears in `optimizer.param_groups` and in the logs."""
    algorithm: Algorithm
    """"muon", "adam", or "none" for parameters that are deliberately left untrained."""
    patterns: tuple[str, ...]
    """Shell-style patterns over full parameter names; `*` also matches dots."""
    required: bool = True
    """Whether an empty group is an error."""


def build_rules(*, tied: bool, train_conv: bool, dynamics_in_muon: bool) -> list[GroupRule]:
    """The table for a network.

    Args:
        tied: the head shares the token table, so that there is no head group.
        train_conv: False leaves the conv weights in an explicit untrained group, a defect of the reference.
        dynamics_in_muon: True orthogonalises and decays A_log and the dt projection, a defect of the reference.
    """
    rules = [GroupRule("embed", "adam", EMBED)]
    if not tied:
        rules.append(GroupRule("head", "adam", HEAD))
    rules.append(GroupRule("conv", "adam", CONV) if train_conv else GroupRule("untrained", "none", CONV))
    if dynamics_in_muon:
        rules.append(GroupRule("matrices", "muon", MATRICES + DYNAMICS_MATRICES))
    else:
        rules.append(GroupRule("dynamics", "adam", DYNAMICS))
        rules.append(GroupRule("matrices", "muon", MATRICES))
    rules.append(GroupRule("scalars", "adam", SCALARS))
    return rules


def assign_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]], rules: list[GroupRule]
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Sort parameters into the groups of `rules`.

    A leading `net.` (the LightningModule's prefix) and the `_orig_mod.` of a compiled module are ignored. A parameter
    that appears under two names is kept under its first.

    Returns:
        group name -> (parameter name, parameter) pairs, in the order of `rules`; groups that may be empty and are so
        are left out.

    Raises:
        ParameterGroupError: a parameter matches no pattern, or a required group is empty.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {rule.name: [] for rule in rules}
    unclaimed: list[str] = []
    seen: set[int] = set()
    for full_name, parameter in named_parameters:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        name = full_name.replace("_orig_mod.", "").removeprefix("net.")
        rule = next((r for r in rules if any(fnmatchcase(name, pattern) for pattern in r.patterns)), None)
        if rule is None:
            unclaimed.append(f"{name} {tuple(parameter.shape)}")
        else:
            groups[rule.name].append((name, parameter))
    if unclaimed:
        raise ParameterGroupError(
            f"no optimizer group claims {', '.join(unclaimed)}; add a pattern to training/param_groups.py"
        )
    for rule in rules:
        if rule.required and not groups[rule.name]:
            raise ParameterGroupError(
                f"optimizer group {rule.name!r} is empty: no parameter matches {', '.join(rule.patterns)}; "
                "was a module renamed?"
            )
    return {name: members for name, members in groups.items() if members}
