"""How a backend is chosen, and what is said about it."""

import dataclasses
import logging

import pytest
import torch

from hymba_lightning.model import RuntimeConfig
from hymba_lightning.ops import registry
from hymba_lightning.options import CommandParser


@pytest.fixture
def toy(monkeypatch):
    """An op with a backend whose package is missing, one that refuses a feature and one that takes everything."""
    monkeypatch.setattr(registry, "_announced", set())
    registry.register(
        "toy",
        {
            "far": registry.Backend("", list, package="far_away", install="pip install far", auto={"cpu": 3}),
            "picky": registry.Backend(
                "",
                list,
                refuses=((lambda call: call.state, "picky keeps no state; use backend 'plain'"),),
                auto={"cpu": 2},
            ),
            "plain": registry.Backend("", list, auto={"any": 1}),
            "elsewhere": registry.Backend("", list, devices=("tpu",), elsewhere="use backend 'plain'"),
        },
    )
    yield "toy"
    del registry.OPERATIONS["toy"]


def test_automatic_takes_the_first_that_can_serve_the_call(toy):
    assert registry.choose(toy, "auto", "cpu") == "picky"
    assert registry.choose(toy, "auto", "cpu", state=True) == "plain"
    assert registry.choose(toy, "auto", "xpu") == "plain"


def test_automatic_choice_is_logged_once_with_what_is_missing(toy, caplog):
    with caplog.at_level(logging.INFO, logger="hymba_lightning"):
        for _ in range(3):
            registry.choose(toy, "auto", "cpu")
        registry.choose(toy, "picky", "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "toy on cpu: backend picky; not far: the package far_away is not installed: pip install far"
    ]


def test_named_backend_is_taken_or_refused(toy):
    assert registry.choose(toy, "plain", "cpu") == "plain"
    with pytest.raises(registry.BackendUnavailableError, match=r"toy: backend 'far' cannot serve .*pip install far"):
        registry.choose(toy, "far", "cpu")
    with pytest.raises(registry.BackendUnavailableError, match="picky keeps no state; use backend 'plain'"):
        registry.choose(toy, "picky", "cpu", state=True)
    with pytest.raises(registry.BackendUnavailableError, match="runs on tpu tensors, these are on cpu: use backend 'p"):
        registry.choose(toy, "elsewhere", "cpu")
    with pytest.raises(
        ValueError, match="toy has no backend 'near'; choose auto or one of far, picky, plain, elsewhere"
    ):
        registry.choose(toy, "near", "cpu")


def test_native_loops_are_missing_where_numba_is_not_to_compile(monkeypatch):
    assert registry.native_loops(lambda: print).missing("cpu") is None
    monkeypatch.setattr(registry, "NUMBA_IS_OFF", True)
    assert (
        registry.native_loops(lambda: print).missing("cpu") == "NUMBA_DISABLE_JIT keeps numba from compiling: unset it"
    )


def test_available_are_those_that_are_not_missing(toy):
    assert registry.available_backends(toy, "cpu") == ("picky", "plain")


def test_no_backend_at_all_says_why_for_each():
    registry.register(
        "stuck", {"far": registry.Backend("", list, check=lambda device_type: "no far here", auto={"any": 1})}
    )
    with pytest.raises(registry.BackendUnavailableError, match="serves this call on cpu; not far: no far here"):
        registry.choose("stuck", "auto", "cpu")
    del registry.OPERATIONS["stuck"]


def test_a_file_in_an_ops_folder_is_a_backend(tmp_path, monkeypatch):
    """Its entry alone: the choice, the refusal, the help and the table of the documentation follow from it."""
    folder = tmp_path / "toy_op"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "operands.py").write_text("raise ImportError('no entry, so not imported')")
    (folder / "backend_twice.py").write_text(
        "from hymba_lightning.ops.registry import Backend\n"
        "BACKEND = Backend('doubles', lambda: (lambda x: 2 * x), install='pip install twice', auto={'cpu': 1},\n"
        "                  refuses=((lambda call: call.negative, 'twice takes no negative numbers'),))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        registry.register_folder("toy_op", "toy_op", lambda x: x + x)
        assert list(registry.OPERATIONS["toy_op"]) == ["naive", "twice"]
        assert registry.implementation("toy_op", "auto", "cpu", negative=False)(4) == 8
        assert (
            registry.choose("toy_op", "auto", "cpu", negative=True)
            == registry.choose("toy_op", "auto", "mps")
            == "naive"
        )
        with pytest.raises(registry.BackendUnavailableError, match="no negative numbers"):
            registry.choose("toy_op", "twice", "cpu", negative=True)
        assert registry.in_words("toy_op") == "auto, naive (its definition, slow), twice (doubles)"
        row = "| `twice` | doubles | any device | pip install twice | twice takes no negative numbers |"
        assert row in registry.as_markdown().splitlines()
    finally:
        del registry.OPERATIONS["toy_op"]


def test_the_help_of_every_backend_option_is_its_ops_table():
    registry.register_all()
    ops = {field.metadata["op"] for field in dataclasses.fields(RuntimeConfig) if field.name.endswith("_backend")}
    # The optimizer takes its own, two those of the op in whose place they stand, and two go by the device alone.
    assert ops == set(registry.OPERATIONS) - {"newton_schulz", "muon_passes", "ssd"} - {
        "prefix_window_attention",
        "rotary_norm",
        "scaled_sum",
    }
    parser = CommandParser()
    parser.add_class_arguments(RuntimeConfig, "runtime")
    text = " ".join(parser.format_help().split())
    for op in ops:
        for name, backend in registry.OPERATIONS[op].items():
            assert f"{name} ({backend.summary})" in text


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setattr(registry, "is_installed", lambda package: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert registry.needs_triton("cuda") is None
    assert "TRITON_INTERPRET=1" in registry.needs_triton("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert registry.needs_triton("cpu") is None
    assert registry.needs_triton("mps") is not None
    monkeypatch.setattr(registry, "is_installed", lambda package: False)
    assert "pip install triton" in registry.needs_triton("cuda")


def test_a_single_step_without_gradient_takes_no_operator(monkeypatch):
    """One token on a CPU: the definition itself; with a gradient, more tokens or a named backend the usual choice."""
    import hymba_lightning.ops.selective_scan as scan

    taken = []
    naive = scan.selective_scan_naive
    monkeypatch.setattr(
        scan.registry, "implementation", lambda op, backend, *rest, **call: taken.append(backend) or naive
    )

    def call(length, backend="auto"):
        u, states = torch.zeros(1, length, 4), torch.zeros(1, length, 2)
        scan.selective_scan(
            u, u, torch.zeros(4, 2), states, states, torch.zeros(4), None, dt_bias_E=torch.zeros(4), backend=backend
        )

    with torch.no_grad():
        call(1)
        call(2)
        call(1, "chunked")
    call(1)
    assert taken == ["naive", "auto", "chunked", "auto"]
