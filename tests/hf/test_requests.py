"""What scripts written for any model ask of this one: given as it is meant, or refused in one sentence, never something
else in silence."""

import importlib
import json

import pytest
import torch
from tiny import NET

from hymba_lightning.data.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")
hf = importlib.import_module("hymba_lightning.hf")

IDS = torch.randint(3, 1024, (2, 20), generator=torch.Generator().manual_seed(0))
STARTS_AGAIN = torch.arange(20).remainder(7).expand(2, -1)


@pytest.fixture(scope="module")
def model(saved):
    return transformers.AutoModelForCausalLM.from_pretrained(saved)


def trainer(model, folder, **given):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **given)
    return transformers.Trainer(model=model, args=arguments)


def test_a_loss_that_trainer_computes_is_that_of_the_next_token(model, tmp_path):
    """Smoothed labels, of which transformers shifts those of models that it knows by name."""
    smoothed = trainer(model, tmp_path, label_smoothing_factor=0.1)
    loss = smoothed.compute_loss(model, {"input_ids": IDS, "labels": IDS.clone()})
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), label_smoothing=0.1)
    assert torch.allclose(loss, wanted, atol=1e-5)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"": "cpu"}, {"net.blocks.0": "cpu", "": "cpu"}])
@pytest.mark.parametrize("weights", [None, "artifact"])
def test_a_device_map_puts_the_whole_network_on_one_device(saved, device_map, weights):
    pytest.importorskip("accelerate")
    # Less memory than the network needs: other models are then spread over CPU and disk.
    options = {"max_memory": {"cpu": "90KB"}} if isinstance(device_map, str) and device_map != "cpu" else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, weights=weights, **options)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 23)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device_map": {"": "disk"}}, r"puts the network on disk, and it is computed on one device: give device_map="),
        ({"device_map": {"net.blocks.0": 0, "net": 1}}, "puts the network on 0, 1"),
        ({"attn_implementation": "sdpa"}, "attn_implementation='sdpa' is not offered: .* leave it out"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2' is not offered"),
        ({"runtime": {"backend": "fast"}}, "runtime has no backend: choose from compute_dtype, scan_backend"),
        ({"vocab_size": 2048}, "vocab_size=2048 is not the network's, whose vocab_size is 1024"),
        ({"hidden_size": 64}, "hidden_size=64 is not the network's, whose d_model is 32"),
    ],
)
def test_what_a_load_cannot_give_is_refused(saved, given, message):
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(saved, **given)


def test_a_file_in_the_place_of_a_folder_is_told_what_reads_it(saved):
    with pytest.raises(FileNotFoundError, match=r"is a file, and a folder .* are read by `hymba_lightning\.hf\.load`"):
        hf.HymbaForCausalLM.from_pretrained(saved / "artifact.hymba")


def test_settings_of_the_config_are_heard(saved):
    """By the class too, and with the artifact's weights."""
    for weights in (None, "artifact"):
        plain = hf.HymbaForCausalLM.from_pretrained(saved, weights=weights, return_dict=False, use_cache=False)
        assert isinstance(plain(IDS), tuple)
        assert plain.config.use_cache is False
    asked = transformers.AutoModelForCausalLM.from_pretrained(saved, output_hidden_states=True)
    with pytest.raises(ValueError, match="output_hidden_states is not offered"):
        asked(IDS)


def other_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(train_tokenizer(["some words of text, more words\n"] * 200, 280))


def set_generation(content):
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_tokenizer, r"tokenizer\.model is another tokenizer .* than the network's .*: put that one there"),
        (
            lambda folder: (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "Git LFS's pointer",
        ),
        (set_generation([1]), r"generation_config\.json holds no JSON object"),
        (set_generation({"eos_token_id": "x"}), r"generation_config\.json: eos_token_id='x' is no id below"),
        (set_generation({"eos_token_id": [1, 5000]}), "no id below the network's vocab_size=1024"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "cannot be read"),
    ],
    ids=["another tokenizer", "a pointer", "a list", "a word", "an id beyond", "no JSON"],
)
@pytest.mark.parametrize("weights", [None, "artifact"])
def test_what_lies_beside_the_weights_is_the_networks(folder, spoil, message, weights):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder, weights=weights)


def test_a_tokenizer_that_transformers_saved_is_still_the_networks(folder):
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": IDS[:, :10]}, r"labels must be token ids as input_ids are, \(2, 20\), with -100 .* not \(2, 10\)"),
        ({"labels": IDS.float()}, r"not \(2, 20\) of torch\.float32"),
        ({"labels": IDS + 1000}, "labels have the id .*: what is not to be learned is -100"),
        ({"labels": torch.full_like(IDS, -1)}, "labels have the id -1"),
        ({"labels": IDS, "logits_to_keep": 5}, "labels need every token's logits"),
        ({"attention_mask": [[1] * 20] * 2}, "attention_mask must be .* not list"),
        ({"position_ids": STARTS_AGAIN}, "several texts lie in one row"),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 20])}, "several texts lie in one row"),
        ({"seq_idx": torch.ones(1, 20)}, "several texts lie in one row"),
    ],
)
def test_a_call_that_would_mean_something_else_is_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        model(IDS, **given)


def test_positions_of_one_text_a_row_are_taken(model):
    """With the padding on the left as transformers numbers it; and where the network knows its documents itself."""
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert torch.equal(
        model(IDS, attention_mask=mask, position_ids=positions).logits, model(IDS, attention_mask=mask).logits
    )
    packed = hf.HymbaForCausalLM(hf.HymbaPretrainedConfig(net=NET | {"packed_documents": True}))
    assert packed(IDS, position_ids=STARTS_AGAIN).logits.shape == (2, 20, 1024)


@pytest.mark.parametrize("inputs", [IDS[0], IDS.tolist(), IDS.numpy(), IDS.float(), {"input_ids": IDS}])
def test_prompts_that_are_no_tensor_of_tokens_are_told_where_one_comes_from(model, inputs):
    with pytest.raises(ValueError, match=r'not .*: give what `tokenizer\(texts, return_tensors="pt"\)` has'):
        model.generate(inputs, max_new_tokens=3)


def test_continuous_batching_is_refused_at_once(model):
    with pytest.raises(ValueError, match="give `generate` the prompts as one padded batch"):
        model.generate_batch(inputs=IDS.tolist())


@pytest.mark.parametrize("change", [{"n_layers": 3}, {"d_model": 64}, {"window": 8}])
def test_a_cache_of_another_kind_of_network_is_refused(model, change):
    other = hf.HymbaForCausalLM(hf.HymbaPretrainedConfig(net=NET | change)).eval()
    for read in (1, 3):
        cache = model(IDS, use_cache=True).cache
        with torch.no_grad(), pytest.raises(ValueError, match="of a network of another config"):
            other(IDS[:, :read], cache=cache)


def test_the_table_of_tokens_looks_ids_up_by_itself(model):
    table = model.get_input_embeddings()
    assert torch.equal(table(IDS), table.weight[IDS])


def test_the_table_is_padded_to_no_other_size(model):
    assert model.resize_token_embeddings(pad_to_multiple_of=64) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="the table has 1024 rows"):
        model.resize_token_embeddings(pad_to_multiple_of=1000)
