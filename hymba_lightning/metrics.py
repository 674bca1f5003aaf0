"""Bits per byte as a torchmetrics Metric: sums in float64, reduced over ranks once, divided at the end."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from hymba_lightning.evaluation.score import Score
from hymba_lightning.units import bits_per_byte


class BitsPerByte(Metric):
    """Σ nats / (ln 2 · Σ bytes) over all updates and ranks.

    A ratio of sums: the mean of per-batch or per-rank ratios is another number. The sums are float64 whatever
    precision the module around is cast to; on devices without float64 (MPS) they live on the CPU.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    nats: Tensor
    n_tokens: Tensor
    n_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("nats", "n_tokens", "n_bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.score: Score | None = None
        """Sums over all ranks, as of the last compute()."""

    def update(self, nats: Tensor, target_bytes: Tensor) -> None:
        """Add targets: their nats (any shape, float) and UTF-8 bytes (same shape, integer). None at all is fine.

        Raises:
            ValueError: The shapes differ, or the bytes are no integers.
        """
        if nats.shape != target_bytes.shape:
            raise ValueError(f"nats {tuple(nats.shape)} and target_bytes {tuple(target_bytes.shape)} differ in shape")
        if target_bytes.is_floating_point():
            raise ValueError(f"target_bytes counts bytes, as integers, and is {target_bytes.dtype}: nats come first")
        # Not in place: sums begun in inference mode go on outside of it.
        self.nats = self.nats + self._sum(nats)
        self.n_bytes = self.n_bytes + self._sum(target_bytes)
        self.n_tokens = self.n_tokens + nats.numel()

    def compute(self) -> Tensor:
        """Bits per byte, float64 (). Sets `score`.

        Raises:
            ValueError: The scored text has no bytes: nothing was scored, or only tokens that stand for no text.
        """
        nats, n_tokens, n_bytes = float(self.nats), int(self.n_tokens), int(self.n_bytes)
        if n_bytes == 0:
            raise ValueError(
                f"bits per byte of {n_tokens} tokens that stand for 0 bytes of text: score at least one text token "
                "(is the tokenizer the one of the shards?)"
            )
        self.score = Score(nats, n_tokens, n_bytes)
        return bits_per_byte(self.nats, self.n_bytes)

    def reset(self) -> None:
        """Forget all updates."""
        super().reset()
        self.score = None

    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """The sums stay float64: 'bf16-true' would round them to three digits."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def move(state: Tensor) -> Tensor:
            device = fn(torch.zeros((), device=state.device)).device
            return state.to("cpu" if device.type == "mps" else device)

        return super()._apply(move, exclude_state)

    def _sum(self, values: Tensor) -> Tensor:
        return values.detach().to(self.nats.device).double().sum()
