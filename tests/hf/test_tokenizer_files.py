"""Files that transformers reads for a tokenizer: what they spoil is named, and never gives other ids in silence."""

import importlib
import json

import pytest
from tiny import NET, TOKENIZER, lively

from hymba_lightning import HymbaConfig
from hymba_lightning.data.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")
hf = importlib.import_module("hymba_lightning.hf")

SETTINGS = "tokenizer_config.json"
TEXT = "the end <s> of a time\n"
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
BYTES = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
}


def trained(path, first):
    texts = [f"{first} upon a time, to the end\n", "aaaa aaa aa a abab 123 <s> </s> üß"] * 60
    path.write_bytes(train_tokenizer(texts, 330))
    return path


@pytest.fixture(scope="module", params=["SentencePiece", "fast"])
def saved(request, tmp_path_factory):
    """A folder whose tokenizer is SentencePiece itself, and one with a tokenizer.json."""
    tokenizer, size = TOKENIZER, 1024
    if request.param == "fast":
        tokenizer, size = trained(tmp_path_factory.mktemp("own") / "tokenizer.model", "Once"), 330
    net = lively(HymbaConfig(**(NET | {"vocab_size": size})))
    return net.save_pretrained(tmp_path_factory.mktemp("saved"), tokenizer=tokenizer)


def load(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def settings(**change):
    def spoil(folder):
        path = folder / SETTINGS
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return spoil


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def in_a_loop(folder):
    (folder / SETTINGS).unlink()
    (folder / SETTINGS).symlink_to(folder / SETTINGS)


def a_folder(folder):
    (folder / SETTINGS).unlink()
    (folder / SETTINGS).mkdir()


def twice(folder):
    text = (folder / SETTINGS).read_text().rstrip()
    (folder / SETTINGS).write_text(text[:-1] + ', "bos_token": "</s>"}')


def no_tokenizer_json(folder):
    settings(tokenizer_class="PreTrainedTokenizerFast")(folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)


BEGIN = "do not begin each text with the network's token 1"
OTHERS = {
    "another class": (settings(tokenizer_class="LlamaTokenizer"), r"names a tokenizer \(LlamaTokenizer\) that is not"),
    "no class": (settings(tokenizer_class="NoSuchTokenizer"), r"names a tokenizer \(NoSuchTokenizer\) that is not"),
    "another begin": (settings(bos_token="</s>"), BEGIN),
    "no begin": (settings(bos_token=None), BEGIN),
    "an empty begin": (settings(bos_token=""), BEGIN),
    "a key twice": (twice, BEGIN),
    "no tokenizer.json": (no_tokenizer_json, BEGIN),
    "a new end": (settings(eos_token="<|end|>"), r"give a token that the network has not, '<\|end\|>'"),
    "new padding": (settings(pad_token="[PAD]"), r"a token that the network has not, '\[PAD\]'"),
    "more tokens": (settings(additional_special_tokens=["<|a|>"]), r"has not, '<\|a\|>'"),
    "named tokens": (settings(extra_special_tokens={"image": "<img>"}), "has not, '<img>'"),
    "added beyond": (settings(added_tokens_decoder={"5000": {"content": "<x>"} | PLAIN}), "has not, '<x>'"),
    "added within": (settings(added_tokens_decoder={"5": {"content": "<x>"} | PLAIN}), "has not, '<x>'"),
    "a number as token": (settings(bos_token=3), "make no tokenizer .*bos_token has to be either str"),
    "a list as token": (settings(eos_token=["</s>"]), "make no tokenizer .*eos_token has to be either str"),
    "added tokens in a list": (settings(added_tokens_decoder=[1]), "make no tokenizer"),
    "added under a word": (settings(added_tokens_decoder={"x": {"content": "<x>"}}), "make no tokenizer"),
    "a length in words": (settings(model_max_length="long"), "say model_max_length='long', which must be a number"),
    "a negative length": (settings(model_max_length=-5), "say model_max_length=-5, which must be a number over 0"),
    "a side in the middle": (settings(padding_side="middle"), "make no tokenizer .*'right' and 'left'"),
    "names of others": (settings(model_input_names=["pixel_values"]), "must be a list with 'input_ids'"),
    "a number of names": (settings(model_input_names=3), "make no tokenizer"),
    "a number as template": (settings(chat_template=3), "say chat_template=3, which must be a text"),
    "a method": (settings(get_vocab=3), "make no tokenizer .*get_vocab conflicts"),
    "a map cut off": (file("special_tokens_map.json", '{"bos'), r"special_tokens_map\.json cannot be read: "),
    "a map in a list": (file("special_tokens_map.json", "[1]"), r"special_tokens_map\.json holds no JSON object"),
    "a map of others": (file("special_tokens_map.json", '{"bos_token": "<b>"}'), r"_map\.json give a token .*'<b>'"),
    "a file of added tokens cut off": (file("added_tokens.json", '{"a'), r"added_tokens\.json cannot be read: "),
    "a file of added tokens": (file("added_tokens.json", '{"<x>": 5000}'), r"added_tokens\.json give .* '<x>'"),
    "a file of tokens over others": (file("added_tokens.json", '{"<x>": 5}'), r"added_tokens\.json give .* '<x>'"),
    "a tokenizer.json cut off": (file("tokenizer.json", '{"a'), r"tokenizer\.json cannot be read: "),
    "an empty tokenizer.json": (file("tokenizer.json", ""), r"tokenizer\.json cannot be read: "),
    "a template in bytes": (file("chat_template.jinja", b"\x80\x81"), r"chat_template\.jinja make no tokenizer"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_settings_of_another_tokenizer_are_named_with_the_file_and_the_remedy(saved, folder, kind):
    spoil, message = OTHERS[kind]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert ".json" in str(raised.value)
    assert "Fetch or save" in str(raised.value)


@pytest.mark.parametrize(
    "spoil",
    [
        in_a_loop,
        a_folder,
        lambda folder: (folder / SETTINGS).unlink(),
        file(SETTINGS, "{}"),
        settings(model_max_length=10**30),
        settings(split_special_tokens=False),
        settings(add_bos_token=False),
        settings(vocab_file="/elsewhere/tokenizer.model", tokenizer_file="/elsewhere/tokenizer.json"),
        settings(tokenizer_class="HymbaTokenizer", frobnicate=3),
        settings(bos_token={"__type": "AddedToken", "content": "<s>"} | PLAIN),
    ],
    ids=["a loop", "a folder", "none", "empty", "long", "split", "no BOS", "elsewhere", "unknown", "in full"],
)
def test_what_spoils_nothing_gives_the_same_ids(saved, folder, spoil):
    wanted = load(saved)
    spoil(folder)
    found = load(folder)
    ids = wanted(TEXT)["input_ids"]
    assert found(TEXT)["input_ids"] == ids
    assert found.decode(ids, skip_special_tokens=True) == wanted.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "content",
    [
        '{"bos_token": "<s>", "tok',
        "[1]",
        '"word"',
        "null",
        "",
        bytes(range(128, 256)),
        '{"a":' + "[" * 100_000,
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
    ],
    ids=["cut off", "a list", "a word", "null", "empty", "bytes", "deep", "a pointer"],
)
def test_what_is_no_json_object_is_named_by_our_classes(saved, folder, content):
    """AutoTokenizer reads that file before it asks anyone, and ends with an error of its own."""
    file(SETTINGS, content)(folder)
    for ours in (hf.HymbaTokenizer, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"config\.json (cannot be read|holds no JSON).* Fetch or save it again"):
            ours.from_pretrained(folder)
    with pytest.raises((ValueError, AttributeError, RecursionError)):
        load(folder)


def test_another_networks_model_is_refused_where_it_is_read(saved, folder):
    trained(folder / "tokenizer.model", "Twice")
    with pytest.raises(ValueError, match=r"tokenizer\.model is another tokenizer \(sha256"):
        hf.HymbaTokenizer.from_pretrained(folder)


def in_tokenizer_json(change):
    def spoil(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def swap(content):
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]


IDS = r"tokenizer\.json give other ids than tokenizer\.model, as for '"


@pytest.mark.parametrize("saved", ["fast"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, IDS),
        (lambda content: content["model"]["merges"].pop(5), IDS),
        (lambda content: content.update(normalizer=None), IDS),
        (lambda content: content.update(pre_tokenizer={"type": "Whitespace"}), IDS),
        (lambda content: content["model"].update(byte_fallback=False), IDS),
        (lambda content: content["model"].update(dropout=0.5), r"leave merges out at random \(dropout\)"),
        (lambda content: content.update(decoder=None), r"\.json give another text for ids than tokenizer\.model"),
    ],
    ids=["ids", "merges", "normalizer", "pre_tokenizer", "bytes", "dropout", "decoder"],
)
def test_a_tokenizer_json_that_reads_otherwise_than_the_model_beside_it_is_named(saved, folder, change, message):
    in_tokenizer_json(change)(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("saved", ["fast"], indirect=True)
def test_another_networks_model_beside_a_tokenizer_json_is_refused_too(saved, folder):
    trained(folder / "tokenizer.model", "Twice")
    with pytest.raises(ValueError, match=r"tokenizer\.model is another tokenizer \(sha256"):
        load(folder)
    (folder / "tokenizer.model").unlink()
    assert load(folder)(TEXT)["input_ids"] == load(saved)(TEXT)["input_ids"]


def test_a_callers_own_option_is_answered_by_transformers(saved):
    with pytest.raises(ValueError, match=r"^Padding side should be selected"):
        transformers.AutoTokenizer.from_pretrained(saved, padding_side="middle")
    assert transformers.AutoTokenizer.from_pretrained(saved, padding_side="right").padding_side == "right"
    with pytest.raises(ValueError, match=r"the options of this call give a token that the network has not, '<\|a\|>'"):
        transformers.AutoTokenizer.from_pretrained(saved, pad_token="<|a|>")


def test_a_network_that_was_saved_alone_takes_any_tokenizer(tmp_path):
    """As one must have whose own tokenizer transformers does not follow."""
    lively(HymbaConfig(**NET)).save_pretrained(tmp_path)
    file("tokenizer.json", json.dumps(BYTES))(tmp_path)
    for name in ("GPT2Tokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer"):
        file(SETTINGS, json.dumps({"tokenizer_class": name, "bos_token": "a", "eos_token": "a", "unk_token": "a"}))(
            tmp_path
        )
        assert load(tmp_path)("ba")["input_ids"] == [1, 0]


def test_tokens_that_are_added_to_ours_have_ids_behind_the_pieces(saved):
    ours = hf.HymbaTokenizer.from_pretrained(saved)
    size = len(ours)
    assert ours.add_tokens(["<|a|>"]) + ours.add_tokens(["<|b|>", "<|c|>"]) == 3
    assert [ours.convert_tokens_to_ids(name) for name in ("<|a|>", "<|b|>", "<|c|>")] == [size, size + 1, size + 2]
    assert len(ours) == size + 3
