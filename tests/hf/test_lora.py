"""LoRA through peft: adapters stand in the place of our linears, and what they say is what is computed."""

import importlib

import official_statement as statement
import pytest
import torch
from official_statement import SMALL
from tiny import NET, lively

from hymba_lightning import Hymba, HymbaConfig
from hymba_lightning.interop import official
from hymba_lightning.ops.testing import rms_ratio

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
hf = importlib.import_module("hymba_lightning.hf")

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
OURS = ["c_q", "kv_proj", "mamba_proj", "mamba_out_proj", "proj", "fc"]
THEIRS = ["in_proj", "out_proj", "gate", "up", "down", "x_proj"]


def ours(**change) -> Hymba:
    return lively(HymbaConfig(**(NET | change), tied_embed_std=0.3))


def released(**change) -> Hymba:
    config = official.config_from_hf(SMALL)
    net = Hymba(config)
    net.load_state_dict(official.weights_from_hf(config, statement.random_weights(SMALL)))
    return net


NETWORKS = {
    "ours": (ours, {}, OURS),
    "ours, own head": (ours, {"tie_embeddings": False, "merge": "concat"}, ["c_q", "lm_head", "proj"]),
    "mamba2": (ours, {"mixer": "mamba2"}, OURS),
    "released": (released, {}, THEIRS),
}


@pytest.fixture(params=NETWORKS, ids=str)
def adapted(request, tmp_path):
    """A transformers model of a network, and the same with adapters."""
    make, change, targets = NETWORKS[request.param]
    folder = make(**change).save_pretrained(tmp_path / "net")
    plain, base = (transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    torch.manual_seed(0)
    # Adapters that already say something.
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return plain, peft.get_peft_model(base, config).eval(), targets


def merged(plain, model):
    """The plain network with the adapters' products added to its weights."""
    state = plain.net.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            key = name.removeprefix("base_model.model.net.") + ".weight"
            added = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            state[key] = state[key] + added
    plain.net.load_state_dict(state)
    return plain


def test_an_adapted_network_is_the_one_with_the_sum_of_weights(adapted):
    plain, model, targets = adapted
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert found == set(targets)
    before = plain(IDS).logits
    with torch.no_grad():
        # A prompt, one token, and the way with gradients are three ways to multiply.
        wanted = merged(plain, model)(IDS).logits
        assert (before - wanted).abs().max() > 0.1
        assert rms_ratio(model(IDS).logits, wanted) < 1e-5
        assert rms_ratio(model(IDS[:1, :1]).logits, plain(IDS[:1, :1]).logits) < 1e-5
    assert rms_ratio(model(IDS).logits, wanted) < 1e-5
    whole = model.merge_and_unload()
    assert rms_ratio(whole(IDS).logits, wanted) < 1e-5


def test_only_adapters_learn_and_every_one_does(adapted):
    _, model, _ = adapted
    model.train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, trained[name])}
    assert moved == set(trained)


def test_adapters_are_saved_and_read_back_and_generate(adapted, tmp_path):
    plain, model, _ = adapted
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    texts = [m.generate(IDS[:1, :5], max_new_tokens=12, do_sample=False).tolist() for m in (again, model)]
    assert texts[0] == texts[1]
