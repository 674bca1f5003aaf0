"""The network that trains here against the reference's numbers: logits, loss and every gradient, in float32."""

import pytest
import torch
from golden_vectors import arrays, network, settings

from hymba_lightning.interop.reference import to_reference
from hymba_lightning.ops.testing import rms_ratio

NETS = ["model_seed_shape", "model_paper_options"]


@pytest.fixture(scope="module", params=NETS)
def golden(request):
    """The vectors, the imported network after one backward pass, and its logits and loss."""
    vectors, config = arrays(request.param), settings(request.param)
    net = network(config, vectors)
    with torch.no_grad():
        logits = net(vectors["input_ids"])
    loss = net(vectors["input_ids"], vectors["target_ids"])
    loss.backward()
    return vectors, config, net, logits, loss.detach()


def test_logits_and_loss(golden):
    vectors, _, _, logits, loss = golden
    assert rms_ratio(logits, vectors["logits"]) < 2e-5
    assert float(loss) == pytest.approx(float(vectors["loss"]), rel=2e-5)


def test_every_gradient(golden):
    vectors, _, net, _, _ = golden
    expected = {
        name.removeprefix("grad/").replace("_meta_tokens_param", "meta_tokens"): gradient
        for name, gradient in vectors.items()
        if name.startswith("grad/")
    }
    # A shared projection is one parameter under every sharer's name.
    gradients = {name: parameter.grad for name, parameter in net.named_parameters(remove_duplicate=False)}
    assert set(gradients) == set(expected)
    ratios = {name: rms_ratio(gradient, expected[name]) for name, gradient in gradients.items()}
    assert {name: ratio for name, ratio in ratios.items() if not ratio < 1e-4} == {}


def test_inverse_writes_the_reference_config_and_weights(golden):
    vectors, config, net, _, _ = golden
    back_config, back_weights = to_reference(net)
    assert back_config == config
    weights = {name.removeprefix("param/"): value for name, value in vectors.items() if name.startswith("param/")}
    assert set(back_weights) == set(weights)
    assert all(torch.equal(back_weights[name], weight) for name, weight in weights.items())


def test_repairing_a_defect_changes_the_numbers(golden):
    """A document start in the middle of a sequence, across which the reference smears and hashes."""
    vectors, _, net, _, _ = golden
    ids = vectors["input_ids"].clone()
    ids[:, 10] = net.config.bos_id
    repaired = type(net)(type(net.config)(**net.config.to_dict() | {"reset_at_bos": True}))
    repaired.load_state_dict(net.state_dict())
    with torch.no_grad():
        difference = rms_ratio(repaired(ids)[:, 10:], net(ids)[:, 10:])
    has_reach = net.config.smear_gate or net.config.bigram_hash
    assert (difference > 1e-3) == has_reach
