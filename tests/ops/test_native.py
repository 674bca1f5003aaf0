"""Vector functions of the native loops, the thread pool, and what is said while a loop compiles."""

import logging
import threading

import numba
import numpy as np
import pytest
import torch

from hymba_lightning.ops import lanes, native, threads


@numba.njit(error_model="numpy")
def _apply(x, exp2, sigmoid, softplus, sums):
    for i in range(0, x.size, lanes.LANES):
        value = lanes.load(x, i)
        lanes.store(exp2, i, lanes.exp2(value))
        lanes.store(sigmoid, i, lanes.sigmoid(value))
        lanes.store(softplus, i, lanes.softplus(value))
        sums[i // lanes.LANES] = lanes.total(value)


def applied(x):
    x = np.asarray(x, dtype=np.float32)
    results = [np.full_like(x, np.nan) for _ in range(3)]
    sums = np.zeros(x.size // lanes.LANES, dtype=np.float32)
    _apply(x, *results, sums)
    return (*results, sums)


def relative(actual, expected):
    return np.max(np.abs(actual - expected) / np.abs(expected))


def test_vector_functions_are_good_to_a_few_units_in_the_last_place():
    x = np.linspace(-80, 80, 160000, dtype=np.float32)
    exp2, sigmoid, softplus, sums = applied(x)
    wide = x.astype(np.float64)
    assert relative(exp2, np.exp2(wide)) < 2e-7
    # The rounding of x·log2(e), up to 115 here, costs some units.
    assert relative(softplus, np.logaddexp(0, wide)) < 1e-5
    near = np.abs(wide) < 8
    assert relative(softplus[near], np.logaddexp(0, wide[near])) < 1.5e-6
    assert relative(sigmoid[near], 1 / (1 + np.exp(-wide[near]))) < 1.5e-6
    np.testing.assert_allclose(sums, wide.reshape(-1, 16).sum(1), rtol=1e-5, atol=1e-4)


def test_vector_functions_at_the_ends_of_the_range():
    exp2, sigmoid, softplus, _ = applied([0.0, -126.0, -1e30, -np.inf, 127.0, 1e30, np.inf, np.nan] * 2)
    assert exp2[:2].tolist() == [1.0, 2.0**-126]
    assert (exp2[2:4] <= 2.0**-126).all()
    assert np.isfinite(exp2[4:7]).all()
    assert np.isnan([exp2[7], sigmoid[7], softplus[7]]).all()
    assert sigmoid[:1].tolist() == [0.5]
    assert (sigmoid[1:4] < 1e-37).all()
    assert (sigmoid[4:7] == 1).all()
    assert (softplus[1:4] < 1e-37).all()
    assert softplus[4:7].tolist() == [127.0, np.float32(1e30), np.inf]


def test_rows_reads_a_slice_in_place_and_copies_what_it_cannot_read():
    wide = torch.arange(24.0).view(2, 3, 4)
    array, stride = native.rows(wide[..., 1:3])
    assert stride == 4
    assert np.shares_memory(array, wide.numpy())
    assert [array[token * stride : token * stride + 2].tolist() for token in (0, 5)] == [[1, 2], [21, 22]]
    for other in (wide.bfloat16(), wide.transpose(0, 1), wide.transpose(1, 2), wide[:, ::2]):
        array, stride = native.rows(other)
        assert array.reshape(-1)[: stride * 2].tolist() == other.float().flatten()[: stride * 2].tolist()


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_every_item_is_done_once(n_threads):
    done, lock = [], threading.Lock()

    def work(item):
        with lock:
            done.append(item)

    threads.spread(work, 23, n_threads)
    assert sorted(done) == list(range(23))


def test_failure_of_an_item_reaches_the_caller():
    def work(item):
        if item == 7:
            raise ArithmeticError("item 7")

    with pytest.raises(ArithmeticError, match="item 7"):
        threads.spread(work, 20, 3)


def test_torch_items_run_on_one_torch_thread_each_without_gradients():
    torch.set_num_threads(3)
    try:
        seen, barrier = [], threading.Barrier(3, timeout=20)
        # The pool's threads may have met torch before, when it had three threads for each of them.
        threads.spread(lambda item: (barrier.wait(), torch.get_num_threads()), 3, 3)

        def work(item):
            barrier.wait()
            seen.append((torch.get_num_threads(), torch.is_grad_enabled()))

        threads.spread_torch(work, 3)
        assert seen == [(1, False)] * 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_without_a_folder_for_the_cache_the_loop_still_compiles(caplog, monkeypatch):
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])

    def double(first, last, x):
        for i in range(first, last):
            x[i] *= 2

    with caplog.at_level(logging.WARNING, logger="hymba_lightning"):
        loop = native.native_loop(double)
    assert "NUMBA_CACHE_DIR" in caplog.text
    x = np.ones(3)
    loop(0, 2, x)
    assert x.tolist() == [2, 2, 1]


def test_first_use_of_a_native_loop_is_announced_once(caplog, monkeypatch):
    monkeypatch.setattr(native, "_ready", set())
    calls = []
    with caplog.at_level(logging.INFO, logger="hymba_lightning"):
        for _ in range(2):
            native.run_items(lambda *arguments: calls.append(arguments), "a loop", 4, 1.0, ("x",), threads=2)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "compile, which takes seconds" in messages[0]
    # Once with no items to have it compiled, then the work.
    assert calls == [(0, 0, "x"), (0, 4, "x"), (0, 4, "x")]


def test_a_native_loop_that_had_to_compile_says_how_long(caplog, monkeypatch):
    monkeypatch.setattr(native, "_ready", {"another loop"})
    now = iter([10.0, 12.5])
    monkeypatch.setattr(native.time, "perf_counter", lambda: next(now))
    with caplog.at_level(logging.INFO, logger="hymba_lightning"):
        native.run_items(lambda *arguments: None, "a loop", 4, 1.0, ("x",), threads=1)
    assert [record.getMessage() for record in caplog.records] == ["a loop: native loop ready after 2.5 s"]


def test_helping_threads_write_into_what_was_made_under_inference_mode():
    done, both = [], threading.Barrier(2)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            out = torch.zeros(2)

            def work(item: int) -> None:
                both.wait(10)  # each thread has one of the two
                out[item] = 1
                done.append(torch.is_inference_mode_enabled())

            threads.spread_torch(work, 2)
    finally:
        torch.set_num_threads(threads_before)
    assert done == [True, True]
    assert out.tolist() == [1, 1]
