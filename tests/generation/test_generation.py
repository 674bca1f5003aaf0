"""Generation: equal to the full forward pass, reproducible, batched, its text exact, from files of both kinds."""

import io
import math
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from fit_process import finish, log_of, start
from tiny import NET, TOKENIZER, lively, tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning.checkpoints import write_checkpoint
from hymba_lightning.commands import run_command
from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer
from hymba_lightning.generation import SamplingConfig, TextStream, distribution, find_tokenizer, generate, load_network
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.quantization import QuantizationConfig, save_artifact

GREEDY = SamplingConfig(max_new_tokens=20, temperature=0.0)


@pytest.fixture(scope="module")
def net() -> Hymba:
    return lively(HymbaConfig(**NET, tied_embed_std=0.3))


@pytest.fixture(scope="module")
def processor():
    loaded = sentencepiece.SentencePieceProcessor()
    loaded.load(str(TOKENIZER))
    return loaded


def rows(net, prompts, config):
    """New tokens of each prompt."""
    out = [[] for _ in prompts]
    for new in generate(net, prompts, config):
        for row, token in zip(out, new, strict=True):
            row += [] if token is None else [token]
    return out


@pytest.mark.parametrize("prefill", [1, 3, 64])
def test_greedy_tokens_are_the_full_forwards(net, prefill):
    """Past the window, so that the carried state has to hold what the window dropped."""
    prompt = torch.randint(0, 1024, (37,)).tolist()
    config = SamplingConfig(max_new_tokens=20, temperature=0.0, prefill_tokens=prefill)
    new = rows(net, [prompt], config)[0]
    sequence = list(prompt)
    for token in new:
        with torch.no_grad():
            logits = net(torch.tensor([sequence]))[0, -1]
        assert float(logits[token]) == pytest.approx(float(logits.max()), abs=1e-4)
        sequence.append(token)
    assert len(new) == 20


def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(net):
    prompts = [torch.randint(0, 1024, (n,)).tolist() for n in (1, 9, 30)]
    config = SamplingConfig(max_new_tokens=12, temperature=1.0, seed=5)
    together = rows(net, prompts, config)
    for index, prompt in enumerate(prompts):
        alone = rows(net, [prompt], SamplingConfig(max_new_tokens=12, temperature=1.0, seed=5 + index))
        assert together[index] == alone[0]
    assert [len(row) for row in together] == [12, 12, 12]


def test_a_seed_decides_and_another_differs(net):
    one, same, other = (rows(net, [[1]], SamplingConfig(max_new_tokens=20, seed=seed)) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_a_stop_token_ends_a_row_and_no_other(net):
    prompts = [[1, 5], [1, 900]]
    free = rows(net, prompts, GREEDY)
    stop = next(token for token in free[0] if token not in free[1])
    stopped = rows(net, prompts, SamplingConfig(max_new_tokens=20, temperature=0.0, stop_ids=(stop,)))
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    assert stopped[1] == free[1]


def test_temperature_top_k_and_top_p_cut_the_distribution():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.25, 0.15]))
    ids, p = distribution(logits, SamplingConfig(temperature=1.0, top_p=1.0))
    assert ids.tolist() == [1, 2, 3, 0]
    assert p.tolist() == pytest.approx([0.5, 0.25, 0.15, 0.1])
    assert float(p.sum()) == 1
    ids, p = distribution(logits, SamplingConfig(temperature=1.0, top_p=1.0, top_k=2))
    assert p.tolist() == pytest.approx([2 / 3, 1 / 3])
    ids, _ = distribution(logits, SamplingConfig(temperature=1.0, top_p=0.6))
    assert ids.tolist() == [1, 2]
    ids, _ = distribution(logits, SamplingConfig(temperature=1.0, top_p=0.01))
    assert ids.tolist() == [1]
    _, p = distribution(logits, SamplingConfig(temperature=0.5, top_p=1.0))
    assert p[0] / p[1] == pytest.approx(4)


def test_draws_follow_the_distribution(net):
    with torch.no_grad():
        logits = net(torch.tensor([[1]]))[0, -1]
    config = SamplingConfig(max_new_tokens=1, temperature=1.0, top_k=4)
    ids, p = distribution(logits, config)
    drawn = torch.tensor(rows(net, [[1]] * 4000, config)).flatten()
    for token, probability in zip(ids.tolist(), p.tolist(), strict=True):
        error = math.sqrt(probability * (1 - probability) / 4000)
        assert float((drawn == token).double().mean()) == pytest.approx(probability, abs=4.5 * error)


@pytest.mark.parametrize("change", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"top_k": -1}])
def test_settings_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SamplingConfig(**change)


def test_prompts_of_arrays_and_tensors_are_those_of_lists(net):
    expected = rows(net, [[1, 5, 9], [1]], GREEDY)
    assert rows(net, [np.array([1, 5, 9]), torch.tensor([1])], GREEDY) == expected


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        ([1, 5, 9], None, "each prompt is a list of token ids"),
        (["Once"], None, "encode texts with the tokenizer first"),
        ([[1, 1 << 20]], None, f"a prompt has the id {1 << 20}, and the network's vocab_size is"),
        ([[1, -2]], None, "a prompt has the id -2"),
        (torch.ones(3, dtype=torch.int64), None, r"prompts \(3,\) and mask \(3,\) must both be \(prompts, tokens\)"),
        # Rows were cut to the mask's columns.
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 2), r"prompts \(2, 3\) and mask \(2, 2\)"),
        ([[1, 2], [3]], torch.tensor([[1, 1], [0, 1]]), "a mask is for a tensor of prompts"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_are_refused_by_name(net, prompts, mask, message):
    with pytest.raises(ValueError, match=message):
        next(generate(net, prompts, GREEDY, mask))


def test_an_empty_prompt_is_refused(net):
    with pytest.raises(ValueError, match="BOS"):
        next(generate(net, [[1], []], GREEDY))


@pytest.mark.parametrize("text", ["Once upon a time", " two  spaces", "Grüße, 世界 — naïve 🙂", "x"])
def test_streamed_text_is_the_tokenizers(processor, text):
    ids = processor.encode(text)
    stream = TextStream(processor, at_start=True)
    assert "".join(map(stream.push, ids)) + stream.finish() == processor.decode(ids).replace(" ⁇ ", "�")


def test_the_dummy_prefix_is_no_space_at_the_start(tmp_path):
    model = train_tokenizer(["some words of text, more words\n"] * 200, 280)
    (tmp_path / "dummy.model").write_bytes(model)
    processor = load_tokenizer(tmp_path / "dummy.model")
    for text in ("words of text", " words", "🙂 text"):
        ids = processor.encode(text)
        stream = TextStream(processor, at_start=True)
        assert "".join(map(stream.push, ids)) + stream.finish() == text
    within = TextStream(processor, at_start=False)
    assert "".join(map(within.push, processor.encode("words"))) == " words"


def test_a_character_of_several_bytes_comes_whole():
    class Bytes:
        """Pieces are single bytes."""

        def encode(self, text):
            return list(text.encode())

        def id_to_piece(self, token):
            return f"<0x{token:02X}>"

        def is_control(self, token):
            return False

        is_unused = is_unknown = is_control

        def is_byte(self, token):
            return True

    stream = TextStream(Bytes(), at_start=True)
    assert [stream.push(byte) for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.push(0xF0) == ""
    assert stream.finish() == "�"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A trained checkpoint and an artifact of the same weights, in a run's folder, and the tokenizer's folder."""
    folder = tmp_path_factory.mktemp("run")
    data = tiny_data(write_data(folder / "data"))
    module = tiny_module()
    trainer = tiny_trainer(folder, max_steps=3)
    trainer.fit(module, data)
    (folder / "run" / "checkpoints").mkdir(parents=True)
    trainer.save_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")
    save_artifact(
        folder / "run" / "artifact.hymba",
        module.net.state_dict(),
        config=module.net.config.to_dict(),
        tokenizer={"sha256": data.tokenizer_fingerprint(), "vocab_size": 1024},
        metadata={},
        scheme=QuantizationConfig(),
    )
    (folder / "run" / "config.yaml").write_text(f"data:\n  data_dir: {folder / 'data'}\n  tokenizer: null\n")
    return folder


def sample(*options: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        run_command("sample", [*options, "--max_new_tokens", "8", "--device", "cpu"])
    return out.getvalue()


@pytest.mark.parametrize(
    "content", [b"data: [1, {", b"[1]", b"data: 7", b"\xff\xfe", b"data: {}", b"a: " + b"[" * 5000]
)
def test_a_damaged_config_beside_the_weights_is_named(files, tmp_path, content):
    shutil.copy(files / "run" / "artifact.hymba", tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"config\.yaml, which would name the tokenizer, is damaged .* give --tokenizer"
    ):
        sample(str(tmp_path / "artifact.hymba"), "the end")


def test_sample_from_checkpoint_and_artifact(files):
    """The same weights up to int6 rounding, greedily: both files continue the prompt, and with the same text."""
    texts = [
        sample("--ckpt_path", str(files / "run" / name), "--prompt", "the end", "--temperature", "0")
        for name in ("checkpoints/last.ckpt", "artifact.hymba")
    ]
    assert all(text.startswith("the end") and len(text) > 8 for text in texts)
    assert texts[0] == texts[1]
    given = sample(
        "--ckpt_path",
        str(files / "run/artifact.hymba"),
        "--prompt",
        "the end",
        "--temperature",
        "0",
        "--data.tokenizer",
        str(TOKENIZER),
    )
    assert given == texts[1]


def test_several_prompts_print_each_text(files):
    out = sample("--ckpt_path", str(files / "run/artifact.hymba"), "--prompt", "one", "another", "--seed", "2")
    assert "[1] one" in out
    assert "[2] another" in out


def test_checkpoint_weights_are_the_averaged_ones(files):
    path = files / "run" / "checkpoints" / "last.ckpt"
    net, _ = load_network(path, RuntimeConfig(), torch.device("cpu"))
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, value in net.state_dict().items():
        assert torch.equal(value, saved[f"net.{name}"]), name


def test_files_that_do_not_fit_are_refused_with_the_remedy(files, tmp_path):
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="neither an artifact nor a checkpoint"):
        load_network(tmp_path / "text.ckpt", RuntimeConfig(), torch.device("cpu"))
    write_checkpoint(tmp_path / "other.ckpt", {"state_dict": {}})
    with pytest.raises(ValueError, match="which network"):
        load_network(tmp_path / "other.ckpt", RuntimeConfig(), torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.hymba"):
        load_network(Path("nowhere.hymba"), RuntimeConfig(), torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="--tokenizer MODEL"):
        find_tokenizer(tmp_path / "a.hymba", None, None)
    with pytest.raises(ValueError, match="another tokenizer"):
        find_tokenizer(tmp_path / "a.hymba", str(TOKENIZER), "0" * 64)


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    write_checkpoint(tmp_path / "trap.ckpt", {"hyper_parameters": {"net": {}}, "state_dict": Trap()})
    with pytest.raises(ValueError, match=r"trap\.ckpt"):
        load_network(tmp_path / "trap.ckpt", RuntimeConfig(), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_the_command_ends_with_one_line_on_bad_input(tmp_path):
    log = tmp_path / "log"
    assert finish([start(["sample", "--ckpt_path", "nowhere"], log)]) == [2]
    assert log_of(log) == (
        "hymba sample: nowhere does not exist: give an artifact, a checkpoint or a folder of save_pretrained\n"
    )
