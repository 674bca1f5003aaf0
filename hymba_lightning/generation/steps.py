"""A text that goes on token by token: the network's state handed on and, on a GPU, a token's step replayed from a CUDA
graph. The host then launches one graph instead of some hundred or thousand kernels, which is what a token costs there.

A graph reads and writes the same memory each time, so a state's shapes must not change. Keys that are still to come get
room in front of those there are: padding, hidden as that of shorter rows is. B rows, P kept keys, D d_model,
V vocab_size.

Sources: the CUDA programming guide on graphs; `torch.cuda.CUDAGraph`.
"""

from __future__ import annotations

import logging
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.evaluation.carried import REBASE_AT, read
from hymba_lightning.generation.rows import select
from hymba_lightning.model import Hymba
from hymba_lightning.model.gradients import GraphRecordingError
from hymba_lightning.model.hymba import HymbaState
from hymba_lightning.model.mixer import LayerState
from hymba_lightning.model.one_token import OneToken, serves, written_anywhere
from hymba_lightning.model.watch import Watch, has_hooks

logger = logging.getLogger("hymba_lightning")

# Tokens that come before a graph is recorded, which takes as long as some more; twice as many before every next one.
STEPS_BEFORE_RECORDING = 3
# Calls before the recording itself: they compile, tune and load whatever the graph will hold.
CALLS_BEFORE_RECORDING = 2
# Keys that a graph has room for where more may come: then another is recorded.
ROOM = 1024
# Threads that generate at the same time record one after another: torch allows one recording in a process.
RECORDING = threading.Lock()


class Steps:
    """What was read so far, and how it goes on.

    Args:
        net: The network, in eval mode. Weights that are changed or replaced between tokens count from the next one on,
            but for those that are written through `parameter.data` (peft's merging): for these call `renew`.
        state: After the tokens before; None: nothing was read.
        fixed: Whether steps of one token are made in memory that stays where it is, and recorded on a GPU. Default: on
            a GPU, unless the network's `runtime.step_graphs` says no.
    """

    def __init__(self, net: Hymba, state: HymbaState | None = None, fixed: bool | None = None) -> None:
        self.net, self._state, self._given = net, state, fixed
        self._fixed: FixedStep | None = None
        # The step that a CPU has for single tokens, the state being in it while it `_runs`.
        self._one: OneToken | None = None
        self._runs = False
        self.renew()

    @property
    def state(self) -> HymbaState | None:
        """After all tokens so far. What is set is gone on from."""
        if self._one is not None and self._runs:
            return _owned(self.net.compact(self._one.state(), REBASE_AT))
        return self._state if self._fixed is None else self._fixed.state()

    @state.setter
    def state(self, state: HymbaState | None) -> None:
        self._state, self._fixed, self._runs, self._waited = state, None, False, 0

    def renew(self) -> None:
        """Makes anew, with the next token, whatever was made of the network."""
        self.state = self.state
        self._one = None
        self._on_gpu = self.net.tok_emb.weight.device.type == "cuda"
        self._may_fix = _is_recordable(self.net) if self._given is None else self._given
        self._may_fit = not (self._on_gpu or self._may_fix)
        self._wait = STEPS_BEFORE_RECORDING

    def select(self, rows: list[int]) -> None:
        """Goes on with some of the rows, which may come more than once."""
        state = self.state
        assert state is not None
        self.state = select(state, rows)

    @property
    def held(self) -> HymbaState | None:
        """`state` for a look at its rows and layers: keys may have padding, and the next token may overwrite it."""
        if self._one is not None and self._runs:
            return self._one.state()
        return self._state if self._fixed is None else self._fixed.held

    @property
    def rows(self) -> int | None:
        """B of the state; None before anything was read."""
        if self._one is not None and self._runs:
            return self._one.rows
        state = self._state if self._fixed is None else self._fixed.held
        return None if state is None else state.last_id.size(0)

    @property
    def is_recorded(self) -> bool:
        """Whether the next token's step is replayed from a graph."""
        return self._fixed is not None and self._fixed.graph is not None

    @torch.no_grad()
    def read(self, tokens: Tensor, piece_tokens: int) -> Tensor:
        """Feeds tokens (B, n), n >= 1, in pieces; returns the last ones' logits (B, V)."""
        begun = self._fixed is not None or self._runs or self._state is not None
        if begun and tokens.size(1) == 1:
            return self.net.logits(self.hidden(tokens))[:, 0]
        logits_BV, self.state = read(self.net, tokens, self.state, piece_tokens)
        self._wait = STEPS_BEFORE_RECORDING
        return logits_BV

    @torch.no_grad()
    def hidden(self, tokens_B1: Tensor) -> Tensor:
        """Feeds one token of each row, which follow others; returns the last block's output (B, 1, D)."""
        if tokens_B1.size(0) != self.rows:
            raise ValueError(f"{tokens_B1.size(0)} tokens were given for {self.rows} rows: give one a row")
        if self._fixed is not None and self._fixed.watch.is_replaced:
            self.renew()
        if self._fixed is not None and not self._fixed.has_room:
            self.state = self._fixed.state()
        if torch.is_autocast_enabled(tokens_B1.device.type):
            # It rounds weights as they are used, which copies of them do not know, and frees what a graph would hold.
            self.state = self.state
            return self._read_as_ever(tokens_B1)
        if self._fixed is None and self._may_fix:
            self._waited += 1
            if self._waited > self._wait:
                self._fix()
        if self._fixed is not None:
            return self._fixed.run(tokens_B1)
        if self._may_fit and self._fits():
            assert self._one is not None
            return self._one.hidden(tokens_B1)
        return self._read_as_ever(tokens_B1)

    def _read_as_ever(self, tokens_B1: Tensor) -> Tensor:
        hidden_B1D, after = self.net.hidden(tokens_B1, self._state, return_state=True)
        assert after is not None
        self._state = self.net.compact(after, REBASE_AT)
        return hidden_B1D

    def _fits(self) -> bool:
        """Whether the step for single tokens is made and has the state."""
        if self._one is not None and self._one.is_stale:
            self.renew()
        if self._one is not None and self._runs and self._one.position >= REBASE_AT:
            self.state = self.state
        if self._runs:
            return True
        if self._one is None:
            self._may_fit = serves(self.net)
            if not self._may_fit:
                return False
            self._one = OneToken(self.net)
        assert self._state is not None
        if self._one.load(self._state):
            self._state, self._runs = None, True
        return self._runs

    def _fix(self) -> None:
        assert self._state is not None
        try:
            fixed = FixedStep(self.net, self._state)
            if self._on_gpu:
                with RECORDING:
                    fixed.record()
        except Exception as error:
            # No recording is worth a text: memory, a named backend that takes no padding, a compiler. Nothing was read
            # by it, so the state is as it was, and what else is wrong the ordinary step tells.
            logger.warning("new tokens are read without a CUDA graph, more slowly: %s", error)
            self._may_fix = False
            return
        self._fixed, self._state = fixed, None
        self._wait *= 2


class FixedStep:
    """The step of one token a row, whose tensors stay where they are: each call reads the state and overwrites it.

    A layer whose keys may become more keeps them behind padding, at most `ROOM` keys' or up to its window.

    Raises GraphRecordingError where a step changes more of the state's shapes than the number of keys.
    """

    @written_anywhere()
    def __init__(self, net: Hymba, state: HymbaState) -> None:
        self.net, self.watch = net, Watch(net)
        self.graph: torch.cuda.CUDAGraph | None = None
        # A layer without keys reads another's, or sees its own token alone: it stays without.
        self._wanted, self._grows = [], []
        for index, layer in enumerate(state.layers):
            kept, window = layer.keys.size(1), net.config.window_of(index)
            most = kept if not kept else kept + ROOM if window is None else min(kept + ROOM, window - 1)
            self._wanted.append(most)
            self._grows.append(kept > 0 and (window is None or most < window - 1))
        self._has_hidden = [layer.hidden is not None for layer in state.layers]
        self._masked = [
            layer.hidden is not None or layer.keys.size(1) < most
            for layer, most in zip(state.layers, self._wanted, strict=True)
        ]
        self._tokens_B1 = state.last_id.clone()
        self._hidden_B1D = torch.empty(0)
        self.held = _owned(self._padded(state))
        self.load(state)

    def load(self, state: HymbaState) -> None:
        """Goes on from `state`, which has the shapes of the first one or of one that came of it."""
        _write(self.held, self._padded(state))
        self._padding = [most - layer.keys.size(1) for most, layer in zip(self._wanted, state.layers, strict=True)]
        self._room = min((n for n, grows in zip(self._padding, self._grows, strict=True) if grows), default=None)
        self._first_position, self._steps = state.position, 0
        self._furthest = int(torch.as_tensor(state.position).max())

    @property
    def has_room(self) -> bool:
        """Whether another token's keys have a place."""
        return self._room is None or self._steps < self._room

    @torch.no_grad()
    def run(self, tokens_B1: Tensor) -> Tensor:
        """The last block's output (B, 1, D) for the next tokens."""
        self._tokens_B1.copy_(tokens_B1)
        if self.graph is None:
            self._hidden_B1D = self._compute()
        else:
            self.graph.replay()
        self._steps += 1
        hidden_B1D = self._hidden_B1D.clone()
        if self._furthest + self._steps >= REBASE_AT:
            self.load(self.net.compact(self.state(), REBASE_AT))
        return hidden_B1D

    @torch.no_grad()
    def state(self) -> HymbaState:
        """After the tokens so far, in memory of its own and without the padding."""
        layers = [self._without_padding(index, layer) for index, layer in enumerate(self.held.layers)]
        position = self._first_position
        position = self.held.position if isinstance(position, Tensor) else position + self._steps
        return _owned(self.held._replace(layers=layers, position=position))

    @written_anywhere()
    def record(self) -> None:
        """Records the graph; the state stays what it is. Raises GraphRecordingError where that is not possible."""
        before = _owned(self.held)
        for _ in range(CALLS_BEFORE_RECORDING):
            self._compute()
        device = self._tokens_B1.device
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # torch's own stream for recording is of the device that was current first; another's kernels it would miss.
        stream = torch.cuda.Stream(device)
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._hidden_B1D = self._compute()
        except RuntimeError as error:
            raise GraphRecordingError(
                "the step of one token cannot be recorded as a CUDA graph: set the runtime's step_graphs to false, or "
                f"choose another backend ({error})"
            ) from error
        _write(self.held, before)
        self.graph = graph

    def _compute(self) -> Tensor:
        hidden_B1D, after = self.net.hidden(self._tokens_B1, self.held, return_state=True)
        assert after is not None
        layers = [self._cut(index, layer) for index, layer in enumerate(after.layers)]
        _write(self.held, after._replace(layers=layers))
        return hidden_B1D

    def _padded(self, state: HymbaState) -> HymbaState:
        """With the padding that leaves room, and each row's position."""
        layers = []
        for layer, most, masked in zip(state.layers, self._wanted, self._masked, strict=True):
            missing = most - layer.keys.size(1)
            keys, values = (F.pad(kept, (0, 0, 0, 0, missing, 0)) for kept in (layer.keys, layer.values))
            hidden_B = torch.zeros_like(state.last_id[:, 0]) if layer.hidden is None else layer.hidden
            layers.append(LayerState(keys, values, layer.recurrent, hidden_B + missing if masked else None))
        position = state.position
        if not isinstance(position, Tensor):
            position = torch.full_like(state.last_id[:, 0], position)
        return state._replace(layers=layers, position=position)

    def _cut(self, index: int, layer: LayerState) -> LayerState:
        """A layer after a step, without the keys in front that do not fit any more."""
        extra = max(layer.keys.size(1) - self._wanted[index], 0)
        hidden_B = None if layer.hidden is None else (layer.hidden - extra).clamp_min(0)
        return layer._replace(keys=layer.keys[:, extra:], values=layer.values[:, extra:], hidden=hidden_B)

    def _without_padding(self, index: int, layer: LayerState) -> LayerState:
        padding = max(self._padding[index] - self._steps, 0)
        hidden_B = (layer.hidden - padding).clamp_min(0) if layer.hidden is not None else None
        return layer._replace(
            keys=layer.keys[:, padding:],
            values=layer.values[:, padding:],
            hidden=hidden_B if self._has_hidden[index] else None,
        )


def _is_recordable(net: Hymba) -> bool:
    """Whether a graph would hold all that a step does: on one GPU, and for nobody who looks on, as hooks do."""
    devices = {weight.device for weight in net.parameters()}
    return net.runtime.step_graphs and len(devices) == 1 and devices.pop().type == "cuda" and not has_hooks(net)


def _tensors(state: HymbaState) -> list[Tensor]:
    assert isinstance(state.position, Tensor)
    return [*state.tensors(), state.position]


def _write(state: HymbaState, new: HymbaState) -> None:
    """Copies `new` over the tensors of `state`, where that changes neither shapes nor dtypes."""
    own, others = _tensors(state), _tensors(new)
    if [(x.shape, x.dtype) for x in own] != [(x.shape, x.dtype) for x in others]:
        raise GraphRecordingError("a token changes the shapes of the network's state")
    torch._foreach_copy_(own, others)


def _owned(state: HymbaState) -> HymbaState:
    """A copy of every tensor."""
    layers = [
        LayerState(
            layer.keys.clone(),
            layer.values.clone(),
            tuple(part.clone() for part in layer.recurrent),
            None if layer.hidden is None else layer.hidden.clone(),
        )
        for layer in state.layers
    ]
    return HymbaState(
        layers,
        state.last_id.clone(),
        state.last_vector.clone(),
        state.position.clone() if isinstance(state.position, Tensor) else state.position,
        None if state.doc_tokens is None else state.doc_tokens.clone(),
    )
