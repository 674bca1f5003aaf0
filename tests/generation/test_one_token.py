"""The step made for one token on a CPU: the ordinary call's logits and state, and the ordinary call where it is not."""

import pytest
import torch
from tiny import NET, lively

from hymba_lightning.evaluation import carried
from hymba_lightning.generation import SamplingConfig, generate, steps
from hymba_lightning.generation.rows import join
from hymba_lightning.generation.steps import Steps
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig, one_token
from hymba_lightning.model.one_token import OneToken, serves
from hymba_lightning.ops.testing import rms_ratio

BASE = NET | {"vocab_size": 64, "n_layers": 4, "window": 8, "tied_embed_std": 0.3, "bos_id": 1}
VARIANTS = {
    "default": {},
    "a gate for each channel, normed branches": {"merge": "channel", "branch_norm": True},
    "side by side, normed": {"merge": "concat", "branch_norm": True, "dynamics_norm": True},
    "side by side": {"merge": "concat"},
    "gated values, a head of its own, no softcap": {
        "value_gate": True,
        "tie_embeddings": False,
        "logit_softcap": 0.0,
    },
    "neither bigrams nor smearing": {"bigram_hash": False, "smear_gate": False},
    "nothing reset": {"reset_at_bos": False},
    "shared keys, some layers global": {"kv_share_every": 2, "global_layers": [0, 3]},
    "windows of one and five": {"layer_windows": [1, 5, 8, 40], "d_conv": 1},
    "meta tokens, scaled positions": {"meta_tokens": 3, "rope_scale": 2.0},
}


@pytest.fixture
def little_room(monkeypatch):
    """Buffers that are full after three tokens."""
    monkeypatch.setattr(one_token, "ROOM", 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_state_are_the_ordinary_ones(variant, little_room):
    torch.manual_seed(3)
    net = lively(HymbaConfig(**BASE | VARIANTS[variant]))
    ids_BT = torch.randint(0, 64, (2, 50))
    ids_BT[0, 25] = ids_BT[1, 30] = 1
    expected_BV, state = carried.read(net, ids_BT[:, :11], None, 64)
    assert serves(net)
    step = OneToken(net)
    assert step.load(state)
    for t in range(11, 40):
        expected_BV, state = carried.read(net, ids_BT[:, t : t + 1], state, 64)
        assert rms_ratio(net.logits(step.hidden(ids_BT[:, t : t + 1]))[:, 0], expected_BV) < 1e-5
    found = step.state()
    assert found.position == state.position
    for actual, wanted in zip(found.tensors(), state.tensors(), strict=True):
        assert actual.shape == wanted.shape
        assert actual.numel() == 0 or rms_ratio(actual, wanted) < 1e-5
    # What goes on by the ordinary call.
    assert (
        rms_ratio(carried.read(net, ids_BT[:, 40:], found, 64)[0], carried.read(net, ids_BT[:, 40:], state, 64)[0])
        < 1e-5
    )


def test_states_that_are_handed_out_stay_as_they_were(little_room):
    net = lively(HymbaConfig(**BASE))
    _, state = carried.read(net, torch.randint(0, 64, (1, 20)), None, 64)
    before = [tensor.clone() for tensor in state.tensors()]
    reader = Steps(net, state)
    for token in range(5):
        reader.read(torch.tensor([[token]]), 64)
        between = reader.state
        kept = [tensor.clone() for tensor in between.tensors()]
        reader.read(torch.tensor([[token]]), 64)
        assert all(map(torch.equal, between.tensors(), kept))
    assert all(map(torch.equal, state.tensors(), before))


def test_weights_that_change_in_place_are_seen():
    net = lively(HymbaConfig(**BASE))
    _, state = carried.read(net, torch.randint(0, 64, (1, 20)), None, 64)
    reader, token = Steps(net, state), torch.tensor([[5]])
    reader.read(token, 64)
    with torch.no_grad():
        net.blocks[2].attn.proj.weight.mul_(1.5)
    expected, _ = carried.read(net, token, reader.state, 64)
    assert rms_ratio(reader.read(token, 64), expected) < 1e-5


def written(net):
    net.load_state_dict({name: value * 1.3 for name, value in net.state_dict().items()})


def assigned(net):
    net.load_state_dict({name: value * 1.3 for name, value in net.state_dict().items()}, assign=True)


def given_other_storage(net):
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.3


def turned_to_bfloat16(net):
    net.to(torch.bfloat16)


def wrapped(net):
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    net.blocks[1].mlp = Doubled(net.blocks[1].mlp)


def forward_in_an_object(net):
    """As accelerate hooks a module."""
    mlp, inner = net.blocks[1].mlp, net.blocks[1].mlp.forward
    mlp.forward = lambda *given: 2 * inner(*given)


def other_runtime(net):
    net.runtime = RuntimeConfig(compute_dtype="bfloat16")


def of_all_modules(net, hook):
    return torch.nn.modules.module.register_module_forward_hook(
        lambda module, *call: hook() if module is net.blocks[1] else None
    )


@pytest.mark.parametrize(
    "register", [lambda net, hook: net.blocks[1].register_forward_hook(lambda *call: hook()), of_all_modules]
)
def test_a_hook_that_comes_later_is_called_for_every_token(register):
    net = lively(HymbaConfig(**BASE))
    _, state = carried.read(net, torch.randint(0, 64, (1, 20)), None, 64)
    reader, seen = Steps(net, state), []
    reader.read(torch.tensor([[5]]), 64)
    hook = register(net, lambda: seen.append(1))
    for _ in range(3):
        reader.read(torch.tensor([[5]]), 64)
    assert len(seen) == 3
    hook.remove()
    reader.renew()
    reader.read(torch.tensor([[5]]), 64)
    assert reader._one is not None


@pytest.mark.parametrize("fixed", [None, True], ids=["one token", "fixed memory"])
@pytest.mark.parametrize(
    "change",
    [
        written,
        assigned,
        given_other_storage,
        turned_to_bfloat16,
        wrapped,
        forward_in_an_object,
        other_runtime,
    ],
)
def test_a_network_that_changes_between_tokens_counts_from_the_next_one_on(change, fixed, monkeypatch):
    monkeypatch.setattr(steps, "STEPS_BEFORE_RECORDING", 1)
    net = lively(HymbaConfig(**BASE))
    _, state = carried.read(net, torch.randint(0, 64, (1, 20)), None, 64)
    reader, token = Steps(net, state, fixed), torch.tensor([[5]])
    for _ in range(3):
        reader.read(token, 64)
    made = reader._fixed or reader._one
    assert made is not None
    change(net)
    expected, _ = carried.read(net, token, reader.state, 64)
    assert rms_ratio(reader.read(token, 64), expected) < 1e-5
    assert (reader._fixed or reader._one) is not made or change is written


def test_what_was_written_unseen_counts_after_renew():
    net = lively(HymbaConfig(**BASE))
    _, state = carried.read(net, torch.randint(0, 64, (1, 20)), None, 64)
    reader, token = Steps(net, state), torch.tensor([[5]])
    reader.read(token, 64)
    net.blocks[2].attn.proj.weight.data += 0.5
    reader.renew()
    expected, _ = carried.read(net, token, reader.state, 64)
    assert rms_ratio(reader.read(token, 64), expected) < 1e-5


@pytest.mark.parametrize("fixed", [None, True], ids=["one token", "fixed memory"])
def test_a_text_begun_in_inference_mode_goes_on_outside_of_it(fixed, monkeypatch, little_room):
    monkeypatch.setattr(steps, "STEPS_BEFORE_RECORDING", 1)
    net = lively(HymbaConfig(**BASE))
    ids = torch.randint(0, 64, (1, 40))
    with torch.inference_mode():
        _, state = carried.read(net, ids[:, :10], None, 64)
        reader = Steps(net, state, fixed)
        for t in range(10, 20):
            reader.read(ids[:, t : t + 1], 64)
    for t in range(20, 40):
        logits_BV = reader.read(ids[:, t : t + 1], 64)
    assert rms_ratio(logits_BV, net(ids)[:, -1]) < 1e-5


@pytest.mark.parametrize("fixed", [None, True], ids=["one token", "fixed memory"])
def test_a_text_may_enter_and_leave_autocast(fixed, monkeypatch):
    monkeypatch.setattr(steps, "STEPS_BEFORE_RECORDING", 1)
    net = lively(HymbaConfig(**BASE))
    ids = torch.randint(0, 64, (1, 30))
    _, state = carried.read(net, ids[:, :10], None, 64)
    reader = Steps(net, state, fixed)
    for t in range(10, 29):
        with torch.autocast("cpu", torch.bfloat16, enabled=12 < t < 18):
            reader.read(ids[:, t : t + 1], 64)
    assert rms_ratio(reader.read(ids[:, 29:], 64), net(ids)[:, -1]) < 0.02


def test_an_interrupted_token_can_be_read_again(monkeypatch):
    """No layer has read it where another has not."""
    net = lively(HymbaConfig(**BASE))
    ids = torch.randint(0, 64, (2, 30))
    _, state = carried.read(net, ids[:, :10], None, 64)
    step = OneToken(net)
    step.load(state)
    ordinary = one_token._Layer.step

    def interrupted(layer, *values):
        if layer is step._layers[2]:
            raise KeyboardInterrupt
        return ordinary(layer, *values)

    for t in range(10, 30):
        with monkeypatch.context() as patch:
            patch.setattr(one_token._Layer, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                step.hidden(ids[:, t : t + 1])
        hidden_B1D = step.hidden(ids[:, t : t + 1])
    assert rms_ratio(net.logits(hidden_B1D)[:, 0], net(ids)[:, -1]) < 1e-5


@pytest.mark.parametrize("fixed", [None, True, False], ids=["one token", "fixed memory", "ordinary"])
def test_another_number_of_rows_than_was_read_is_refused(fixed, monkeypatch):
    monkeypatch.setattr(steps, "STEPS_BEFORE_RECORDING", 1)
    monkeypatch.setattr(steps, "serves", lambda net: fixed is None)
    net = lively(HymbaConfig(**BASE))
    _, state = carried.read(net, torch.randint(0, 64, (2, 9)), None, 64)
    reader = Steps(net, state, fixed)
    for _ in range(3):
        reader.read(torch.tensor([[5], [6]]), 64)
    with pytest.raises(ValueError, match="1 tokens were given for 2 rows: give one a row"):
        reader.read(torch.tensor([[5]]), 64)


def with_a_hook(net):
    net.blocks[1].mlp.register_forward_hook(lambda *call: None)


def with_an_adapter(net):
    class Adapter(torch.nn.Linear):
        pass

    net.blocks[0].attn.c_q = Adapter(32, 32, bias=False)


@pytest.mark.parametrize(
    ("changes", "runtime", "spoil"),
    [
        ({"branch_gate": 4}, {}, None),
        ({"packed_documents": True}, {}, None),
        ({"mixer": "mamba2"}, {}, None),
        ({"dynamics_dtype": "bfloat16"}, {}, None),
        ({}, {"compute_dtype": "bfloat16"}, None),
        ({}, {}, with_a_hook),
        ({}, {}, with_an_adapter),
    ],
    ids=["gates", "documents", "mamba2", "bfloat16 dynamics", "bfloat16", "hook", "adapter"],
)
def test_other_networks_are_read_by_the_ordinary_call(changes, runtime, spoil):
    net = lively(HymbaConfig(**BASE | changes))
    net = Hymba(net.config, RuntimeConfig(**runtime)).eval() if runtime else net
    if spoil is not None:
        assert serves(net)
        spoil(net)
    assert not serves(net)
    _, state = carried.read(net, torch.randint(0, 64, (1, 9)), None, 64)
    reader, token = Steps(net, state), torch.tensor([[5]])
    expected, after = carried.read(net, token, state, 64)
    assert torch.equal(reader.read(token, 64), expected)
    assert all(map(torch.equal, reader.state.tensors(), after.tensors()))


def test_rows_of_unequal_length_are_read_by_the_ordinary_call():
    net = lively(HymbaConfig(**BASE))
    states = [carried.read(net, torch.randint(0, 64, (1, n)), None, 64)[1] for n in (3, 5)]
    step = OneToken(net)
    assert [step.load(state) for state in (join(states), states[0])] == [False, True]
    reader, tokens = Steps(net, join(states)), torch.tensor([[5], [6]])
    assert torch.equal(reader.read(tokens, 64), carried.read(net, tokens, join(states), 64)[0])


def test_generation_draws_the_same_tokens_and_uses_the_step(monkeypatch):
    net = lively(HymbaConfig(**BASE))
    prompts, config = torch.randint(2, 64, (3, 15)), SamplingConfig(max_new_tokens=40, temperature=1.0)
    counts, ordinary = [], OneToken.hidden

    def counted(self, ids_B1):
        counts.append(len(ids_B1))
        return ordinary(self, ids_B1)

    def drawn():
        ended, found = set(), []
        for new in generate(net, prompts, config, ended=ended):
            found.append(new)
            if len(found) == 10:
                ended.add(1)
        return found

    monkeypatch.setattr(OneToken, "hidden", counted)
    found = drawn()
    assert counts == 9 * [3] + 30 * [2]
    monkeypatch.setattr(steps, "serves", lambda net: False)
    assert drawn() == found


def test_positions_are_turned_back_as_in_the_ordinary_call(monkeypatch):
    for module in (carried, steps):
        monkeypatch.setattr(module, "REBASE_AT", 30)
    net = lively(HymbaConfig(**BASE))
    ids_BT = torch.randint(0, 64, (1, 80))
    _, state = carried.read(net, ids_BT[:, :20], None, 64)
    reader = Steps(net, state)
    for t in range(20, 80):
        expected, state = carried.read(net, ids_BT[:, t : t + 1], state, 64)
        assert rms_ratio(reader.read(ids_BT[:, t : t + 1], 64), expected) < 1e-5
        assert reader.state.position == state.position < 30
