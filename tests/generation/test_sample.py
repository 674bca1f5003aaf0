"""`hymba sample`: where its prompts come from, what ends a text, what is printed, and turns that keep their state."""

import io
import json
import os
import sys

import pytest
from tiny import NET, TOKENIZER, lively

from hymba_lightning.commands import run_command
from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer
from hymba_lightning.device import device_of
from hymba_lightning.errors import UsageError
from hymba_lightning.generation.reply import StopText
from hymba_lightning.generation.sample import ends_of, typed_lines
from hymba_lightning.generation.sampler import SamplingConfig, generate
from hymba_lightning.generation.session import Session
from hymba_lightning.generation.steps import Steps
from hymba_lightning.generation.text import TextStream
from hymba_lightning.model import HymbaConfig
from hymba_lightning.quantization import QuantizationConfig, save_artifact

OPTIONS = ["--tokenizer", str(TOKENIZER), "--max_new_tokens", "8", "--device", "cpu", "--seed", "3"]


@pytest.fixture(scope="module")
def net():
    return lively(HymbaConfig(**NET, tied_embed_std=0.3)).eval()


@pytest.fixture(scope="module")
def artifact(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "artifact.hymba"
    config = net.config.to_dict()
    save_artifact(path, net.state_dict(), config=config, tokenizer={}, metadata={}, scheme=QuantizationConfig())
    return str(path)


@pytest.fixture
def run(artifact, capsys, monkeypatch):
    """Runs the command on the artifact with something on stdin; returns stdout."""

    def run(*options, stdin=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        monkeypatch.setattr("hymba_lightning.generation.sample._is_piped", lambda: stdin is not None)
        capsys.readouterr()
        run_command("sample", [artifact, *options, *OPTIONS])
        captured = capsys.readouterr()
        assert captured.err == "" or "--verbose" in options
        return captured.out

    return run


def test_a_prompt_comes_from_wherever_it_is_given(run, tmp_path):
    (tmp_path / "a.txt").write_text("the end", encoding="utf-8")
    expected = run("the end")
    assert expected.startswith("the end")
    assert len(expected) > len("the end\n")
    assert run("--prompt", "the end") == expected
    assert run("--prompt_file", str(tmp_path / "a.txt")) == expected
    assert run(stdin="the end\n") == expected
    assert run("-", stdin="the end\n") == expected
    assert run("the end", stdin="something else") == expected


def test_the_first_argument_may_be_called_ckpt_path(artifact, run, capsys):
    expected = run("the end")
    run_command("sample", ["--ckpt_path", artifact, "--prompt", "the end", *OPTIONS])
    assert capsys.readouterr().out == expected
    run_command("sample", ["the end", "--ckpt_path", artifact, *OPTIONS])
    assert capsys.readouterr().out == expected


def test_options_may_stand_before_and_between(artifact, run, capsys):
    expected = run("the end", "--top_k", "5")
    for order in (["--top_k", "5", artifact, "the end"], [artifact, "--top_k=5", "the end"]):
        run_command("sample", [*order, *OPTIONS])
        assert capsys.readouterr().out == expected


def test_a_pipe_and_a_file_are_read_and_dev_null_is_none(artifact, tmp_path, capsys, monkeypatch):
    """What stdin is, is the system's word."""

    def said(stdin):
        monkeypatch.setattr(sys, "stdin", stdin)
        run_command("sample", [artifact, *OPTIONS])
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    reading, writing = os.pipe()
    os.write(writing, b"the end")
    os.close(writing)
    (tmp_path / "prompt").write_text("the end", encoding="utf-8")
    with open(reading) as pipe, open(tmp_path / "prompt") as file, open(os.devnull) as nothing:
        continued = said(pipe)
        assert continued.startswith("the end")
        assert said(file) == continued
        assert not said(nothing).startswith("the end")


def test_json_says_what_ended_each_text(run):
    rows = [json.loads(line) for line in run("--json", "--prompt", "one", "another").splitlines()]
    assert [(row["prompt"], row["tokens"], row["ended_by"]) for row in rows] == [
        ("one", 8, "max_new_tokens"),
        ("another", 8, "max_new_tokens"),
    ]
    plain = run("--prompt", "one", "another")
    assert plain == "".join(f"[{row['index'] + 1}] {row['prompt']}{row['text']}\n" for row in rows)


def test_a_stop_text_ends_its_own_row_and_is_left_out(run):
    free = [json.loads(line) for line in run("--json", "--prompt", "one", "another").splitlines()]
    stop = free[0]["text"][2:5]
    assert stop not in free[1]["text"]
    lines = run("--json", "--stop", stop, "--prompt", "one", "another").splitlines()
    rows = {row["prompt"]: row for row in map(json.loads, lines)}
    assert rows["one"]["ended_by"] == "stop"
    assert rows["one"]["text"] == free[0]["text"].partition(stop)[0]
    assert rows["one"]["tokens"] < 8
    assert rows["another"]["text"] == free[1]["text"]
    assert run("one", "--stop", stop) == f"one{rows['one']['text']}\n"


@pytest.mark.parametrize(
    ("pieces", "shown", "found"),
    [
        (["ab", "c", "d"], "ab", "cd"),
        (["abcdxx"], "ab", "cd"),
        (["abc", "e"], "abce", None),
        (["a", "c", "c", "d"], "ac", "cd"),
        (["ac"], "ac", None),
        (["x<", "|e", "nd|", ">y"], "x", "<|end|>"),
        (["aXcd"], "a", "X"),
    ],
)
def test_what_may_become_a_stop_text_is_held_back(pieces, shown, found):
    stop = StopText(("cd", "X", "<|end|>", ""))
    out = "".join(map(stop.push, pieces)) + stop.finish()
    assert (out, stop.found) == (shown, found)
    assert stop.push("more") == ("" if found else "more")


@pytest.fixture
def fed(monkeypatch):
    """Ids of each piece that a session reads."""
    pieces: list[list[int]] = []

    own = Steps.read

    def read(steps, tokens_BT, *rest):
        pieces.append(tokens_BT[0].tolist())
        return own(steps, tokens_BT, *rest)

    monkeypatch.setattr(Steps, "read", read)
    return pieces


def test_turns_are_one_document_and_no_token_is_read_twice(net, fed):
    processor = load_tokenizer(TOKENIZER)
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0, stop_ids=ends_of(processor))
    session = Session(net, processor, greedy)
    list(session.say("the end"))
    second = "".join(session.say("\nof it"))
    prompt = [processor.bos_id(), *processor.encode("the end")]
    # Of the first turn's six tokens the last waits for the second turn.
    assert [fed[0], *map(len, fed[1:6])] == [prompt, 1, 1, 1, 1, 1]
    assert len(fed) == 12
    before = [token for piece in fed[:7] for token in piece]
    stream = TextStream(processor, at_start=False)
    assert second == "".join(stream.push(token) for (token,) in generate(net, [before], greedy)) + stream.finish()


def test_a_later_turn_has_no_dummy_prefix(tmp_path, fed):
    (tmp_path / "dummy.model").write_bytes(train_tokenizer(["some words of text, more words\n"] * 200, 280))
    processor = load_tokenizer(tmp_path / "dummy.model")
    net = lively(HymbaConfig(**(NET | {"vocab_size": 280}), tied_embed_std=0.3)).eval()
    session = Session(net, processor, SamplingConfig(max_new_tokens=1, temperature=0.0))
    list(session.say("some"))
    list(session.say("words"))
    assert fed[1][1:] == processor.encode("xwords")[len(processor.encode("x")) :]


def test_interactive_answers_line_by_line(run):
    rows = [json.loads(line) for line in run("--interactive", "--json", stdin="the end\n\nof it\n").splitlines()]
    assert [row["prompt"] for row in rows] == ["the end", "", "of it"]
    assert all(row["tokens"] for row in rows)
    plain = run("--interactive", stdin="the end\n\nof it\n")
    assert plain == "".join(row["text"] + "\n" for row in rows)


def test_a_typed_line_that_is_no_text_is_left_out_and_the_document_goes_on(monkeypatch, capsys):
    typed = io.StringIO("the end\ncaf\udce9\nof it\n")
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    assert list(typed_lines()) == ["the end", "of it"]
    assert capsys.readouterr().err == "> > the line is not UTF-8 and was left out: type it again\n> > \n"


def test_a_mark_of_the_encoding_is_no_text(run, tmp_path):
    (tmp_path / "a.txt").write_text("the end", encoding="utf-8-sig")
    assert run("--prompt_file", str(tmp_path / "a.txt")) == run("the end")
    assert run(stdin="\ufeffthe end\n") == run("the end")
    assert run("--interactive", stdin="\ufeffthe end\nof it\n") == run("--interactive", stdin="the end\nof it\n")


def test_line_ends_of_any_system_are_one_wherever_a_text_comes_from(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the end\r\nof it")
    assert run(stdin="the end\r\nof it\r\n") == run("--prompt_file", str(tmp_path / "a.txt")) == run("the end\nof it")
    assert run("--interactive", stdin="the end\r\nof it\r\n") == run("--interactive", stdin="the end\nof it\n")


def test_no_temperature_is_too_low(run):
    assert run("the end", "--temperature", "1e-320") == run("the end", "--temperature", "0")


def test_verbose_alone_tells_the_speed(run, capsys, artifact):
    run("the end", "--verbose")
    run_command("sample", [artifact, "the end", "--verbose", *OPTIONS])
    assert "per second" in capsys.readouterr().err


def test_what_cannot_be_is_one_sentence(run, tmp_path):
    with pytest.raises(UsageError, match="nothing to sample from"):
        run_command("sample", ["--max_new_tokens", "3"])
    with pytest.raises(UsageError, match="leave the prompts out"):
        run("--interactive", "text")
    with pytest.raises(FileNotFoundError, match="--prompt_file nowhere does not exist"):
        run("--prompt_file", "nowhere")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        run("--prompt_file", str(tmp_path / "latin"))
    with pytest.raises(ValueError, match="give - once"):
        run("--prompt", "-", "-", stdin="x")
    with pytest.raises(ValueError, match="does not fit into 63 bits"):
        SamplingConfig(seed=10**20)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "meta", "cuda:1000"])
def test_a_device_that_is_not_here_is_named(name):
    with pytest.raises(ValueError, match=rf"device '{name}' cannot be used \(.+\): give cpu, cuda or auto"):
        device_of(name)
    assert device_of("auto").type in ("cpu", "cuda")
