"""A loss with its gradients, on a GPU replayed from a CUDA graph: the host then launches one graph instead of some
thousand kernels, and no longer holds the GPU up.

Sources: the CUDA programming guide on graphs; `torch.cuda.CUDAGraph`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Calls with a shape before it is recorded: they compile, tune and load whatever the graph will hold.
CALLS_BEFORE_RECORDING = 3
# Every graph keeps the activations of its shape; a loader of ever new lengths must not fill the memory with them.
MOST_GRAPHS = 4
# Every sum begins at a multiple of so many elements: behind one that did not, kernels would read number by number.
GRAIN = 32


class GraphRecordingError(RuntimeError):
    """A step does something that a CUDA graph cannot hold."""


@dataclass
class _Graph:
    """A recording, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    loss: Tensor


class Gradients:
    """Sums gradients of micro-batches in one flat buffer (for each dtype), of which every parameter's `grad` is a view.

    No hook of autograd is run, so neither is DDP's: ranks share `flat` themselves.

    Args:
        forward: (inputs, targets), both (B, T) int64, to a scalar loss.
        parameters: on one device; those of them that need a gradient are looked after. Their storage must stay where
            it is, as optimizers leave it.
        record: replay CUDA graphs, one for every shape of inputs up to `MOST_GRAPHS`; further shapes run as they come.

    Raises:
        ValueError: no parameter needs a gradient, or they are on several devices.
    """

    def __init__(
        self, forward: Callable[[Tensor, Tensor], Tensor], parameters: Sequence[Tensor], *, record: bool
    ) -> None:
        self._forward = forward
        self._parameters = [p for p in parameters if p.requires_grad]
        devices = {p.device for p in self._parameters}
        if len(devices) != 1:
            raise ValueError(f"parameters with gradients are needed on one device, not on {len(devices)}")
        self._record_graphs = record
        self._flat: list[Tensor] = []
        views: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(p.dtype for p in self._parameters):
            members = [p for p in self._parameters if p.dtype == dtype]
            sizes = [-(-p.numel() // GRAIN) * GRAIN for p in members]
            flat = members[0].new_zeros(sum(sizes))
            for p, part in zip(members, flat.split(sizes), strict=True):
                views[id(p)] = part[: p.numel()].view_as(p)
            self._flat.append(flat)
        self._views = [views[id(p)] for p in self._parameters]
        self._used: list[bool] | None = None
        self._weight = torch.ones((), device=self._parameters[0].device)
        self._calls: dict[tuple[int, ...], int] = {}
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._empty = True

    def clear(self) -> None:
        """The next call of `add` starts a new sum. To be called after every optimizer step."""
        self._empty = True

    def add(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> Tensor:
        """Adds `weight` times the gradient of the loss to every parameter's `grad`; returns the loss, detached.

        Raises:
            GraphRecordingError: with `record`, where the step cannot be recorded.
        """
        if self._empty:
            torch._foreach_zero_(self._flat)
            self._attach()
            self._empty = False
        self._weight.fill_(weight)
        # As a recording's own: a compiled forward would be compiled again for other strides, which no graph holds.
        inputs, targets = inputs.contiguous(), targets.contiguous()
        shape = tuple(inputs.shape)
        recorded = self._graphs.get(shape)
        if recorded is None and self._record_graphs and len(self._graphs) < MOST_GRAPHS:
            self._calls[shape] = self._calls.get(shape, 0) + 1
            if self._calls[shape] > CALLS_BEFORE_RECORDING:
                recorded = self._graphs[shape] = self._record(inputs, targets)
        if recorded is None:
            return self._compute(inputs, targets)
        recorded.inputs.copy_(inputs, non_blocking=True)
        recorded.targets.copy_(targets, non_blocking=True)
        recorded.graph.replay()
        return recorded.loss.clone()

    @property
    def flat(self) -> list[Tensor]:
        """All sums of a dtype in one tensor, zeros between them: what is written there every `grad` then holds."""
        return self._flat

    @property
    def shapes_recorded(self) -> list[tuple[int, ...]]:
        """Shapes of inputs whose graphs are replayed."""
        return list(self._graphs)

    def _attach(self) -> None:
        for index, (parameter, view) in enumerate(zip(self._parameters, self._views, strict=True)):
            parameter.grad = view if self._used is None or self._used[index] else None

    def _compute(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = self._forward(inputs, targets)
            gradients = torch.autograd.grad(
                loss, self._parameters, self._weight.to(loss.dtype).expand_as(loss), allow_unused=True
            )
        if self._used is None:
            self._used = [gradient is not None for gradient in gradients]
            self._attach()
        sums = [view for view, gradient in zip(self._views, gradients, strict=True) if gradient is not None]
        torch._foreach_add_(sums, [gradient for gradient in gradients if gradient is not None])
        return loss.detach()

    def _record(self, inputs: Tensor, targets: Tensor) -> _Graph:
        inputs, targets = inputs.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(inputs.device)
        try:
            # Other threads (pinning batches, watching the other ranks) may go on with what they do meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss = self._compute(inputs, targets)
        except RuntimeError as error:
            raise GraphRecordingError(
                f"forward and backward of {inputs.size(0)} × {inputs.size(1)} tokens cannot be recorded as a CUDA "
                f"graph: set model.cuda_graph to false, or another backend in model.runtime ({error})"
            ) from error
        return _Graph(graph, inputs, targets, loss)
