"""How a backend is chosen, and what is said about it."""

import logging

import pytest
import torch

from hymba_lightning.ops import registry


@pytest.fixture
def toy(monkeypatch):
    """An op with a backend whose package is missing, one that refuses a feature and one that takes everything."""
    monkeypatch.setattr(registry, "_announced", set())
    registry.register(
        "toy",
        registry.Operation(
            backends={
                "far": registry.Backend(lambda device_type: "the package far is not installed: pip install far"),
                "picky": registry.Backend(registry.anywhere, {"state": "picky keeps no state; use backend 'plain'"}),
                "plain": registry.Backend(registry.anywhere),
            },
            order={"cpu": ("far", "picky", "plain"), "other": ("plain",)},
        ),
    )
    yield "toy"
    del registry._operations["toy"]


def test_automatic_takes_the_first_that_can_serve_the_call(toy):
    assert registry.choose(toy, "auto", "cpu") == "picky"
    assert registry.choose(toy, "auto", "cpu", ("state",)) == "plain"
    assert registry.choose(toy, "auto", "xpu") == "plain"


def test_automatic_choice_is_logged_once_with_what_is_missing(toy, caplog):
    with caplog.at_level(logging.INFO, logger="hymba_lightning"):
        for _ in range(3):
            registry.choose(toy, "auto", "cpu")
        registry.choose(toy, "picky", "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "toy on cpu: backend picky; not far: the package far is not installed: pip install far"
    ]


def test_named_backend_is_taken_or_refused(toy):
    assert registry.choose(toy, "plain", "cpu") == "plain"
    with pytest.raises(registry.BackendUnavailableError, match=r"toy: backend 'far' cannot serve .*pip install far"):
        registry.choose(toy, "far", "cpu")
    with pytest.raises(registry.BackendUnavailableError, match="picky keeps no state; use backend 'plain'"):
        registry.choose(toy, "picky", "cpu", ("state",))
    with pytest.raises(ValueError, match="toy has no backend 'near'; choose auto or one of far, picky, plain"):
        registry.choose(toy, "near", "cpu")


def test_available_are_those_that_are_not_missing(toy):
    assert registry.available_backends(toy, "cpu") == ("picky", "plain")


def test_no_backend_at_all_says_why_for_each():
    registry.register(
        "stuck", registry.Operation({"far": registry.Backend(lambda device_type: "no far here")}, {"other": ("far",)})
    )
    with pytest.raises(registry.BackendUnavailableError, match="serves this call on cpu; not far: no far here"):
        registry.choose("stuck", "auto", "cpu")
    del registry._operations["stuck"]


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
    monkeypatch.setattr(scan.registry, "choose", lambda op, backend, *rest: taken.append(backend) or "naive")

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
