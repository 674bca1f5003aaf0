"""A token's step in memory that stays where it is, as a CUDA graph needs it: the same as the ordinary step, wherever a
text is cut, for rows of any length."""

import contextlib
import logging
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from official_statement import SMALL, random_weights
from tiny import NET, lively

from hymba_lightning.evaluation import carried
from hymba_lightning.generation import steps as steps_module
from hymba_lightning.generation.rows import join, read_rows, select
from hymba_lightning.generation.sampler import SamplingConfig, generate
from hymba_lightning.generation.steps import FixedStep, Steps
from hymba_lightning.interop.official import config_from_hf, weights_from_hf
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.gradients import GraphRecordingError
from hymba_lightning.ops.registry import BackendUnavailableError

# Shorter than the window of 16, as long, and far longer.
LENGTHS = (1, 30, 5, 16, 30)
VARIANTS = {
    "window": {},
    "two windows": {"layer_windows": [4, 16]},
    "window of its own token": {"layer_windows": [1, 16]},
    "global layer": {"global_layers": [1]},
    "meta tokens and shared keys": {"meta_tokens": 3, "kv_share_every": 2},
    "mamba2": {"mixer": "mamba2", "d_state": 16},
    "documents": {"packed_documents": True, "bos_id": 5},
    "released": None,
}


def network(variant: str) -> Hymba:
    if VARIANTS[variant] is not None:
        return lively(HymbaConfig(**(NET | VARIANTS[variant]), tied_embed_std=0.3)).eval()
    config = config_from_hf(SMALL)
    net = Hymba(config)
    net.load_state_dict(weights_from_hf(config, random_weights(SMALL)))
    return net.eval()


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def net(request) -> Hymba:
    return network(request.param)


def prompts(net, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, net.config.vocab_size, (n,), generator=generator) for n in lengths]


def read_prompts(net, lengths=LENGTHS):
    """The state after prompts of these lengths, one a row."""
    return join(read_rows(net, prompts(net, lengths), [None] * len(lengths), 64)[1])


def assert_close(got, wanted, ratio=1e-5):
    """By their root mean squares: released networks' logits are large."""
    off = (got.float() - wanted.float()).square().mean().sqrt()
    assert off <= ratio * wanted.float().square().mean().sqrt() + 1e-7, float(off)


def assert_same(got, wanted):
    """Two states: the same shapes and, to rounding, values."""
    assert torch.equal(torch.as_tensor(got.position), torch.as_tensor(wanted.position))
    assert isinstance(got.position, int) == isinstance(wanted.position, int)
    assert len(got.tensors()) == len(wanted.tensors())
    for mine, theirs in zip(got.layers, wanted.layers, strict=True):
        assert (mine.hidden is None) == (theirs.hidden is None)
        assert mine.keys.shape == theirs.keys.shape
        seen = torch.ones(mine.keys.shape[:2], dtype=torch.bool)
        if mine.hidden is not None:
            assert torch.equal(mine.hidden, theirs.hidden)
            # What padding holds is nobody's business.
            seen = torch.arange(mine.keys.size(1)) >= mine.hidden[:, None]
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            if a[seen].numel():
                assert_close(a[seen], b[seen])
        for a, b in zip(mine.recurrent, theirs.recurrent, strict=True):
            assert_close(a, b)
    for a, b in zip(got.tensors()[-2:], wanted.tensors()[-2:], strict=True):
        assert_close(a, b)


def follow(net, state, given, n):
    """`n` tokens a row fed by `given` and, beside it, one by one as ever; logits compared at every step."""
    rows = state.last_id.size(0)
    for step in range(n):
        tokens = (torch.arange(rows)[:, None] * 17 + step * 5) % net.config.vocab_size
        wanted, state = carried.read(net, tokens, state, 64)
        got = given.read(tokens, 64)
        assert_close(got, wanted)
    return state


@pytest.mark.parametrize("lengths", [LENGTHS, (3,), (40, 40)], ids=["ragged", "short", "past the window"])
def test_a_fixed_step_gives_the_ordinary_steps_logits_and_state(net, lengths, monkeypatch):
    """From before the window is full until after; and the room for a global layer's keys ends on the way, twice."""
    monkeypatch.setattr(steps_module, "ROOM", 9)
    state = read_prompts(net, lengths)
    given = Steps(net, state, fixed=True)
    kinds = set()
    for _ in range(6):
        state = follow(net, state, given, 5)
        kinds.add(given._fixed is not None)
        assert_same(given.state, state)
    assert kinds == {True, False} or net.config.global_layer_set() == set()


def test_memory_stays_where_it_is(net):
    step = FixedStep(net, read_prompts(net))
    places = [tensor.data_ptr() for tensor in (step._tokens_B1, *step.held.tensors())]
    for token in range(20):
        step.run(torch.full((len(LENGTHS), 1), token))
    assert [tensor.data_ptr() for tensor in (step._tokens_B1, *step.held.tensors())] == places
    taken = step.state()
    assert not {tensor.data_ptr() for tensor in taken.tensors() if tensor.numel()} & set(places)


def test_a_state_may_be_taken_at_any_token_and_be_gone_on_from(net):
    """Rows dropped, doubled, and a longer piece read in between, as generation does it."""
    state = read_prompts(net)
    given = Steps(net, state, fixed=True)
    state = follow(net, state, given, 6)
    for rows in ([4, 2, 0], [1, 1, 2], [1]):
        state = select(state, rows)
        given.state = select(given.state, rows)
        state = follow(net, state, given, 7)
        piece = torch.arange(3).repeat(len(rows), 1)
        if isinstance(state.position, int):
            wanted, state = carried.read(net, piece, state, 2)
            assert_close(given.read(piece, 2), wanted)
        assert_same(given.state, state)


@pytest.mark.parametrize("lengths", [LENGTHS, (12, 12)], ids=["ragged", "alike"])
def test_positions_are_turned_back_as_ever(net, lengths, monkeypatch):
    for module in (carried, steps_module):
        monkeypatch.setattr(module, "REBASE_AT", 37)
    state = read_prompts(net, lengths)
    given = Steps(net, state, fixed=True)
    for _ in range(4):
        state = follow(net, state, given, 11)
        assert_same(given.state, state)
    assert int(torch.as_tensor(state.position).max()) < 44


def test_on_a_cpu_nothing_is_fixed():
    net = network("window")
    given = Steps(net, read_prompts(net))
    for _ in range(8):
        given.read(torch.zeros(len(LENGTHS), 1, dtype=torch.int64), 64)
    assert given._fixed is None
    assert not given.is_recorded


def test_a_step_that_cannot_be_fixed_is_told_once_and_goes_on(caplog, monkeypatch):
    net = network("window")
    state = read_prompts(net)
    given = Steps(net, state, fixed=True)

    def refused(*args):
        raise GraphRecordingError("a reason")

    monkeypatch.setattr(steps_module, "FixedStep", refused)
    with caplog.at_level(logging.WARNING):
        follow(net, state, given, 10)
    assert [record.getMessage() for record in caplog.records] == [
        "new tokens are read without a CUDA graph, more slowly: a reason"
    ]


def test_steps_are_recorded_on_one_gpu_and_with_nobody_looking_on():
    def placed(*devices):
        """A network whose weights say that they lie there."""
        net = network("window")
        weights = [SimpleNamespace(device=torch.device(device)) for device in devices]
        net.parameters = lambda: iter(weights)
        return net

    recordable = steps_module._is_recordable
    assert recordable(placed("cuda:1", "cuda:1"))
    assert not recordable(placed("cuda:0", "cuda:1"))
    assert not recordable(placed("cuda:0", "meta"))
    assert not recordable(placed("cpu"))
    looked_at, off = placed("cuda:0"), placed("cuda:0")
    looked_at.blocks[0].register_forward_hook(lambda *call: None)
    off.runtime = RuntimeConfig(step_graphs=False)
    assert not recordable(looked_at)
    assert not recordable(off)


class Refusal(Exception):
    """Of a compiler's, which is none of torch's own errors."""


@pytest.mark.parametrize(
    "error",
    [
        BackendUnavailableError("attention's backend takes no padding"),
        torch.cuda.OutOfMemoryError("no room"),
        Refusal("no kernel"),
    ],
    ids=["a named backend", "memory", "a compiler"],
)
def test_whatever_keeps_a_step_from_being_recorded_the_text_goes_on(error, caplog, monkeypatch):
    net = network("window")
    state = read_prompts(net)
    given = Steps(net, state, fixed=True)
    given._on_gpu = True

    def refused(self):
        raise error

    monkeypatch.setattr(FixedStep, "record", refused)
    with caplog.at_level(logging.WARNING):
        state = follow(net, state, given, 10)
    assert len(caplog.records) == 1
    assert_same(given.state, state)


def test_threads_record_one_after_another(monkeypatch):
    net = network("window")
    at_once, most, lock = [0], [0], threading.Lock()

    def record(self):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1

    monkeypatch.setattr(FixedStep, "record", record)

    def generation():
        given = Steps(net, read_prompts(net), fixed=True)
        given._on_gpu = True
        for _ in range(5):
            given.read(torch.zeros(len(LENGTHS), 1, dtype=torch.int64), 64)
        assert given._fixed is not None

    threads = [threading.Thread(target=generation) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


class Replayed:
    """In the place of a CUDA graph: computes again what was recorded, into the memory that the recording gave."""

    def __init__(self, step: FixedStep) -> None:
        self.step = step

    def replay(self) -> None:
        self.step._hidden_B1D.copy_(self.step._compute())


def test_recording_leaves_the_state_and_gives_one_place_to_the_output(net, monkeypatch):
    state = read_prompts(net)
    step = FixedStep(net, state)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Replayed(step))
    recorded = []

    def graph(graph, stream, capture_error_mode):
        recorded.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    step.record()
    # Not of whatever device is current.
    assert recorded == [f"stream of {step._tokens_B1.device}"]
    assert_same(step.state(), state)
    place = step._hidden_B1D.data_ptr()
    given = Steps(net, fixed=True)
    given._fixed = step
    assert given.is_recorded
    state = follow(net, state, given, 12)
    assert_same(given.state, state)
    assert step._hidden_B1D.data_ptr() == place


def test_what_a_graph_cannot_hold_is_told_with_the_remedy(monkeypatch):
    net = network("window")
    step = FixedStep(net, read_prompts(net))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Replayed(step))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)

    @contextlib.contextmanager
    def graph(*args, **options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(GraphRecordingError, match=r"set the runtime's step_graphs to false.*not permitted"):
        step.record()


def test_a_state_whose_shapes_change_is_refused():
    net = network("window")
    step = FixedStep(net, read_prompts(net))
    make = net.blocks[0].attn.branch

    def grown(*args, **options):
        y, (conv, scan) = make(*args, **options)
        return y, (torch.cat([conv, conv], -1), scan)

    net.blocks[0].attn.branch = grown
    with pytest.raises(GraphRecordingError, match="changes the shapes"):
        step.run(torch.zeros(len(LENGTHS), 1, dtype=torch.int64))


def test_rows_that_end_at_times_of_their_own_draw_what_they_draw_alone(net, monkeypatch):
    """Every step that can be is made in fixed memory."""
    made = Steps.__init__
    monkeypatch.setattr(steps_module, "STEPS_BEFORE_RECORDING", 1)
    texts = [row.tolist() for row in prompts(net)]
    stops = tuple(range(0, net.config.vocab_size, 23))
    config = SamplingConfig(max_new_tokens=40, temperature=1.0, seed=5, stop_ids=stops)
    wanted = list(generate(net, texts, config))
    monkeypatch.setattr(Steps, "__init__", lambda self, net, state=None: made(self, net, state, fixed=True))
    assert list(generate(net, texts, config)) == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replayed_graph_gives_the_ordinary_steps_logits_and_state(variant, dtype, monkeypatch):
    monkeypatch.setattr(steps_module, "ROOM", 24)
    net = network(variant)
    on_gpu = Hymba(net.config, RuntimeConfig(compute_dtype=dtype)).cuda().eval()
    on_gpu.load_state_dict(net.state_dict())
    for lengths in (LENGTHS, (40, 40)):
        rows = [row.cuda() for row in prompts(net, lengths)]
        state = join(read_rows(on_gpu, rows, [None] * len(rows), 64)[1])
        given, replayed = Steps(on_gpu, state), 0
        for step in range(60):
            tokens = ((torch.arange(len(rows))[:, None] * 17 + step * 5) % net.config.vocab_size).cuda()
            wanted, state = carried.read(on_gpu, tokens, state, 64)
            got = given.read(tokens, 64)
            replayed += given.is_recorded
            assert_close(got, wanted, 1e-4 if dtype == "float32" else 0.1)
        assert replayed > 25
        assert given.state.last_id.tolist() == state.last_id.tolist()
