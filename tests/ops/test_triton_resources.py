"""The Triton kernels compiled for a GPU that is not there: registers, spills, and what the report does with them."""

from __future__ import annotations

import math
import os

import pytest
import torch
from interpreted import needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing to compile")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What was compiled here for one test serves the next."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def resources(monkeypatch, cache):
    """The module, with a compile cache of these tests' own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    from hymba_lightning.ops import triton_resources

    return triton_resources


@pytest.mark.slow
@pytest.mark.more
def test_production_kernels_do_not_spill_on_hopper(resources, capsys):
    launches = resources.scan_launches(2, 32768, 512, 8, torch.bfloat16)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == [
        "chunk_ends",
        "carry_chunks",
        "chunk_outputs",
        "chunk_adjoints",
        "carry_chunks",
        "chunk_gradients",
        "channel_sums",
        "pair_sums",
    ]
    assert all(math.prod(launch.grid) >= 128 for launch in launches)
    assert resources.report([launches[2], *launches[5:]], "scan", 90)
    assert resources.report(resources.conv_launches(2, 32768, 512, 4, torch.bfloat16), "conv", 90)
    assert resources.report(resources.loss_launches(65536, 1024, torch.bfloat16), "loss", 90)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == [
        "chunk_outputs",
        "chunk_gradients",
        "channel_sums",
        "pair_sums",
        "conv_forward",
        "conv_backward",
        "channel_sums",
        "loss_forward",
        "loss_backward",
    ]


@pytest.mark.slow
@pytest.mark.more
def test_documents_cost_no_spill_and_no_program_less(resources, capsys):
    launches = resources.scan_launches(2, 32768, 512, 8, torch.bfloat16, documents=True)
    plain = resources.scan_launches(2, 32768, 512, 8, torch.bfloat16)
    assert [launch.arguments["PACKED"] for launch in launches if "PACKED" in launch.arguments] == [True] * 4
    assert resources.report([launches[2], launches[5]], "documents", 90)
    assert resources.report(resources.conv_launches(2, 32768, 512, 4, torch.bfloat16, documents=True), "conv", 90)
    for index in (2, 5):
        warps = [resources.compile_launch(which[index], 90).resident_warps for which in (launches, plain)]
        assert warps[0] == warps[1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(14, 512, 2048), (7, 48, 512)])
def test_a_banks_products_do_not_spill_on_hopper(resources, shape):
    launches = resources.newton_schulz_launches(*shape, torch.bfloat16)
    assert [launch.arguments["SYMMETRIC"] for launch in launches] == [True, True, False]
    assert resources.report(launches, "newton_schulz", 90)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(512, 2048), (48, 512)])
def test_muons_passes_do_not_spill_on_hopper(resources, shape):
    launches = resources.muon_launches(*shape, torch.bfloat16)
    names = ["add_gradients", "fill_bank", "move_parameters"]
    assert [launch.kernel.__name__ for launch in launches] == [name for name in names for _ in range(2)]
    assert resources.report(launches, "muon_passes", 90)


@pytest.mark.slow
@pytest.mark.parametrize("gain", [True, False])
def test_the_heads_norm_and_turn_does_not_spill_on_hopper(resources, gain):
    launches = resources.rotary_launches(2, 32768, 8, 64, torch.bfloat16, gain)
    names = ["norm_and_turn", "norm_and_turn_backward", "channel_sums"]
    assert [launch.kernel.__name__ for launch in launches] == (names if gain else names[:2])
    assert resources.report(launches, "rotary_norm", 90)


@pytest.mark.slow
def test_as_many_programs_fit_as_the_chunks_are_made_for(resources):
    from hymba_lightning.ops.selective_scan import triton_launches as triton

    launches = {launch.kernel.__name__: launch for launch in resources.scan_launches(2, 32768, 512, 8, torch.bfloat16)}
    assert resources.compile_launch(launches["chunk_outputs"], 90).resident_warps == triton.FORWARD_PROGRAMS
    gradients = resources.compile_launch(launches["chunk_gradients"], 90)
    assert gradients.resident_warps == 16
    assert triton.BACKWARD_PROGRAMS % (gradients.resident_warps // gradients.warps) == 0
    assert launches["chunk_gradients"].arguments["PREFETCHED"] == 8


@pytest.mark.slow
def test_an_mlps_hidden_layer_does_not_spill_on_hopper(resources):
    launches = resources.mlp_launches(65536, 512, 2048, torch.bfloat16)
    assert [launch.kernel.__name__ for launch in launches] == ["hidden_forward", "hidden_backward"]
    assert resources.report(launches, "mlp", 90)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.more)])
def test_window_attention_does_not_spill_on_hopper(resources, width, documents):
    launches = resources.attention_launches(2, 32768, 8, 4, width, 512, torch.bfloat16, documents)
    assert [launch.kernel.__name__ for launch in launches] == [
        "attention_forward",
        "attention_grad_q",
        "attention_grad_kv",
    ]
    assert {launch.arguments["PACKED"] for launch in launches} == {documents}
    assert resources.report(launches, "attention", 90)


@pytest.mark.slow
def test_a_spill_is_reported(resources, monkeypatch, capsys):
    from hymba_lightning.ops.selective_scan import triton_launches as triton

    monkeypatch.setattr(triton, "BACKWARD_REGISTERS", 96)
    launch = resources.scan_launches(2, 32768, 512, 8, torch.bfloat16)[5]
    found = resources.compile_launch(launch, 90)
    assert found.registers <= 96
    assert found.spills > 0
    assert found.stack > 0
    assert not resources.report([launch], "scan", 90)


def test_recording_gives_the_kernels_back(resources):
    import triton

    from hymba_lightning.ops.selective_scan import triton_launches as module

    before = module.chunk_outputs
    resources.scan_launches(1, 100, 60, 5, torch.float32)
    assert module.chunk_outputs is before
    assert isinstance(before, triton.JITFunction)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((2, 32768, 8), 128),
        ((2, 65536, 8), 256),
        ((64, 4096, 64), 4096),
        ((1, 1000, 1), 64),
        ((1, 5, 1), 8),
        ((1, 32768, 8), 64),
    ],
)
def test_chunks_leave_enough_programs(resources, shape, tokens):
    from hymba_lightning.ops.selective_scan.triton_launches import ROWS, tiles_per_chunk

    assert tiles_per_chunk(*shape, 32 * 132) * ROWS == tokens
    assert tiles_per_chunk(2, 32768, 8, 24 * 132) == 21


@pytest.mark.parametrize(
    ("registers", "warps", "resident"),
    [(221, 1, 8), (255, 1, 8), (168, 1, 12), (80, 1, 24), (32, 1, 32), (128, 4, 16), (168, 8, 8)],
)
def test_resident_warps_fill_each_schedulers_registers(resources, registers, warps, resident):
    assert resources.Resources("kernel", registers, 0, 0, 0, warps).resident_warps == resident
