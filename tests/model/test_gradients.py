"""Gradients in one flat buffer: the same as autograd's own, whatever is summed, averaged or left out."""

import pytest
import torch
from tiny import NET

from hymba_lightning.model import Hymba, HymbaConfig, roles
from hymba_lightning.model.gradients import CALLS_BEFORE_RECORDING, MOST_GRAPHS, Gradients


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Hymba(HymbaConfig(**NET))


def batch(seed: int, shape: tuple[int, int] = (2, 33)) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, NET["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def autograds(net, *batches, weight=1.0):
    """What autograd leaves in `grad`; the gradients themselves are as before afterwards."""
    before = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    for inputs, targets in batches:
        (weight * net(inputs, targets)).backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    for parameter, grad in zip(net.parameters(), before, strict=True):
        parameter.grad = grad
    return found


def assert_grads(net, wanted):
    for name, parameter in net.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-7)


def test_gradients_add_up_until_they_are_cleared(net):
    first, second, third = (batch(seed) for seed in range(3))
    gradients = Gradients(net, list(net.parameters()), record=False)
    loss = gradients.add(*first, weight=0.5)
    assert not loss.requires_grad
    assert torch.equal(loss, net(*first).detach())
    gradients.add(*second, weight=0.5)
    assert_grads(net, autograds(net, first, second, weight=0.5))
    gradients.clear()
    gradients.add(*third)
    assert_grads(net, autograds(net, third))


def test_the_forward_sees_one_layout_however_the_inputs_lie(net):
    """A recording's inputs are dense: for others a compiled forward would be compiled again while it is recorded."""
    seen = []

    def forward(inputs, targets):
        seen.append((inputs.stride(), targets.stride()))
        return net(inputs, targets)

    gradients, (inputs, targets) = Gradients(forward, list(net.parameters()), record=False), batch(0)
    assert not inputs.is_contiguous()
    gradients.add(inputs, targets)
    gradients.add(inputs.clone(), targets.clone())
    assert seen[0] == seen[1] == ((32, 1), (32, 1))


def test_an_optimizer_that_drops_the_gradients_finds_them_again(net):
    gradients = Gradients(net, list(net.parameters()), record=False)
    for seed in range(2):
        gradients.add(*batch(seed))
        assert_grads(net, autograds(net, batch(seed)))
        net.zero_grad(set_to_none=True)
        gradients.clear()


def test_a_parameter_that_the_loss_does_not_need_has_no_gradient(net):
    net.unused = roles.parameter(torch.ones(3), roles.Role.SCALAR)
    net.frozen = roles.parameter(torch.ones(3), roles.Role.SCALAR).requires_grad_(False)
    gradients = Gradients(net, list(net.parameters()), record=False)
    for seed in range(2):
        gradients.add(*batch(seed))
        assert net.unused.grad is None
        assert net.frozen.grad is None
        assert_grads(net, autograds(net, batch(seed)))
        gradients.clear()


def test_parameters_may_have_several_dtypes(net):
    for block in net.blocks:
        block.attn.A_log.data = block.attn.A_log.data.bfloat16()
    gradients = Gradients(net, list(net.parameters()), record=False)
    gradients.add(*batch(0))
    assert [flat.dtype for flat in gradients.flat] == [torch.float32, torch.bfloat16]
    assert_grads(net, autograds(net, batch(0)))


def test_every_gradient_begins_where_kernels_read_four_numbers_at_once(net):
    Gradients(net, list(net.parameters()), record=False).add(*batch(1))
    assert any(parameter.numel() % 4 for parameter in net.parameters())
    assert {parameter.grad.data_ptr() % 16 for parameter in net.parameters() if parameter.grad is not None} == {0}


def test_parameters_on_two_devices_are_refused(net):
    with pytest.raises(ValueError, match="on one device, not on 2"):
        Gradients(net, [*net.parameters(), torch.nn.Parameter(torch.ones(2, device="meta"))], record=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_replayed_graph_gives_the_gradients_of_the_weights_as_they_are(net, compiled):
    net = net.cuda()
    forward = torch.compile(net.forward, dynamic=False) if compiled else net
    gradients = Gradients(forward, list(net.parameters()), record=True)
    for seed in range(CALLS_BEFORE_RECORDING + 4):
        inputs, targets = (ids.cuda() for ids in batch(seed))
        weight = 1 / (1 + seed % 2)
        loss = gradients.add(inputs, targets, weight)
        torch.testing.assert_close(loss, net(inputs, targets).detach(), rtol=1e-4, atol=1e-5)
        wanted = autograds(net, (inputs, targets), weight=weight)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        gradients.clear()
    assert gradients.shapes_recorded == [(2, 32)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ever_new_shapes_do_not_fill_the_memory(net):
    net = net.cuda()
    gradients = Gradients(net, list(net.parameters()), record=True)
    for length in range(10, 10 + MOST_GRAPHS + 2):
        for seed in range(CALLS_BEFORE_RECORDING + 1):
            inputs, targets = (ids.cuda() for ids in batch(seed, (1, length)))
            gradients.add(inputs, targets)
            torch.testing.assert_close(gradients.add(inputs, targets), net(inputs, targets).detach())
    assert len(gradients.shapes_recorded) == MOST_GRAPHS
