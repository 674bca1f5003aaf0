"""Checks, then times, on a GPU the kernels made of matrix products: attention, the MLP, Newton-Schulz.

Muon's passes around the last are checked only.

B batch, T sequence, H query heads, G kv heads, K head_dim; M tokens, D width, F hidden width; n matrices of R x C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.ops.leaky_square_mlp import available_backends as mlp_backends
from hymba_lightning.ops.leaky_square_mlp import leaky_square_mlp
from hymba_lightning.ops.leaky_square_mlp import triton_launches as mlp_triton
from hymba_lightning.ops.muon_passes import Update, passes, plan_banks
from hymba_lightning.ops.newton_schulz import newton_schulz_step
from hymba_lightning.ops.newton_schulz import triton_launches as schulz_triton
from hymba_lightning.ops.prefix_window import prefix_window_attention
from hymba_lightning.ops.sliding_window import available_backends as attention_backends
from hymba_lightning.ops.sliding_window import sliding_window_attention
from hymba_lightning.ops.testing import rms_ratio
from hymba_lightning.ops.triton_check import Inputs, compare, forward_and_backward, fresh_memory_is_nan, median_ms

SLOPE = 0.5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Larger than a bank's own rounding to bfloat16 between the products.
SCHULZ_TOLERANCE = 1e-2
# A bank's number that is rounded the other way moves a weight by a hundredth of a thousandth.
MUON_TOLERANCE = 1e-5
# B, T, S, H, G, K, window
ATTENTIONS = (
    (2, 1000, 1000, 8, 4, 64, 512),
    (1, 700, 1211, 8, 4, 64, 512),
    (2, 300, 340, 4, 1, 64, 100),
    (1, 513, 513, 2, 2, 128, None),
    (2, 1, 300, 8, 4, 64, 300),
    (2, 130, 130, 4, 2, 64, 1),
)
# B, T, S, H, G, K, V, window, prefix
PREFIXES = (
    (1, 3000, 3000, 25, 5, 64, 128, 1025, 128),
    (2, 700, 1852, 25, 5, 64, 128, 1025, 128),
    (2, 1, 1153, 25, 5, 64, 128, 1025, 128),
    (1, 300, 300, 4, 2, 64, 64, 33, 5),
)
# M, D, F
MLPS = ((700, 512, 2048), (45, 24, 72), (1, 8, 8), (65536, 512, 2048))
# n, R, C
BANKS = ((14, 512, 2048), (7, 512, 1024), (25, 512, 512), (7, 48, 512), (3, 45, 67), (2, 1, 300))
TRAINING_ATTENTION = (2, 32768, 32768, 8, 4, 64, 512)
# Launches of the MLP's kernels; both have the tiles' columns in common.
MLP_SWEEP = tuple(
    mlp_triton.Launch(*options)
    for options in (
        ((128, 128, 64), 2, True, 8, 3),
        ((128, 128, 64), 2, False, 8, 2, 128),
        ((128, 128, 32), 2, True, 8, 3, 128),
        ((128, 128, 32), 2, False, 8, 3, 128),
        ((128, 128, 64), 1, True, 8, 4),
        ((256, 128, 64), 1, True, 8, 3),
        ((128, 128, 64), 16, False, 8, 2, 128),
        ((64, 128, 64), 3, True, 4, 3, 168),
    )
)
# Block, inner block, warps, stages, registers of a thread.
SCHULZ_SWEEP = (
    (128, 64, 8, 3, 128),
    (128, 64, 8, 4, 128),
    (128, 64, 4, 3, 255),
    (128, 32, 8, 4, 128),
    (64, 64, 4, 4, 128),
)


def attention_inputs(batch: int, queries: int, keys: int, heads: int, kv_heads: int, width: int) -> Inputs:
    """Random operands, bfloat16, v being a slice of a wider tensor as in the network."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    v = normal(batch, keys, 3 * kv_heads * width)[..., kv_heads * width : 2 * kv_heads * width]
    return {
        "q": normal(batch, queries, heads, width),
        "k": normal(batch, keys, kv_heads, width),
        "v": v.unflatten(-1, (kv_heads, width)),
    }


def run_attention(i: Any, window: int | None, backend: str) -> tuple[Tensor]:
    """The output alone."""
    return (sliding_window_attention(i["q"], i["k"], i["v"], window=window, backend=backend),)


def prefix_inputs(batch: int, queries: int, keys: int, heads: int, kv_heads: int, width: int, value: int) -> Inputs:
    """Random operands, bfloat16."""
    shapes = {
        "q": (batch, queries, heads, width),
        "k": (batch, keys, kv_heads, width),
        "v": (batch, keys, kv_heads, value),
    }
    return {name: torch.randn(*shape, device="cuda").bfloat16() for name, shape in shapes.items()}


def run_prefix(i: Any, window: int, prefix: int, backend: str) -> tuple[Tensor]:
    """The output alone."""
    return (prefix_window_attention(i["q"], i["k"], i["v"], window=window, prefix=prefix, backend=backend),)


def mlp_inputs(tokens: int, width: int, hidden: int) -> Inputs:
    """Random operands, bfloat16."""
    shapes = {"x": (tokens, width), "w_in": (hidden, width), "w_out": (width, hidden)}
    return {
        name: (torch.randn(*shape, device="cuda") / (1 if name == "x" else shape[1] ** 0.5)).bfloat16()
        for name, shape in shapes.items()
    }


def run_mlp(i: Any, backend: str) -> tuple[Tensor]:
    """The output alone."""
    return (leaky_square_mlp(i["x"], i["w_in"], i["w_out"], SLOPE, backend=backend),)


def bank(matrices: int, rows: int, columns: int) -> Tensor:
    """Random matrices (n, R, C) of Frobenius norm 1, bfloat16."""
    x_nRC = torch.randn(matrices, rows, columns, device="cuda")
    return (x_nRC / x_nRC.norm(dim=(1, 2), keepdim=True)).bfloat16()


def check_schulz(shape: tuple[int, int, int]) -> bool:
    """Prints how far a step is from float64, and whether its Gram matrices are symmetric."""
    x_nRC = bank(*shape)
    x = x_nRC.double()
    gram = x @ x.mT
    a, b, c = COEFFICIENTS
    with fresh_memory_is_nan():
        found = newton_schulz_step(x_nRC, *COEFFICIENTS, backend="triton")
        square = schulz_triton._product(x_nRC, x_nRC.mT, None, 1.0, 0.0, symmetric=True)
    ratio = max(rms_ratio(found.double(), a * x + b * gram @ x + c * gram @ gram @ x), rms_ratio(square.double(), gram))
    passed = ratio <= SCHULZ_TOLERANCE and torch.equal(square, square.mT)
    print(
        f"{f'newton_schulz {shape}':<48} worst {ratio:.2e} (limit {SCHULZ_TOLERANCE:.0e}) "
        f"{'ok' if passed else 'WRONG'}",
        flush=True,
    )
    return passed


def check_muon(shape: tuple[int, int, int]) -> bool:
    """Prints how far Muon's passes over a bank, half of it tall, are from those of torch's operators."""
    matrices, rows, columns = shape
    shapes = [(rows, columns)] * (matrices - matrices // 2) + [(columns, rows)] * (matrices // 2)
    params, grads = ([torch.randn(*size, device="cuda") for size in shapes] for _ in range(2))
    banks, _ = plan_banks([p.shape for p in params], 1)
    found = {}
    for backend in ("triton", "torch"):
        moved, momenta = [p.clone() for p in params], [g.clone() for g in grads]
        update = Update(moved, grads, momenta, 0.02, 0.95, 0.1, row_normalize=True, cautious=True)
        with fresh_memory_is_nan():
            of_update = passes(update, banks, backend=backend)
            of_update.momentum()
            for one in banks:
                of_update.apply(one, of_update.bank(one, 0, matrices, torch.bfloat16).view(1, -1))
        found[backend] = [*moved, *momenta]
    ratio = max(rms_ratio(a, b) for a, b in zip(found["triton"], found["torch"], strict=True))
    passed = ratio <= MUON_TOLERANCE
    print(
        f"{f'muon_passes {shape}':<48} worst {ratio:.2e} (limit {MUON_TOLERANCE:.0e}) {'ok' if passed else 'WRONG'}",
        flush=True,
    )
    return passed


def check(quick: bool = False) -> bool:
    """Makes every comparison that can run here (with `quick`, of the first two shapes); returns whether all passed."""
    passed, count = True, 2 if quick else None
    for backend in (name for name in ("fa4", "flex", "flash", "triton") if name in attention_backends("cuda")):
        for *shape, window in ATTENTIONS[:count]:
            passed &= compare(
                f"attention {backend} {tuple(shape)} window {window}",
                functools.partial(run_attention, window=window, backend=backend),
                functools.partial(run_attention, window=window, backend="naive"),
                attention_inputs(*shape),
                torch.bfloat16,
            )
    for *shape, window, prefix in PREFIXES[:count]:
        passed &= compare(
            f"attention and prefix {tuple(shape)} window {window} prefix {prefix}",
            functools.partial(run_prefix, window=window, prefix=prefix, backend="blocked"),
            functools.partial(run_prefix, window=window, prefix=prefix, backend="naive"),
            prefix_inputs(*shape),
            torch.bfloat16,
        )
    if "triton" in mlp_backends("cuda"):
        for mlp in MLPS[:count]:
            passed &= compare(
                f"mlp {mlp}",
                functools.partial(run_mlp, backend="triton"),
                functools.partial(run_mlp, backend="torch"),
                mlp_inputs(*mlp),
                torch.bfloat16,
            )
    for bank_shape in BANKS[:count]:
        passed &= check_schulz(bank_shape)
        passed &= check_muon(bank_shape)
    return passed


def _orthogonalized(x_nRC: Tensor, backend: str) -> Callable[[], object]:
    return lambda: [newton_schulz_step(x_nRC, *COEFFICIENTS, backend=backend) for _ in range(5)]


def timings() -> None:
    """Prints forward, and with backward, of each backend at the training shapes, and five Newton-Schulz steps."""
    calls: dict[str, tuple[Callable, Inputs]] = {
        f"attention {name}": (
            functools.partial(run_attention, window=512, backend=name),
            attention_inputs(*TRAINING_ATTENTION[:6]),
        )
        for name in ("fa4", "flex", "flash", "triton")
        if name in attention_backends("cuda")
    }
    # Compiled, because the elementwise passes of plain torch are what it is compared with.
    calls |= {
        f"mlp {name}": (torch.compile(functools.partial(run_mlp, backend=name)), mlp_inputs(*MLPS[-1]))
        for name in mlp_backends("cuda")
    }
    for name, (run, inputs) in calls.items():
        forward, both = forward_and_backward(run, inputs)
        print(f"{name:<24} forward {median_ms(forward):.3f} ms, with backward {median_ms(both):.3f} ms", flush=True)
    for shape in BANKS[:4]:
        x_nRC = bank(*shape)
        times = {name: median_ms(_orthogonalized(x_nRC, name)) for name in ("triton", "torch")}
        print(
            f"newton_schulz, 5 steps of {shape}: triton {times['triton']:.3f} ms, torch {times['torch']:.3f} ms, "
            f"{times['triton'] / times['torch']:.2f}",
            flush=True,
        )


def sweep() -> None:
    """Times the kernels with other tiles and launch options."""
    i: Any = mlp_inputs(*MLPS[-1])
    g = torch.randn_like(i["x"])
    for how in MLP_SWEEP:
        mlp_triton.FORWARD = mlp_triton.BACKWARD = how
        kept = mlp_triton.hidden_layer(i["x"], i["w_in"], SLOPE)
        times = (
            median_ms(functools.partial(mlp_triton.hidden_layer, i["x"], i["w_in"], SLOPE)),
            median_ms(functools.partial(mlp_triton.hidden_layer_backward, g, i["w_out"], *kept, SLOPE)),
        )
        print(f"mlp {how}: forward {times[0]:.3f} ms, backward {times[1]:.3f} ms", flush=True)
    for block, block_k, warps, stages, registers in SCHULZ_SWEEP:
        schulz_triton.BLOCK, schulz_triton.BLOCK_K = block, block_k
        schulz_triton.OPTIONS = {
            "num_warps": warps,
            "num_stages": stages,
            "maxnreg": registers,
            "enable_fp_fusion": True,
        }
        times_by_bank = [median_ms(_orthogonalized(bank(*shape), "triton")) for shape in BANKS[:3]]
        print(
            f"newton_schulz blocks {block}, {block_k}, warps {warps}, stages {stages}, registers {registers}: "
            + ", ".join(f"{ms:.3f}" for ms in times_by_bank)
            + " ms",
            flush=True,
        )
