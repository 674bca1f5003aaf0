"""The composite optimizer: torch's Adam, exact state, schedule, clipping and accumulation under Lightning."""

import copy

import pytest
import torch
from tiny_lightning import TinyData, TinyModule, TinyNet, assert_same, make_batch, make_trainer

from hymba_lightning.training.optim import HymbaOptimizer, OptimizerConfig, build_optimizer
from hymba_lightning.training.optimizers import OPTIMIZERS, optimizer_class

CONFIG = OptimizerConfig(warmdown_iters=4)


def gradients(net: TinyNet, index: int) -> None:
    net.zero_grad()
    logits = net(make_batch(index)[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), make_batch(index)[:, 1:].flatten()).backward()


def make(config: OptimizerConfig = CONFIG) -> tuple[TinyNet, HymbaOptimizer]:
    torch.manual_seed(0)
    net = TinyNet(dropout=0.0)
    return net, build_optimizer(net, config)


def test_adam_groups_move_exactly_as_torch_adam():
    net, optimizer = make()
    twin = copy.deepcopy(net)
    names = [n for n, _ in net.named_parameters() if not n.endswith(("c_q.weight", "attn.proj.weight"))]
    lr = {"tok_emb.weight": 0.02, "A_log": 0.002, "dt_proj.weight": 0.002, "dt_proj.bias": 0.002}
    theirs = [
        {"params": [p], "lr": next((v for k, v in lr.items() if n.endswith(k)), 0.02)}
        for n, p in twin.named_parameters()
        if n in names
    ]
    adam = torch.optim.Adam(theirs, betas=(0.9, 0.95), eps=1e-8, foreach=True)
    for index in range(3):
        gradients(net, index)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        adam.step()
    weights, expected = dict(net.named_parameters()), dict(twin.named_parameters())
    for name in names:
        assert torch.equal(weights[name], expected[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_bit_exact_through_the_state_dict(name):
    config = OptimizerConfig(warmdown_iters=4, name=name)
    net, optimizer = make(config)
    for index in range(3):
        gradients(net, index)
        optimizer.step()
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    for index in range(3, 6):
        gradients(net, index)
        optimizer.step()
    other, resumed = make(config)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for index in range(3, 6):
        gradients(other, index)
        resumed.step()
    assert_same(
        {k: v for k, v in net.state_dict().items() if k != "calls"},
        {k: v for k, v in other.state_dict().items() if k != "calls"},
    )
    ours, theirs = optimizer.state_dict(), resumed.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in ours["state"].items():
        assert_same(state, theirs["state"][index])


def test_neuron_moments_are_state_and_decay_may_follow_the_rate():
    config = OptimizerConfig(
        warmdown_iters=4,
        muon_neuron_beta=0.9,
        cautious_decay=True,
        decay_with_lr=True,
        weight_decay=0.4,
        embed_decay=0.2,
    )
    net, optimizer = make(config)
    optimizer.set_schedule(0.5, 0.9)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays["matrices"] == 0.2
    assert decays["embed"] == 0.1
    assert decays["scalars"] == 0
    gradients(net, 0)
    optimizer.step()
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other, resumed = make(config)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for running, rule in ((net, optimizer), (other, resumed)):
        gradients(running, 1)
        rule.set_schedule(0.5, 0.9)
        rule.step()
    for (name, a), (_, b) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    moments = [state["neuron_moment"] for state in optimizer.state.values() if "neuron_moment" in state]
    assert moments
    assert all((moment > 0).all() for moment in moments)


def test_momentum_of_bfloat16_weights_survives_a_resume_in_float32():
    net, optimizer = make()
    net.bfloat16()
    gradients(net, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    weight = net.blocks[0].attn.proj.weight
    buffer = optimizer.state[weight]["momentum_buffer"]
    index = next(i for g in saved["param_groups"] if g["name"] == "matrices" for i in g["params"])
    assert buffer.dtype == torch.float32
    assert any(torch.equal(buffer, s["momentum_buffer"]) for s in saved["state"].values() if "momentum_buffer" in s)
    assert saved["state"][index]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copy_of_the_optimizer_trains_its_own_parameters(name):
    net, optimizer = make(OptimizerConfig(warmdown_iters=4, name=name))
    gradients(net, 0)
    optimizer.step()
    net2, optimizer2 = copy.deepcopy((net, optimizer))
    gradients(net2, 1)
    before = net.tok_emb.weight.detach().clone()
    optimizer2.step()
    assert torch.equal(net.tok_emb.weight, before)
    assert not torch.equal(net2.tok_emb.weight, before)
    assert not torch.equal(net2.blocks[0].attn.proj.weight, net.blocks[0].attn.proj.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_with_its_own_rate_of_the_matrices(name):
    net, optimizer = make(OptimizerConfig(name=name, weight_decay=0.1))
    start = copy.deepcopy(dict(net.named_parameters()))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["matrices"]["lr"] == optimizer_class(name).matrix_lr
    assert groups["matrices"]["weight_decay"] == 0.1
    assert {group["algorithm"] for key, group in groups.items() if key != "matrices"} == {"adam"}
    losses = []
    for _ in range(30):
        gradients(net, 0)
        with torch.no_grad():
            logits = net(make_batch(0)[:, :-1])
        losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), make_batch(0)[:, 1:].flatten())))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3
    assert [key for key, p in net.named_parameters() if torch.equal(p, start[key])] == []


def test_lion_moves_every_weight_of_a_matrix_by_the_rate_along_the_sign_of_a_momentum():
    net, optimizer = make(OptimizerConfig(name="lion", matrix_lr=0.1, weight_decay=0.5))
    weight = net.blocks[0].attn.proj.weight
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for index in range(3):
        gradients(net, index)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * (0.9 * momentum + 0.1 * weight.grad).sign()
        momentum = 0.99 * momentum + 0.01 * weight.grad
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_an_optimizer_is_known_by_its_file_and_takes_its_own_options_only():
    assert {"adamw", "lion", "muon"} <= set(OPTIMIZERS)
    _, optimizer = make(OptimizerConfig(name="lion", options={"beta1": 0.5}))
    assert optimizer.rule == {"beta1": 0.5, "beta2": 0.99}
    with pytest.raises(ValueError, match=r"options has momentum, and 'lion' takes beta1, beta2"):
        make(OptimizerConfig(name="lion", options={"momentum": 0.9}))
    with pytest.raises(ValueError, match="options has beta1, and 'muon' takes none"):
        make(OptimizerConfig(options={"beta1": 0.9}))
    with pytest.raises(ValueError, match=r"optimizer\.name is 'sophia'; use one of adamw, lion, muon"):
        OptimizerConfig(name="sophia")


def test_other_groups_are_refused():
    _, optimizer = make()
    _, defective = make(OptimizerConfig(train_conv=False))
    with pytest.raises(ValueError, match=r"'untrained'.*'conv'"):
        optimizer.load_state_dict(defective.state_dict())


@pytest.mark.parametrize(("first", "then"), [("muon", "adamw"), ("adamw", "lion"), ("lion", "muon")])
def test_another_optimizers_state_is_refused(first, then):
    net, optimizer = make(OptimizerConfig(warmdown_iters=4, name=first))
    gradients(net, 0)
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"updates matrices by \w+, this run's by \w+: resume with the model.optimizer"
    ):
        make(OptimizerConfig(warmdown_iters=4, name=then))[1].load_state_dict(optimizer.state_dict())


def test_schedule_scales_every_group_and_sets_only_muons_momentum():
    _, optimizer = make()
    optimizer.set_schedule(0.25, 0.9)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25 * group["base_lr"]
        assert group["momentum"] == (0.9 if group["algorithm"] == "muon" else 0.0)


def test_untrained_group_stays_but_its_gradients_are_cleared():
    net, optimizer = make(OptimizerConfig(train_conv=False))
    before = net.blocks[0].attn.conv1d.weight.detach().clone()
    gradients(net, 0)
    assert net.blocks[0].attn.conv1d.weight.grad.abs().sum() > 0
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(net.blocks[0].attn.conv1d.weight, before)
    assert net.blocks[0].attn.conv1d.weight.grad is None
    assert not torch.equal(net.blocks[0].attn.conv1d.bias, torch.zeros(8))


def test_only_matrices_decay():
    net, optimizer = make(OptimizerConfig(weight_decay=0.5))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 1 - 0.02 * 0.5 if name.endswith(("c_q.weight", "attn.proj.weight")) else 1.0
        assert torch.allclose(p, factor * before[name], atol=1e-7), name


def test_closure_runs_with_gradients_and_returns_its_loss():
    net, optimizer = make()

    def closure():
        assert torch.is_grad_enabled()
        gradients(net, 0)
        return torch.tensor(3.0)

    before = net.tok_emb.weight.detach().clone()
    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
    assert not torch.equal(before, net.tok_emb.weight)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}])
def test_lightning_counts_steps_accumulates_and_clips(tmp_path, options):
    module, data = TinyModule(dropout=0.0), TinyData()
    trainer = make_trainer(tmp_path, [], max_steps=4, **options)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    twin = TinyModule(dropout=0.0)
    optimizer = build_optimizer(twin.net, CONFIG)
    micro = options.get("accumulate_grad_batches", 1)
    for step in range(4):
        optimizer.zero_grad()
        for i in range(micro):
            (twin.loss(make_batch(step * micro + i)) / micro).backward()
        if "gradient_clip_val" in options:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
        optimizer.step()
    assert_same(dict(module.net.named_parameters()), dict(twin.net.named_parameters()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("matrix_lr", -1.0),
        ("embed_lr", float("nan")),
        ("matrix_lr", 1e300),
        ("muon_momentum", 1.0),
        ("adam_betas", (0.9,)),
        ("adam_eps", 0.0),
        ("ns_steps", 0),
        ("warmdown_iters", -1),
        ("warmdown_shape", "exp"),
        ("warmup_share", 1.5),
        ("warmdown_share", -0.1),
        ("momentum_warmup_share", float("nan")),
        ("lr_floor", 2.0),
        ("muon_momentum_warmup_steps", -1),
        ("muon_coefficients", "cubic"),
        ("muon_dtype", "float16"),
    ],
)
def test_config_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})
