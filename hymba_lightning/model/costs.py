"""Floating-point operations of a network, in a file of their own because no evaluation needs them."""

from __future__ import annotations

from hymba_lightning.model.hymba import Hymba
from hymba_lightning.model.roles import Role, roles_of


def matmul_params(net: Hymba) -> int:
    """Weights that every token is multiplied with, the head included (the N of the 6·N FLOP rule); what several layers
    share counts in each."""
    roles = roles_of(net)
    head = Role.HEAD if Role.HEAD in roles.values() else Role.EMBEDDING
    multiplied = (Role.MATRIX, Role.DYNAMICS_MATRIX, head)
    return sum(p.numel() for name, p in net.named_parameters(remove_duplicate=False) if roles[name] in multiplied)


def train_flops_per_token(net: Hymba, seq_len: int) -> float:
    """Floating-point operations a training token needs, forward and backward, without recomputation.

    Matrix products 6·N, attention 6·(widths of queries and outputs)·(mean keys seen), and three times what a recurrent
    branch needs forward.
    """
    total = 6.0 * matmul_params(net)
    widths = net.config.d_model + net.config.n_heads * net.config.value_dim
    for block in net.layers:
        span = min(block.attn.window or seq_len, seq_len)
        keys = span - span * (span - 1) / (2 * seq_len)
        total += 6 * widths * keys + 3 * block.attn.branch_flops()
    return total
