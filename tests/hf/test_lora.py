"""peft: adapters stand in the place of our linears and tables, and what they say is what is computed."""

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


def lora(**given) -> peft.LoraConfig:
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_q", "fc"]} | given))


KINDS = {
    "DoRA": lambda: lora(use_dora=True),
    "tokens": lambda: lora(trainable_token_indices=[int(IDS[0, 0]), int(IDS[1, 3])]),
    "tokens alone": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=IDS[0, :4].tolist()),
    "tables": lambda: lora(target_modules=["tok_emb", "table"]),
    "a whole table": lambda: lora(modules_to_save=["tok_emb"]),
    "a whole mixer": lambda: lora(target_modules=["fc"], modules_to_save=["attn"]),
    "parameters": lambda: lora(target_modules=[], target_parameters=["c_q.weight", "dt_proj.weight", "tok_emb.weight"]),
    "one parameter": lambda: lora(target_modules=[], target_parameters=["dt_proj.weight"]),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["kv_proj", "fc"], feedforward_modules=["fc"]),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["c_q", "fc"], r=4),
    "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["c_q", "fc"], r=0, oft_block_size=8),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["c_q", "fc"], r=2),
}


@pytest.fixture
def folder(tmp_path):
    return ours().save_pretrained(tmp_path / "net")


def read(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_learns_speaks_token_by_token_and_outlives_saving_and_merging(folder, tmp_path, kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(read(folder), KINDS[kind]()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        wanted, text = model(input_ids=IDS).logits, IDS[:, :5]
        for _ in range(8):
            text = torch.cat([text, model(input_ids=text).logits[:, -1].argmax(-1)[:, None]], dim=1)
        greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(input_ids=IDS[:, :5], **greedy), text)
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(read(folder), tmp_path / "adapter").eval()
        assert rms_ratio(again(input_ids=IDS).logits, wanted) < 1e-5
        merged = model.merge_and_unload()
        assert rms_ratio(merged(IDS).logits, wanted) < 1e-4
        merged.save_pretrained(tmp_path / "merged")
        assert rms_ratio(read(tmp_path / "merged")(IDS).logits, wanted) < 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "inputs_embeds cannot be read, .* take one that adapts its matrices, such as LoRA",
        ),
        (
            lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "a DynamicCache is no cache of a Hymba's, .* those that train prefixes are not for this network",
        ),
        (
            lambda: lora(target_modules=[], target_parameters=["A_log"]),
            r"in the place of a whole block .* adapt parameters of single projections, such as c_q\.weight",
        ),
        (
            lambda: lora(target_modules=[], target_parameters=["skip_weights"]),
            "in the place of a whole block or network",
        ),
    ],
    ids=["prompt", "prefix", "a mixer's parameter", "the network's parameter"],
)
def test_adapters_that_cannot_be_are_told_what_can(folder, config, message):
    model = peft.get_peft_model(read(folder), config())
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, labels=IDS)


def test_adapters_that_are_told_of_rows_are_refused_where_padding_is_taken_off(folder):
    """They would find other columns, or the only row of several."""
    invocation = IDS[0, 8:10].tolist()
    told = peft.get_peft_model(read(folder), lora(alora_invocation_tokens=invocation, init_lora_weights=False)).eval()
    with torch.no_grad():
        wanted = told(input_ids=IDS[:1]).logits[0, -1]
        assert (wanted - read(folder)(IDS[:1]).logits[0, -1]).abs().max() > 0.1
        assert rms_ratio(told(input_ids=IDS).logits[0, -1], wanted) < 1e-5
        padding = (torch.arange(IDS.size(1)) > 3).long().expand(2, -1)
        for more in ({}, {"use_cache": True}):
            with pytest.raises(ValueError, match="give rows of one length without padding, or one row at a time"):
                told(input_ids=IDS, attention_mask=padding, **more)


def test_a_network_under_adapters_is_not_saved_as_one(folder, tmp_path):
    model = read(folder)
    peft.get_peft_model(model, lora())
    for each in (model, model.net):
        with pytest.raises(
            ValueError, match=r"c_q\.base_layer\.weight is no weight of the network, .* merge_and_unload"
        ):
            each.save_pretrained(tmp_path / "under")
    assert not (tmp_path / "under").exists()
