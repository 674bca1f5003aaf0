"""What a compiled step leaves for the next process."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from hymba_lightning.model.mixer import Merge
from hymba_lightning.ops import compiling
from hymba_lightning.ops.compiling import compiled


def merged(a, s, alpha):
    """As a block merges its branches: by an autograd.Function."""
    return Merge.apply(a, s, alpha, 4).square().sum()


def compile_anew():
    """Of `merged` in a process that has compiled nothing: what became of its joint graph."""
    torch._dynamo.reset()
    counters.clear()
    leaves = [torch.ones(1, 2, 8, requires_grad=True), torch.zeros(1, 2, 8), torch.zeros(8, requires_grad=True)]
    compiled(merged, dynamic=False)(*leaves).backward()
    return {name.removeprefix("autograd_cache_") for name in counters["aot_autograd"] if "autograd_cache" in name}


@pytest.fixture
def empty_caches():
    with fresh_cache(), torch.compiler.config.patch(cache_key_tag="mine"):
        yield
    torch._dynamo.reset()


@pytest.mark.more
def test_the_joint_graph_of_forward_and_backward_is_found_again(empty_caches):
    assert compile_anew() == {"miss", "saved"}
    assert compile_anew() == {"hit"}


def test_a_graph_of_other_operators_sources_is_not_taken(empty_caches, monkeypatch):
    compile_anew()
    assert compiling._sources() in torch.compiler.config.cache_key_tag
    assert torch.compiler.config.cache_key_tag.split()[0] == "mine"
    monkeypatch.setattr(compiling, "_sources", lambda: "hymba-other")
    assert compile_anew() == {"miss", "saved"}


@pytest.mark.parametrize("file", ["ops/one/operator.py", "model/mixers/mine.py"])
def test_what_may_hold_an_operator_belongs_to_a_graph(file, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "ops" / "compiling.py"))
    before = compiling._sources.__wrapped__()
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("register_autograd('mine::op', backward)")
    assert compiling._sources.__wrapped__() != before
