"""The transformers model is our network: same weights, same logits, same texts token by token."""

import copy
import importlib
import subprocess
import sys

import pytest
import torch
from tiny import NET, TOKENIZER, lively

from hymba_lightning import Hymba, HymbaConfig, RuntimeConfig, SamplingConfig, generate
from hymba_lightning.generation import steps

transformers = pytest.importorskip("transformers")
hf = importlib.import_module("hymba_lightning.hf")

VARIANTS = {
    "plain": {},
    "global layer, meta tokens": {"global_layers": [1], "meta_tokens": 3},
    "keys and values shared, own head": {"kv_share_every": 2, "tie_embeddings": False},
    "packed documents": {"packed_documents": True, "global_layers": [1]},
}
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def pair(request, tmp_path_factory):
    """Our network, and what transformers makes of its folder."""
    net = lively(HymbaConfig(**(NET | VARIANTS[request.param]), tied_embed_std=0.3)).eval()
    folder = net.save_pretrained(tmp_path_factory.mktemp("saved"), tokenizer=TOKENIZER)
    return net, transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain network and its folder with both files of weights."""
    net = lively(HymbaConfig(**NET, tied_embed_std=0.3)).eval()
    return net, net.save_pretrained(tmp_path_factory.mktemp("plain"), tokenizer=TOKENIZER, weights="both")


def prompts(*lengths):
    """Random ones, in the longer of which a document starts."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 1024, (n,), generator=generator) for n in lengths]
    for row in rows:
        row[2 : len(row) - 1 : 9] = 1
    return [row.tolist() for row in rows]


def padded(rows, side):
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row if side == "left" else row + [0] * (longest - len(row)) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    mask = mask if side == "left" else [row[::-1] for row in mask]
    return torch.tensor(ids), torch.tensor(mask)


def ours(net, rows, n=24):
    config = SamplingConfig(max_new_tokens=n, temperature=0.0)
    return [list(row) for row in zip(*generate(net, rows, config), strict=True)]


def test_weights_and_logits_are_ours(pair):
    net, model = pair
    assert type(model) is hf.HymbaForCausalLM
    for name, value in net.state_dict().items():
        assert torch.equal(model.net.state_dict()[name], value), name
    ids = torch.tensor(prompts(50))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, net(ids))


def test_greedy_texts_are_ours_token_by_token(pair):
    net, model = pair
    for row in prompts(1, 7, 40):
        out = model.generate(torch.tensor([row]), **GREEDY)[0].tolist()
        assert out == row + ours(net, [row])[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gets_what_each_row_gets_alone(pair, side):
    net, model = pair
    rows = prompts(3, 30, 16, 1)
    ids, mask = padded(rows, side)
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    assert out[:, ids.size(1) :].tolist() == [ours(net, [row])[0] for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch_are_each_rows_own(pair, side):
    net, model = pair
    rows = prompts(3, 30, 16)
    ids, mask = padded(rows, side)
    with torch.no_grad():
        for use_cache in (False, True):
            logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
            for row, own, real in zip(rows, logits, mask.bool(), strict=True):
                assert torch.allclose(own[real], net(torch.tensor([row]))[0], rtol=0, atol=2e-5)
                assert not own[~real].any()


def test_the_cache_goes_on_from_any_cut_also_with_rows_of_unequal_length(pair):
    _, model = pair
    rows = prompts(20, 9)
    ids, mask = padded(rows, "left")
    more = torch.tensor(prompts(5, 5))
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).cache
        assert cache.get_seq_length() == 20
        logits = model(more, cache=cache).logits
        one_more = model(more[:, :1], cache=cache).logits
        for index, row in enumerate(rows):
            whole = model(torch.tensor([[*row, *more[index].tolist(), int(more[index, 0])]])).logits[0]
            assert torch.allclose(logits[index], whole[-6:-1], rtol=0, atol=2e-5)
            assert torch.allclose(one_more[index, 0], whole[-1], rtol=0, atol=2e-5)


def test_a_conversation_goes_on_with_the_cache_of_the_turn_before(pair):
    net, model = pair
    row = prompts(9)[0]
    first = model.generate(torch.tensor([row]), return_dict_in_generate=True, use_cache=True, **GREEDY)
    turn = [*first.sequences[0].tolist(), 5, 6, 7]
    cache = getattr(first, "cache", None) or first.past_key_values
    out = model.generate(torch.tensor([turn]), cache=cache, **GREEDY)[0].tolist()
    assert out == turn + ours(net, [turn])[0]


@pytest.fixture
def fixed(monkeypatch):
    """Single tokens in memory that stays where it is, as on a GPU."""
    made = steps.Steps.__init__
    monkeypatch.setattr(steps.Steps, "__init__", lambda self, net, state=None: made(self, net, state, fixed=True))
    monkeypatch.setattr(steps, "ROOM", 7)


def test_texts_and_caches_are_the_same_in_fixed_memory(pair, fixed):
    net, model = pair
    rows = prompts(3, 30, 16, 1)
    ids, mask = padded(rows, "left")
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, use_cache=True, **GREEDY)
    texts = out.sequences[:, ids.size(1) :].tolist()
    assert texts == [ours(net, [row])[0] for row in rows]
    cache = getattr(out, "cache", None) or out.past_key_values
    assert cache.batch_size == 4
    assert len(cache) == 2
    other = copy.deepcopy(cache)
    last = out.sequences[:, -1:]
    with torch.no_grad():
        wanted = torch.stack([net(torch.tensor([row + text]))[0, -1] for row, text in zip(rows, texts, strict=True)])
        assert torch.allclose(model(last, cache=cache).logits[:, 0], wanted, rtol=0, atol=2e-5)
        other.batch_select_indices(torch.tensor([2, 0]))
        assert torch.allclose(model(last[[2, 0]], cache=other).logits[:, 0], wanted[[2, 0]], rtol=0, atol=2e-5)


def test_beams_follow_their_own_rows(pair):
    """Each beam's text has the probability that the network gives it: its state is no other beam's."""
    _, model = pair
    ids, mask = padded(prompts(4, 11), "left")
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, **options)
    anew = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, anew)
    assert len({tuple(row) for row in cached.tolist()}) == 6


def test_sampled_texts_of_one_prompt_differ_and_a_seed_repeats_them(pair):
    _, model = pair
    ids = torch.tensor(prompts(5))
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 12, "eos_token_id": None}
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(model.generate(ids, **options).tolist())
    assert drawn[0] == drawn[1]
    assert len({tuple(row) for row in drawn[0]}) == 4


def test_labels_give_the_loss_of_the_next_token(pair):
    net, model = pair
    ids, mask = padded(prompts(20, 9), "right")
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    pieces = [(torch.tensor([row[:-1]]), torch.tensor([row[1:]])) for row in prompts(20, 9)]
    nats = torch.cat([net(inputs, targets, reduction="none")[0] for inputs, targets in pieces])
    assert torch.allclose(loss, nats.mean(), atol=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_was_saved_by_transformers_is_read_by_us(pair, tmp_path):
    net, model = pair
    model.save_pretrained(tmp_path)
    back = Hymba.from_pretrained(tmp_path)
    assert back.config == net.config
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in net.state_dict().items())


def test_a_folder_with_the_artifact_alone_loads(plain, tmp_path):
    net, folder = plain
    only = net.save_pretrained(tmp_path, weights="artifact")
    rounded = Hymba.from_pretrained(only)
    for model in (
        transformers.AutoModelForCausalLM.from_pretrained(only),
        transformers.AutoModelForCausalLM.from_pretrained(folder, weights="artifact"),
    ):
        assert all(torch.equal(value, model.net.state_dict()[name]) for name, value in rounded.state_dict().items())


def test_dtype_is_that_of_the_activations(plain):
    _, folder = plain
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.net.runtime == RuntimeConfig(compute_dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_three_lines_from_artifact_to_text(plain):
    _, folder = plain
    model, tokenizer = hf.load(folder / "artifact.hymba")
    out = model.generate(**tokenizer("the end", return_tensors="pt"), **GREEDY)
    rounded, prompt = Hymba.from_pretrained(folder, weights="artifact"), tokenizer("the end")["input_ids"]
    assert out[0].tolist() == prompt + ours(rounded, [prompt])[0]
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("the end")
    text = transformers.pipeline("text-generation", str(folder))(["the end", "a"], batch_size=2, **GREEDY)
    assert [row[0]["generated_text"].startswith(start) for row, start in zip(text, ("the end", "a"), strict=True)]


def test_what_it_cannot_do_is_said(plain):
    model = hf.HymbaForCausalLM(hf.HymbaPretrainedConfig(net=NET))
    with pytest.raises(ValueError, match="one for each piece of its tokenizer"):
        model.resize_token_embeddings(1100)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="cannot be cropped"):
        hf.HymbaCache().crop(1)
    with pytest.raises(ValueError, match="does not know: windows"):
        hf.HymbaPretrainedConfig(net={"windows": 2})


def test_a_fresh_model_starts_as_ours_does():
    torch.manual_seed(3)
    ours = Hymba(HymbaConfig(**NET))
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(hf.HymbaPretrainedConfig(net=NET))
    assert all(torch.equal(value, theirs.net.state_dict()[name]) for name, value in ours.state_dict().items())


def test_without_transformers_the_import_says_how_to_get_it():
    code = "import sys; sys.modules['transformers'] = None; import hymba_lightning.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs transformers: pip install 'hymba-lightning[hf]'" in done.stderr
