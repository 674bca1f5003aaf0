"""Weights that torch's pruning and parametrizations make: what they say is computed wherever the weight is read."""

import pytest
import torch
from official_statement import SMALL
from tiny import NET, lively
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hymba_lightning import Hymba, HymbaConfig
from hymba_lightning.generation.steps import Steps
from hymba_lightning.interop import official
from hymba_lightning.model.roles import RoleError, roles_of
from hymba_lightning.ops.testing import rms_ratio

IDS = torch.randint(3, 1024, (2, 24), generator=torch.Generator().manual_seed(0))


class Half(nn.Module):
    def forward(self, weight):
        return weight * (torch.arange(weight.numel()).view_as(weight) % 2)


def pruned(module, name):
    mask = torch.arange(getattr(module, name).numel()).view_as(getattr(module, name)) % 2
    prune.custom_from_mask(module, name, mask)


def parametrized(module, name):
    parametrize.register_parametrization(module, name, Half())


def of(net, path):
    owner, _, name = path.rpartition(".")
    return net.get_submodule(owner), name


def network(**change):
    return lively(HymbaConfig(**(NET | change), tied_embed_std=0.3)).eval()


# Each is read in another way: joined with others, fused in training, never called, as the head, as a mixer's own.
PATHS = [
    "blocks.0.attn.c_q.weight",
    "blocks.0.attn.kv_proj.weight",
    "blocks.1.attn.proj.weight",
    "blocks.0.mlp.fc.weight",
    "blocks.0.attn.dt_proj.weight",
    "blocks.0.attn.dt_proj.bias",
    "blocks.0.attn.conv1d.weight",
    "blocks.1.attn.A_log",
    "blocks.0.attn_scale",
    "tok_emb.weight",
    "bigram_hash.table.weight",
    "smeargate.gate",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spoil", [pruned, parametrized])
def test_what_is_masked_is_masked_in_training_in_a_look_and_in_a_tokens_step(path, spoil):
    net, plain = network(), network()
    before = plain(IDS).detach()
    spoil(*of(net, path))
    # A mask holds after the weights have changed, too.
    with torch.no_grad():
        for parameter in of(net, path)[0].parameters():
            parameter *= 1.5
        for name, parameter in of(plain, path)[0].named_parameters():
            parameter *= 1.5
            if name == of(plain, path)[1]:
                parameter.copy_(Half()(parameter))
    assert (plain(IDS) - before).abs().max() > 1e-4
    for reads in (torch.enable_grad, torch.no_grad):
        with reads():
            assert rms_ratio(net(IDS).detach(), plain(IDS).detach()) < 1e-5
    steps = [Steps(each) for each in (net, plain)]
    for each in steps:
        each.read(IDS[:, :10], 64)
    for t in range(10, 24):
        ours, wanted = (each.read(IDS[:, t : t + 1], 64) for each in steps)
        assert rms_ratio(ours, wanted) < 1e-5


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_what_is_pruned_everywhere_learns_and_is_made_permanent(mixer, tmp_path):
    net = network(mixer=mixer).train()
    parts = [(module, "weight") for module in net.modules() if "weight" in module._parameters]
    prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=0.3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = net(IDS, IDS.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert len(roles_of(net)) == len(roles_of(network(mixer=mixer)))
    with pytest.raises(ValueError, match=r"weight_mask is no weight of the network, .* make it one again by torch"):
        net.save_pretrained(tmp_path)
    wanted = net.eval()(IDS).detach()
    for module, name in parts:
        prune.remove(module, name)
    assert 0.25 < sum(int((m.weight == 0).sum()) for m, _ in parts) / sum(m.weight.numel() for m, _ in parts) < 0.35
    again = network(mixer=mixer)
    again.load_state_dict(net.state_dict())
    assert rms_ratio(again(IDS).detach(), wanted) < 1e-5


@pytest.mark.parametrize(
    "normalise",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_normalised_weights_are_normalised_in_a_tokens_step_and_not_saved_in_parts(normalise, tmp_path):
    net = network()
    normalise(net.blocks[0].attn.c_q)
    net.eval()
    with torch.no_grad():
        for parameter in net.blocks[0].attn.c_q.parameters():
            parameter *= 1.5
        wanted = net(IDS)[:, -1]
        reader = Steps(net)
        reader.read(IDS[:, :-1], 64)
        assert rms_ratio(reader.read(IDS[:, -1:], 64), wanted) < 1e-5
    with pytest.raises(ValueError, match="is no weight of the network, but a part of one that is pruned"):
        net.save_pretrained(tmp_path)


def test_a_released_network_that_is_pruned_is_not_written_as_one():
    net = Hymba(official.config_from_hf(SMALL))
    prune.random_unstructured(net.blocks[0].attn.in_proj, "weight", amount=0.5)
    with pytest.raises(ValueError, match="weight_mask is no weight of the network"):
        official.weights_to_hf(net)


def test_a_parametrized_network_has_no_roles_until_it_is_whole_again():
    net = network()
    parametrized(net.blocks[0].attn.c_q, "weight")
    with pytest.raises(
        RoleError, match=r"original has no role: .* where a parametrization .* remove or merge that first"
    ):
        roles_of(net)
    parametrize.remove_parametrizations(net.blocks[0].attn.c_q, "weight")
    assert roles_of(net) == roles_of(network())


def test_a_hook_on_the_network_itself_would_be_passed_over_and_is_refused():
    net = network()
    with pytest.raises(RoleError, match=r"Hymba\.skip_weights cannot be pruned .*: use torch\.nn\.utils\.parametrize"):
        prune.random_unstructured(net, "skip_weights", amount=0.5)
    assert roles_of(net) == roles_of(network())
    parametrized(net, "skip_weights")
    wanted = network()
    wanted.skip_weights.data.copy_(Half()(wanted.skip_weights.data))
    assert rms_ratio(net(IDS).detach(), wanted(IDS).detach()) < 1e-5
