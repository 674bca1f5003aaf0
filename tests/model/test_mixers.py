"""What holds for every mixer, those that are added as a file included: it trains, may be cut and batched anywhere,
exports, adapts and generates, and nobody outside knows which one it is."""

import pytest
import torch
from small_network import SMALL as SMALL_NETWORK

from hymba_lightning.closure import REFEREE, evaluation_code_bytes, needed_files
from hymba_lightning.data.token_stream import Chunk
from hymba_lightning.evaluation import TTTConfig, score_first_ttt
from hymba_lightning.evaluation.carried import CarriedScorer
from hymba_lightning.generation import SamplingConfig, generate
from hymba_lightning.generation.rows import join, select
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.costs import matmul_params, train_flops_per_token
from hymba_lightning.model.hymba import outline
from hymba_lightning.model.mixers import MIXERS
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.ops.testing import rms_ratio
from hymba_lightning.quantization import (
    QuantizationConfig,
    inspect_artifact,
    load_artifact,
    save_artifact,
)
from hymba_lightning.quantization.schemes import calibrate
from hymba_lightning.training.memory import estimate_memory
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer

SMALL = SMALL_NETWORK | {"n_layers": 2, "tied_embed_std": 0.3}
# Every mixer as it is, and what options of its own change.
VARIANTS = [({"mixer": name}) for name in MIXERS if name != "official"] + [
    {"mixer": "mamba2", "mixer_options": {"groups": 2, "head_dim": 4}, "expand": 2, "merge": "concat"},
    {"mixer": "mamba2", "mixer_options": {"head_dim": 16}, "dynamics_norm": True, "dt_init": "mamba", "d_conv": 2},
    {
        "mixer": "official",
        "smear_gate": False,
        "bigram_hash": False,
        "logit_softcap": 0.0,
        "n_layers": 3,
        "kv_groups": [[1, 2]],
        "meta_tokens": 3,
        "expand": 2,
        "mlp_width": 40,
        "rope_scale": 4.0,
    },
]


@pytest.fixture(params=VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())), scope="module")
def net(request) -> Hymba:
    return lively(request.param)


def lively(changes: dict, runtime: RuntimeConfig | None = None) -> Hymba:
    """A network whose zero-initialised matrices are random."""
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(**(SMALL | changes)), runtime)
    for parameter in net.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def like(net: Hymba, runtime: RuntimeConfig | None = None) -> Hymba:
    """Another one with the same weights."""
    other = Hymba(net.config, runtime)
    other.load_state_dict(net.state_dict())
    return other


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_sequence_cut_anywhere_gives_the_logits_of_the_whole(net):
    inputs = tokens(2, 150)
    whole = net(inputs)
    for cuts in ([1, 2, 17, 18, 149], [64, 65, 128], list(range(1, 40))):
        pieces, state = [], None
        for first, stop in zip([0, *cuts], [*cuts, 150], strict=True):
            logits, state = net(inputs[:, first:stop], state=state, return_state=True)
            pieces.append(logits)
        assert rms_ratio(torch.cat(pieces, dim=1), whole) < 1e-5


@torch.no_grad()
def test_the_future_does_not_reach_the_past(net):
    inputs = tokens(1, 90)
    changed = inputs.clone()
    changed[0, 70] += 1
    before, after = net(inputs), net(changed)
    assert torch.allclose(before[:, :70], after[:, :70], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 70], after[:, 70], rtol=0, atol=1e-3)


@torch.no_grad()
def test_rows_of_a_state_are_the_sequences_own(net):
    inputs, following = tokens(3, 21), tokens(3, 5)
    _, together = net.hidden(inputs, return_state=True)
    alone = [net.hidden(row[None], return_state=True)[1] for row in inputs]
    expected = net.hidden(following, together)[0]
    for state in (join(alone), select(join([alone[2], alone[0], alone[1]]), [1, 2, 0])):
        assert rms_ratio(net.hidden(following, state)[0], expected) < 1e-5
    assert all(tensor.size(0) == 3 for tensor in together.tensors())


@torch.no_grad()
def test_a_compact_state_goes_on_alike_and_keeps_no_more_than_it_holds(net):
    _, state = net.hidden(tokens(1, 300), return_state=True)
    later = torch.tensor([-9000])
    layers = [block.attn.compact(layer, later) for block, layer in zip(net.layers, state.layers, strict=True)]
    turned = net.compact(state._replace(layers=layers, position=state.position + 9000), 1000)
    assert turned.position == 0
    expected, got = (net.hidden(tokens(1, 12), each)[0] for each in (state, turned))
    assert rms_ratio(got, expected) < 1e-4
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in turned.tensors()}.values())
    assert kept <= 2 * sum(tensor.nbytes for tensor in turned.tensors())


def test_bfloat16_stays_close_and_recomputation_changes_nothing(net):
    inputs, targets = tokens(2, 70), tokens(2, 70)
    exact, rounded = like(net), like(net, RuntimeConfig(compute_dtype="bfloat16"))
    recomputed = like(net, RuntimeConfig(activation_checkpointing=True)).train()
    losses = [each(inputs, targets) for each in (exact, rounded, recomputed)]
    for loss in losses:
        loss.backward()
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-2)
    grads = [torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (exact, rounded, recomputed)]
    assert rms_ratio(grads[1], grads[0]) < 0.15
    assert torch.equal(grads[2], grads[0])


def test_every_parameter_learns_and_the_loss_falls(net):
    torch.manual_seed(0)
    fresh = Hymba(net.config)
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    optimizer = build_optimizer(fresh, OptimizerConfig())
    sequence = (3 + torch.arange(65) * 7 % 40)[None]
    losses = []
    for _ in range(25):
        loss = fresh(sequence[:, :-1], sequence[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert [name for name, p in fresh.named_parameters() if torch.equal(p, before[name])] == []


def test_it_is_calibrated_exported_and_read_back(net, tmp_path):
    scheme = QuantizationConfig(scheme="gptq", keep_float_numel=300, zstd_level=3)
    calibration = calibrate(net, scheme, [tokens(4, 40)])
    roles = roles_of(net)
    assert set(calibration.hessians) == {name for name, role in roles.items() if role is Role.MATRIX}
    save_artifact(
        tmp_path / "a",
        net.state_dict(),
        config=net.config.to_dict(),
        tokenizer={},
        metadata={},
        scheme=scheme,
        **calibration._asdict(),
    )
    artifact, report = inspect_artifact(tmp_path / "a")
    assert HymbaConfig.from_dict(artifact.config) == net.config
    for tensor in report.tensors:
        if roles[tensor.name] in (Role.CONTROL, Role.DYNAMICS):
            assert tensor.storage.startswith(("float32", "alias")), tensor.name
    stored = Hymba(net.config)
    stored.load_state_dict(load_artifact(tmp_path / "a").state_dict)
    with torch.no_grad():
        assert rms_ratio(stored(tokens(1, 50)), net(tokens(1, 50))) < 0.1


@pytest.mark.parametrize("parameters", ["all", "scalars", "low_rank"])
def test_it_is_scored_as_one_sequence_and_adapts(net, parameters):
    stream = tokens(161)
    chunks = [
        Chunk(i, 2, stream[80 * i : 80 * (i + 1) + 1], torch.full((80,), 3, dtype=torch.int16), 80 * i)
        for i in range(2)
    ]
    config = {"mode": "carried", "freeze_blocks": 0, "lr": 0.05, "parameters": parameters}
    scored = score_first_ttt(like(net), chunks, 24, TTTConfig(**config, epochs=0), stream=stream)
    with torch.no_grad():
        whole = net(stream[None, :-1], stream[None, 1:], reduction="none")[0]
    assert torch.allclose(torch.cat([chunk.nats for chunk in scored]), whole, atol=2e-4)
    adapting, before = like(net), net.state_dict()
    score_first_ttt(adapting, chunks, 24, TTTConfig(**config, epochs=4), stream=stream)
    roles = roles_of(net)
    moved = {name for name, p in adapting.named_parameters() if not torch.equal(p, before[name])}
    expected = {
        "all": set(roles),
        "scalars": {
            name for name, role in roles.items() if role in (Role.CONTROL, Role.SCALAR, Role.DYNAMICS, Role.CONVOLUTION)
        },
        "low_rank": {
            name for name, role in roles.items() if role is Role.MATRIX and not name.startswith("bigram_hash")
        },
    }
    assert moved == expected[parameters]
    with torch.no_grad():
        first = stream[None, :81]
        assert adapting(first[:, :-1], first[:, 1:]) < net(first[:, :-1], first[:, 1:])


def test_generated_tokens_are_the_full_forwards(net):
    prompts = [tokens(37).tolist(), tokens(5).tolist()]
    config = SamplingConfig(max_new_tokens=12, temperature=0.0, prefill_tokens=10)
    new = list(zip(*generate(net, prompts, config), strict=True))
    with torch.no_grad():
        for prompt, drawn in zip(prompts, new, strict=True):
            row = [*prompt, *(token for token in drawn if token is not None)]
            best = net(torch.tensor([row]))[0].argmax(-1)
            assert row[len(prompt) :] == best[len(prompt) - 1 : -1].tolist()


def test_scoring_goes_on_from_part_to_part(net):
    stream = tokens(101)
    scorer = CarriedScorer(net, 16, 0, rewarm=False)
    parts = [scorer.score(stream[a : b + 1]).nats for a, b in ((0, 33), (33, 34), (34, 100))]
    with torch.no_grad():
        whole = net(stream[None, :-1], stream[None, 1:], reduction="none")[0]
    assert torch.allclose(torch.cat(parts), whole, atol=2e-4)


def test_costs_are_told(net):
    assert train_flops_per_token(net, 64) > 6 * matmul_params(net) > 0
    estimate = estimate_memory(net.config, RuntimeConfig(), 4096, 1)
    without = estimate_memory(HymbaConfig(**(SMALL | {"d_model": 16, "n_heads": 2})), RuntimeConfig(), 4096, 1)
    assert estimate.activations > without.activations


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_evaluations_code_has_the_artifacts_mixer_and_no_other(mixer):
    names = {str(path) for path in needed_files(REFEREE, MIXERS[mixer])}
    # The released models' one is built on Mamba's.
    wanted = {"__init__.py", f"{mixer}.py"} | ({"mamba.py"} if mixer == "official" else set())
    assert {name.rpartition("/")[2] for name in names if "/model/mixers/" in name} == wanted
    assert any("/ops/ssd/" in name for name in names) == (mixer == "mamba2")
    assert any("/ops/selective_scan/" in name for name in names) == (mixer in ("mamba", "official"))
    assert evaluation_code_bytes(mixer) < evaluation_code_bytes("mamba") + 20_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "rwkv"}, "mixer='rwkv' is unknown: choose from .*mamba, mamba2"),
        ({"mixer_options": {"groups": 2}}, "mixer_options has groups, and 'mamba' takes none"),
        ({"mixer": "mamba2", "mixer_options": {"group": 2}}, "mixer_options has group, and 'mamba2' takes head_dim, g"),
        ({"mixer": "mamba2", "mixer_options": {"groups": 3}}, "groups=3 does not divide the 4 heads"),
        ({"mixer": "mamba2", "mixer_options": {"head_dim": 5}}, "head_dim=5 does not divide d_inner=32"),
        ({"d_state": 65}, "d_state=65 is over 64, the most that the scan's kernels hold"),
    ],
)
def test_what_a_mixer_does_not_have_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        outline(HymbaConfig(**(SMALL | changes)))


def test_options_of_a_mixer_survive_a_file_and_nothing_else_passes_for_them():
    config = HymbaConfig(**SMALL, mixer="mamba2", mixer_options={"groups": 2})
    assert HymbaConfig.from_dict(config.to_dict()) == config
    assert "mixer" not in HymbaConfig(**SMALL).to_dict()
    for options in ([1], {"groups": "2"}, {"groups": [2]}, {"groups": 1e300}, {3: 2}):
        with pytest.raises(ValueError, match="mixer_options="):
            HymbaConfig.from_dict(config.to_dict() | {"mixer_options": options})
