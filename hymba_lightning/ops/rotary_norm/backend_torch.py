"""The norm and the turn by torch's own operators, with a gradient of their own.

B batch, T sequence, H heads, K head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.registry import Backend, is_transformed


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, K) with the halves x1, x2 of its last axis turned: (x1·cos + x2·sin, x2·cos - x1·sin), by the tables
    of `rope_table`."""
    # Not put together from its halves: a compiler would write those out in the backward pass.
    halves = x_BTHK.unflatten(-1, (2, -1))
    return (halves * cos.to(x_BTHK.dtype) + halves.flip(-2) * sin.to(x_BTHK.dtype)).flatten(-2)


def rotated_norm(x_BTHK: Tensor, gain_H: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """rotate(gain·rms_norm(x)) of x (B, T, H, K), with one gain per head (H,) or None."""
    normed_BTHK = F.rms_norm(x_BTHK, x_BTHK.shape[-1:], eps=eps)
    return rotate(normed_BTHK if gain_H is None else normed_BTHK * gain_H.to(x_BTHK.dtype)[:, None], cos, sin)


class RotaryNorm(torch.autograd.Function):
    """rotate(gain·rms_norm(x)) of x (B, T, H, K), with one gain per head (H,) or None.

    Its gradient is written out because compilers do worse: the sum over a head's width that the norm's gradient needs
    is, added up over the tokens, also the gain's.
    """

    @staticmethod
    def forward(ctx, x_BTHK, gain_H, cos, sin, eps):
        """x, its gain and the tables of `rope_table` → (B, T, H, K)."""
        ctx.save_for_backward(x_BTHK, gain_H, cos, sin)
        ctx.eps = eps
        return rotated_norm(x_BTHK, gain_H, cos, sin, eps)

    @staticmethod
    def backward(ctx, g_BTHK):
        """Gradients of x and of the gain, in float32 until they are returned."""
        x_BTHK, gain_H, cos, sin = ctx.saved_tensors
        x = x_BTHK.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        normed = x * scale
        g_normed = rotate(g_BTHK.float(), cos, -sin)
        along_BTH1 = (g_normed * normed).sum(-1, keepdim=True)
        g_gain = None
        if gain_H is not None:
            scale = scale * gain_H[:, None]
            g_gain = along_BTH1.sum((0, 1, 3)).to(gain_H.dtype)
        return (scale * (g_normed - normed * (along_BTH1 / x.size(-1)))).to(x_BTHK.dtype), g_gain, None, None, None


def rotary_norm_torch(x_BTHK: Tensor, gain_H: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """By `RotaryNorm`, or its forward pass alone for torch.func to differentiate."""
    if not is_transformed():
        return RotaryNorm.apply(x_BTHK, gain_H, cos, sin, eps)  # type: ignore[no-untyped-call]
    return rotated_norm(x_BTHK, gain_H, cos, sin, eps)


BACKEND = Backend("plain PyTorch", lambda: rotary_norm_torch, plain=True, auto={"any": 10})
