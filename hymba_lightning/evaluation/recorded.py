"""Scoring passes that a CUDA graph replays: the host then launches one graph instead of some thousand kernels.

Sources: the CUDA programming guide on graphs; `torch.cuda.CUDAGraph`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.model.gradients import MOST_GRAPHS, GraphRecordingError
from hymba_lightning.model.hymba import HymbaState
from hymba_lightning.model.mixer import LayerState

# Calls of a kind before it is recorded: they compile, tune and load whatever the graph will hold.
CALLS_BEFORE_RECORDING = 3
# So many kinds are counted: a stream of ever new ones repeats none.
MOST_KINDS = 32


@dataclass
class _Recording:
    """A graph's replay, and the tensors that it reads and writes."""

    replay: Callable[[], None]
    inputs: Tensor
    targets: Tensor
    state: HymbaState | None
    result: Any


class RecordedForward:
    """Calls `forward` without gradients, and replays a graph of what comes again.

    Calls are of a kind where shapes and the state's position agree. A carried state is turned back to position 0 now
    and then, so that a stream cut into pieces of one length has few kinds; up to `MOST_GRAPHS` of them are recorded.

    Args:
        forward: A network, or what is called in its place. Weights must change in place only.
        record: Whether to record at all, which needs a GPU.
    """

    def __init__(self, forward: Callable[..., Any], *, record: bool) -> None:
        self._forward, self._record_graphs = forward, record
        self._calls: dict[tuple[Any, ...], int] = {}
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, inputs: Tensor, targets: Tensor, *, state: HymbaState | None = None, **options: Any) -> Any:
        """As `forward`; the result is the caller's own."""
        if self._record_graphs:
            # As a recording's own: kernels may be tuned anew for other strides, which no graph holds.
            inputs, targets, state = owned(inputs), owned(targets), owned(state)
        given = options if state is None else options | {"state": state}
        kind = (tuple(inputs.shape), *options.items(), *_kind_of(state))
        recorded = self._recordings.get(kind)
        if recorded is None and self._is_due(kind, state):
            recorded = self._recordings[kind] = self._record(inputs, targets, given)
        if recorded is None:
            return self._forward(inputs, targets, **given)
        recorded.inputs.copy_(inputs, non_blocking=True)
        recorded.targets.copy_(targets, non_blocking=True)
        if recorded.state is not None:
            assert state is not None
            torch._foreach_copy_(recorded.state.tensors(), state.tensors())
        recorded.replay()
        return owned(recorded.result)

    def _is_due(self, kind: tuple[Any, ...], state: HymbaState | None) -> bool:
        """Whether a call of this kind is to be recorded now; counts it."""
        per_row = state is not None and isinstance(state.position, Tensor)
        full = len(self._recordings) >= MOST_GRAPHS or (kind not in self._calls and len(self._calls) >= MOST_KINDS)
        if not self._record_graphs or per_row or full:
            return False
        self._calls[kind] = self._calls.get(kind, 0) + 1
        return self._calls[kind] > CALLS_BEFORE_RECORDING

    def _record(self, inputs: Tensor, targets: Tensor, given: dict[str, Any]) -> _Recording:
        inputs, targets, state = inputs.clone(), targets.clone(), owned(given.get("state"))
        if state is not None:
            given = given | {"state": state}
        if self._pool is None:
            # One graph runs after another, and what it leaves is copied at once: they may share their memory.
            self._pool = torch.cuda.graph_pool_handle()
        try:
            replay, result = capture(lambda: self._forward(inputs, targets, **given), self._pool)
        except RuntimeError as error:
            raise GraphRecordingError(
                f"scoring {inputs.size(0)} × {inputs.size(1)} tokens cannot be recorded as a CUDA graph: set "
                f"model.cuda_graph to false, or another backend in model.runtime ({error})"
            ) from error
        return _Recording(replay, inputs, targets, state, result)


def capture(compute: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """What repeats `compute` on the same tensors, and its result, which every repetition overwrites."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = compute()
    return graph.replay, result


def _kind_of(state: HymbaState | None) -> tuple[Any, ...]:
    return () if state is None else (str(state.position), *(tuple(tensor.shape) for tensor in state.tensors()))


def owned(result: Any) -> Any:
    """`result` with a copy of every tensor in it."""
    if isinstance(result, Tensor):
        return result.clone(memory_format=torch.contiguous_format)
    if isinstance(result, HymbaState | LayerState):
        return type(result)(*map(owned, result))
    if isinstance(result, list | tuple):
        return type(result)(map(owned, result))
    return result
