"""Every backend of the softcapped cross-entropy against the naive formula, that against torch's, and the memory."""

import functools

import pytest
import torch
import torch.nn.functional as F
from op_cases import RATIO, assert_close, on, outputs_and_gradients, random
from torch.profiler import ProfilerActivity, profile

from hymba_lightning.ops.registry import OPERATIONS, BackendUnavailableError, choose
from hymba_lightning.ops.softcapped_cross_entropy import (
    available_backends,
    softcapped_cross_entropy,
)
from hymba_lightning.ops.softcapped_cross_entropy import backend_torch as blocked

# (N, V, size of the logits): odd sizes, one token, one id, several blocks, logits far over the cap.
SHAPES = [(63, 60, 3), (1, 1000, 3), (5, 1, 3), (0, 7, 3), (700, 1023, 3), (40, 5000, 3), (33, 257, 300), (9, 64, 1e30)]


def case(tokens, vocab, size=3, dtype=torch.float32, device="cpu"):
    return {"logits_NV": size * random(tokens, vocab, dtype=dtype, device=device)}


def targets_for(operands):
    tokens, vocab = operands["logits_NV"].shape
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocab, (tokens,), generator=generator).to(operands["logits_NV"].device)


def compare(backend, operands, ratio, cap=30.0):
    targets_N = targets_for(operands)
    weights = (random(len(targets_N), device=targets_N.device, seed=5),)
    call = functools.partial(softcapped_cross_entropy, targets_N=targets_N, cap=cap)
    got, gradients = outputs_and_gradients(functools.partial(call, backend=backend), operands, weights)
    expected, expected_gradients = outputs_and_gradients(functools.partial(call, backend="naive"), operands, weights)
    assert got[0].dtype == torch.float32
    assert_close("nats", got[0], expected[0], RATIO[torch.float32])
    assert_close("gradient", gradients["logits_NV"], expected_gradients["logits_NV"], ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), on("cpu", "torch", "numba") + on("cuda", "torch", "triton"))
def test_backend_matches_naive(backend, shape, dtype, device):
    # What a CPU runs on is required, so that nothing is left out there.
    if device == "cuda" and backend not in available_backends(device):
        pytest.skip(f"{backend} is not installed")
    if backend == "numba":
        shape = (shape[0], 16 * shape[1])
    operands = case(*shape, dtype=dtype, device=device)
    if backend == "numba" and dtype != torch.float32:
        with pytest.raises(BackendUnavailableError, match="it takes float32 of a vocabulary"):
            softcapped_cross_entropy(**operands, targets_N=targets_for(operands), cap=30.0, backend=backend)
    else:
        compare(backend, operands, RATIO[dtype])


@pytest.mark.parametrize("cap", [0.5, 15.0, 500.0])
def test_cap_may_be_small_or_out_of_reach(cap):
    compare("torch", case(20, 50, size=100), RATIO[torch.float32], cap)


def test_naive_is_cross_entropy_of_the_capped_logits():
    operands = case(50, 40, size=40)
    targets_N = targets_for(operands)
    expected = F.cross_entropy(7 * torch.tanh(operands["logits_NV"] / 7), targets_N, reduction="none")
    torch.testing.assert_close(
        softcapped_cross_entropy(**operands, targets_N=targets_N, cap=7.0, backend="naive"), expected
    )


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_bfloat16_logits_are_capped_in_float32(backend):
    operands = case(30, 200, dtype=torch.bfloat16)
    call = functools.partial(softcapped_cross_entropy, targets_N=targets_for(operands), cap=30.0, backend=backend)
    assert_close("nats", call(**operands), call(operands["logits_NV"].float()), 1e-6)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_logits_may_be_a_slice(backend):
    operands = case(12, 20)
    call = functools.partial(softcapped_cross_entropy, targets_N=targets_for(operands), cap=30.0, backend=backend)
    logits_NV = operands["logits_NV"]
    for view in (torch.cat([logits_NV, logits_NV], dim=1)[:, :20], logits_NV.t().contiguous().t()):
        assert_close("nats", call(view), call(logits_NV), 1e-6)


def peak_bytes(run):
    """What `run` holds at its height, beyond what was there before, as torch's profiler counts it."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize("tokens", [256, 2048])
def test_memory_is_two_blocks_whatever_the_number_of_tokens(tokens, monkeypatch):
    monkeypatch.setattr(blocked, "CPU_BLOCK_LOGITS", 2**16)
    operands = case(tokens, 1024, dtype=torch.bfloat16)
    logits_NV, targets_N = operands["logits_NV"].requires_grad_(), targets_for(operands)

    def step(backend, backward=True):
        nats_N = softcapped_cross_entropy(logits_NV, targets_N, cap=30.0, backend=backend)
        return torch.autograd.grad(nats_N.mean(), logits_NV) if backward else nats_N

    block, per_token = 4 * 2**16, 64 * tokens
    assert peak_bytes(lambda: step("torch", backward=False)) <= block + per_token
    gradient = 2 * logits_NV.numel()
    assert gradient < peak_bytes(lambda: step("torch")) <= gradient + 2 * block + per_token
    assert peak_bytes(lambda: step("naive")) > 3 * 4 * logits_NV.numel()


def test_automatic_choice_and_refusals(monkeypatch):
    installed = set()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: package in installed)
    pick = functools.partial(choose, "softcapped_cross_entropy", "auto")
    assert (pick("cpu"), pick("cuda"), pick("mps")) == ("torch", "torch", "torch")
    installed.add("triton")
    assert (pick("cpu"), pick("cuda"), pick("mps")) == ("torch", "triton", "torch")
    assert choose("softcapped_cross_entropy", "triton", "cuda") == "triton"
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        choose("softcapped_cross_entropy", "triton", "cpu")
    assert {"naive", "torch", "triton"} <= set(OPERATIONS["softcapped_cross_entropy"])


def test_errors_name_what_is_wrong():
    logits_NV, targets_N = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
    for wrong_logits, wrong_targets in ((logits_NV, targets_N[1:]), (logits_NV[None], targets_N)):
        with pytest.raises(ValueError, match=r"must be \(N, V\) and \(N,\)"):
            softcapped_cross_entropy(wrong_logits, wrong_targets, cap=30.0)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        softcapped_cross_entropy(logits_NV.double(), targets_N, cap=30.0)
    with pytest.raises(ValueError, match=r"must be int64, not torch\.int32"):
        softcapped_cross_entropy(logits_NV, targets_N.int(), cap=30.0)
    with pytest.raises(ValueError, match=r"cap must be positive, not 0\.0"):
        softcapped_cross_entropy(logits_NV, targets_N, cap=0.0)
    with pytest.raises(ValueError, match="no backend 'fused'; choose auto or one of naive, numba, torch, triton"):
        softcapped_cross_entropy(logits_NV, targets_N, cap=30.0, backend="fused")
    for backend in ("naive", "torch"):
        with pytest.raises(RuntimeError, match="out of bounds"):
            softcapped_cross_entropy(logits_NV, targets_N + 5, cap=30.0, backend=backend)
