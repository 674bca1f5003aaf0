"""Window attention by flash-attn and flash-attn-4, with stand-ins for the packages where there is no GPU."""

import dataclasses
import functools
import sys
import types

import pytest
import torch
from attention_cases import LOCAL, case, compare
from op_cases import RATIO, outputs_and_gradients, random

from hymba_lightning.ops.registry import OPERATIONS, BackendUnavailableError, choose, is_installed
from hymba_lightning.ops.sliding_window import backend_fa4 as fa4
from hymba_lightning.ops.sliding_window import sliding_window_attention


def test_flash_counts_the_keys_to_the_left_of_the_querys_own(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        calls.append((softmax_scale, causal, window_size))
        return q

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    from hymba_lightning.ops.sliding_window.backend_flash import sliding_window_attention_flash

    operands = case(1, 4, 4, 2, 1, 8)
    sliding_window_attention_flash(*operands.values(), 3, 0.5)
    sliding_window_attention_flash(*operands.values(), None, 0.5)
    assert calls == [(0.5, True, (2, 0)), (0.5, True, (-1, 0))]


@pytest.fixture
def flash_attn_4(monkeypatch):
    """Stands in for the package: its two functions as they are called, computing what its documentation says."""
    calls = []

    def dense(q, k, v, scale, left):
        window = None if left is None else left + 1
        return sliding_window_attention(q, k, v, window=window, scale=scale, backend="naive")

    def forward(q, k, v, *, softmax_scale, causal, window_size_left, window_size_right, return_lse):
        calls.append((causal, window_size_left, window_size_right, return_lse))
        return (
            dense(q, k, v, softmax_scale, window_size_left),
            torch.zeros(q.size(0), q.size(2), q.size(1)),
            None,
            None,
            None,
        )

    def backward(q, k, v, out, dout, lse, *, softmax_scale, causal, window_size_left, window_size_right, deterministic):
        calls.append((causal, window_size_left, window_size_right, deterministic))
        assert out.shape == q.shape
        assert lse.shape == (q.size(0), q.size(2), q.size(1))
        _, pull = torch.func.vjp(lambda *x: dense(*x, softmax_scale, window_size_left), q, k, v)
        return pull(dout)

    names = "flash_attn", "flash_attn.cute", "flash_attn.cute.interface"
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interface = sys.modules[names[-1]]
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    backends = OPERATIONS["sliding_window_attention"]
    monkeypatch.setitem(backends, "fa4", dataclasses.replace(backends["fa4"], check=lambda device_type: None))
    return calls


@pytest.mark.parametrize("window", [1, 5, None])
@pytest.mark.parametrize("n_keys", [12, 19])
def test_flash_attn_4_behind_an_operator(flash_attn_4, window, n_keys):
    compare("fa4", case(2, 12, n_keys, 4, 2, 64, dtype=torch.bfloat16), window, RATIO[torch.bfloat16], scale=0.5)
    left = None if window is None else window - 1
    assert flash_attn_4 == [(True, left, 0, True), (True, left, 0, False)]


def test_flash_attn_4_in_a_compiled_graph(flash_attn_4):
    operands = case(2, 12, 12, 4, 2, 64, dtype=torch.bfloat16)
    weights = (random(2, 12, 4, 64, seed=3),)
    call = functools.partial(sliding_window_attention, window=5, backend="fa4")
    expected, expected_gradients = outputs_and_gradients(call, operands, weights)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, gradients = outputs_and_gradients(compiled, operands, weights)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in operands)
    arguments = [x.requires_grad_() for x in operands.values()]
    torch.library.opcheck(
        torch.ops.hymba.sliding_window_fa4.default,
        (*arguments, 5, 0.5),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_flash_attn_4_refuses_what_it_has_no_kernel_for(flash_attn_4):
    with pytest.raises(BackendUnavailableError, match="float16 and bfloat16"):
        sliding_window_attention(**case(1, 4, 4, 2, 1, 64), window=3, backend="fa4")
    for width in (8, 16, 72, 136):
        with pytest.raises(BackendUnavailableError, match="width 64 and 128"):
            sliding_window_attention(**case(1, 4, 4, 2, 1, width, dtype=torch.bfloat16), window=3, backend="fa4")


def test_flash_attn_4_comes_first_on_hopper_and_blackwell(monkeypatch):
    installed, capability = set(), [9, 0]
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: False)
    monkeypatch.setattr(fa4, "is_installed", lambda: "flash-attn-4" in installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: tuple(capability))
    pick = functools.partial(choose, "sliding_window_attention", "auto", "cuda")
    with pytest.raises(BackendUnavailableError, match=r"flash-attn-4 is not installed.*hymba-lightning\[hopper\]"):
        choose("sliding_window_attention", "fa4", "cuda")
    installed.add("flash-attn-4")
    assert pick(**LOCAL) == pick() == "fa4"
    assert pick(**LOCAL | {"half_precision": False}) == pick(**LOCAL | {"head_dim": 136}) == "flex"
    capability[0] = 10
    assert pick(**LOCAL) == "fa4"
    capability[0] = 8
    assert pick(**LOCAL) == "flex"
    with pytest.raises(BackendUnavailableError, match="compute capability 9 to 11, this one has 8"):
        choose("sliding_window_attention", "fa4", "cuda")
    with pytest.raises(BackendUnavailableError, match="these are on cpu"):
        choose("sliding_window_attention", "fa4", "cpu")


def test_flash_attn_and_flash_attn_4_are_told_apart(monkeypatch, tmp_path):
    """Both live in a folder flash_attn: the elder as a package, the younger as cute/ in it, with or without it."""
    found = {}
    for name, files in {
        "both": ("__init__.py", "cute/interface.py"),
        "elder": ("__init__.py",),
        "younger": ("cute/interface.py",),
        "none": (),
    }.items():
        for file in files:
            path = tmp_path / name / "flash_attn" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        monkeypatch.setattr(sys, "path", [str(tmp_path / name)])
        sys.path_importer_cache.clear()
        found[name] = is_installed.__wrapped__("flash_attn"), fa4.is_installed.__wrapped__()
    assert found == {"both": (True, True), "elder": (True, False), "younger": (False, True), "none": (False, False)}
