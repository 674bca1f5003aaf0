"""In op tests every fresh allocation is filled with NaN, so that an element nobody writes fails a comparison."""

import pytest
import torch
from torch.utils._device import _device_constructors


def _filled(allocate):
    def allocate_filled(*arguments, **keywords):
        tensor = allocate(*arguments, **keywords)
        if tensor.is_floating_point():
            with torch.no_grad():  # the tensor may be a leaf that wants a gradient
                tensor.fill_(float("nan"))
        return tensor

    return allocate_filled


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    # What `with torch.device(...)` acts on is looked up once and kept: it must not be these stand-ins.
    _device_constructors()
    monkeypatch.setattr(torch, "empty", _filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _filled(torch.Tensor.new_empty))


@pytest.fixture
def traced_flex(monkeypatch):
    """Lists the shapes that torch traces flex_attention for; what it traces is run as it is, without a compiler."""
    from hymba_lightning.ops.sliding_window import compiled_flex as flex

    shapes = []

    def record(graph, examples):
        shapes.append(tuple(examples[0].shape))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flex._attention, dynamic=False, backend=record)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    yield shapes
    torch._dynamo.reset()
