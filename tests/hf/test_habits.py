"""What people do with any transformers model: train it with Trainer, save it in parts, look into it, give it odd input,
and load what is damaged."""

import copy
import importlib
import json
import pickle

import pytest
import torch
from tiny import NET

from hymba_lightning import Hymba

transformers = pytest.importorskip("transformers")
hf = importlib.import_module("hymba_lightning.hf")
safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.randint(3, 1024, (2, 20), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def model(saved):
    return transformers.AutoModelForCausalLM.from_pretrained(saved)


@pytest.fixture(scope="module")
def tokenizer(saved):
    return transformers.AutoTokenizer.from_pretrained(saved)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_evaluates_and_saves(model, tokenizer, tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    texts = [tokenizer(text) for text in ("the end", "another", "a longer text of it all", "x")]
    recomputed = []
    model.net.blocks[0].register_forward_pre_hook(lambda *call: recomputed.append(model.training))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        report_to=[],
        use_cpu=True,
        save_steps=2,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=texts,
        eval_dataset=texts,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert sum(recomputed) == (4 if checkpointing else 2)
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(texts).predictions.shape == (4, max(len(text["input_ids"]) for text in texts), 1024)
    back = Hymba.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.net.state_dict().items())


def test_weights_saved_in_parts_come_back_on_both_sides(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for net in (Hymba.from_pretrained(tmp_path), again.net):
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in model.net.state_dict().items())


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x41
    path.write_bytes(content)


def change_tensors(change):
    def spoil(folder):
        path = folder / "model.safetensors"
        safetensors.save_file(change(safetensors.load_file(path)), path, {"format": "pt"})

    return spoil


def set_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    config["net"]["n_layers"] = 300
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip, "its weights do not match their digest. Fetch or save it again"),
        (change_tensors(lambda all_: {n: v for n, v in all_.items() if "skip" not in n}), "skip_weights .* of none"),
        (change_tensors(lambda all_: {n: v * float("nan") for n, v in all_.items()}), "values that are not finite"),
        (change_tensors(lambda all_: {n: v.int() for n, v in all_.items()}), "is no weight of a network"),
        (set_layers, "300 layers, and its tensors are of 2; at most 256 can be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    ],
    ids=["a flipped bit", "a tensor missing", "NaN", "integers", "layers without end", "empty"],
)
def test_damaged_folders_are_named_where_transformers_would_fill_in(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_without_its_tokenizer_says_so(folder):
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.model: put there the SentencePiece model"):
        transformers.AutoTokenizer.from_pretrained(folder)


def test_the_artifacts_model_has_the_folders_settings(saved, model):
    rounded = transformers.AutoModelForCausalLM.from_pretrained(saved, weights="artifact")
    assert rounded.name_or_path == str(saved)
    assert rounded.generation_config.eos_token_id == model.generation_config.eos_token_id == [1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": None}, "input_ids must be a tensor of token ids"),
        ({"input_ids": IDS[0]}, "input_ids must be a tensor of token ids"),
        ({"input_ids": IDS.float()}, "input_ids must be a tensor of token ids"),
        ({"input_ids": IDS[:, :0]}, r"input_ids has no tokens \(\(2, 0\)\): a text begins with the document start"),
        ({"input_ids": IDS + 1000}, "has the id .* and the network's vocab_size is 1024"),
        ({"input_ids": IDS - 500}, "has the id -.* and the network's vocab_size is 1024"),
        ({"inputs_embeds": torch.zeros(2, 3, 32)}, "inputs_embeds cannot be read"),
        ({"output_hidden_states": True}, r"not offered: put a forward hook on the blocks of model\.net\.blocks"),
        ({"output_attentions": True}, "attention's weights are never made"),
        ({"attention_mask": torch.ones(1, 20)}, r"not \(1, 20\) for input_ids \(2, 20\)"),
        ({"attention_mask": torch.zeros(2, 20), "use_cache": True}, "a row is all padding"),
        ({"past_key_values": ((IDS,),)}, "a tuple is no cache of a Hymba's"),
    ],
)
def test_input_of_another_kind_is_named(model, given, message):
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS} | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": IDS[:, :0]}, "the prompt has no tokens: a text begins with the document start"),
        ({"attention_mask": torch.zeros(2, 20)}, "a row is all padding"),
        ({"attention_mask": torch.zeros(2, 20), "use_cache": False}, "a row is all padding"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not offered"),
    ],
)
def test_prompts_without_tokens_and_what_is_not_there_are_named(model, given, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**({"input_ids": IDS} | given | GREEDY))


def test_an_empty_cache_of_theirs_is_none_and_a_full_one_is_refused(model):
    with torch.no_grad():
        assert torch.equal(model(IDS, past_key_values=transformers.DynamicCache()).logits, model(IDS).logits)
    theirs = transformers.DynamicCache()
    theirs.update(torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3, 16), 0)
    with pytest.raises(ValueError, match="a DynamicCache is no cache of a Hymba's"):
        model(IDS, past_key_values=theirs)


def test_ids_of_fewer_bits_are_the_same_ids():
    """Hashes of pairs would overflow."""
    model = hf.HymbaForCausalLM(hf.HymbaPretrainedConfig(net=NET | {"vocab_size": 40_000, "bigram_buckets": 61}))
    torch.nn.init.normal_(model.net.bigram_hash.proj.weight)
    ids = torch.arange(39_000, 39_020)[None]
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


def test_a_script_may_ask_for_no_cache(saved):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, use_cache=False)
    assert model(IDS).cache is None
    assert model.generate(IDS, **GREEDY).shape == (2, 25)


@torch.no_grad()
def begun(model):
    """The cache after some tokens, the last of them one by one."""
    cache = model(IDS[:, :10], use_cache=True).cache
    for column in range(10, 13):
        model(IDS[:, column : column + 1], cache=cache)
    return cache


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_or_stored_cache_goes_on_by_itself(model, copied):
    cache = begun(model)
    other = copied(cache)
    with torch.no_grad():
        wanted = model(IDS[:, :14]).logits[:, -1]
        for each in (other, cache):
            assert torch.allclose(model(IDS[:, 13:14], cache=each).logits[:, 0], wanted, atol=2e-5)
    assert other.columns == 14


def test_a_cache_of_other_rows_is_refused(model):
    with pytest.raises(ValueError, match="input_ids has 1 rows, and its cache 2"):
        model(IDS[:1, 13:14], cache=begun(model))


def test_a_cache_goes_on_with_the_model_that_is_called(model):
    cache = begun(model)
    other, state = copy.deepcopy(model), copy.deepcopy(cache)
    for parameter in other.parameters():
        parameter.data *= 1.3
    with torch.no_grad():
        assert torch.equal(other(IDS[:, 13:14], cache=cache).logits, other(IDS[:, 13:14], cache=state).logits)


def test_adapters_merged_between_turns_speak_in_the_next_one(model):
    """peft writes merged weights past torch's counting of changes."""
    peft = pytest.importorskip("peft")
    cache = begun(model)
    turn = {"input_ids": IDS[:, :14], **GREEDY}
    anew = copy.deepcopy(cache)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["c_q", "proj", "fc"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    assert torch.equal(merged.generate(cache=cache, **turn), merged.generate(cache=anew, **turn))
