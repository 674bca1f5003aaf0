"""What `hymba sample` does: load, encode, draw, print as the text comes."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from hymba_lightning.data.text_encoder import TextEncoder
from hymba_lightning.data.tokenizer import load_tokenizer
from hymba_lightning.device import device_of
from hymba_lightning.files import not_a_file
from hymba_lightning.generation.loading import find_tokenizer, load_network
from hymba_lightning.generation.reply import Reply
from hymba_lightning.generation.sampler import SamplingConfig, generate
from hymba_lightning.generation.session import Session
from hymba_lightning.model import Hymba, RuntimeConfig

STDIN = "-"


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What is printed."""

    stop: list[str] = dataclasses.field(default_factory=list)
    """Texts that end a continuation, and are left out of it."""
    json: bool = False
    """One JSON object a line and text: prompt, text (the continuation), tokens, ended_by, seconds."""
    verbose: bool = False
    """Tokens and seconds on stderr at the end."""


def sample(
    prompts: list[str],
    weights: str,
    tokenizer: str | None = None,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    output: OutputConfig = OutputConfig(),
    device: str = "auto",
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008
) -> list[Reply]:
    """Continues each prompt and prints it: one prompt as it comes, several each when it is done.

    Returns the continuations.

    Args:
        prompts: Texts to continue; an empty one starts a document from nothing.
        weights: Artifact, checkpoint, or folder of `save_pretrained`.
        tokenizer: SentencePiece model; by default the one that lies beside the weights, or that their run names.
        sampling: How tokens are drawn.
        output: What is printed.
        device: cpu, cuda, or auto.
        runtime: How the network is executed.
    """
    net, processor = load(weights, tokenizer, device, runtime)
    sampling = dataclasses.replace(sampling, stop_ids=ends_of(processor))
    encoder = TextEncoder(processor)
    ids = [[processor.bos_id(), *encoder.encode(prompt).tolist()] for prompt in prompts]
    stops = tuple(output.stop)
    replies = [
        Reply(processor, sampling.stop_ids, sampling.max_new_tokens, stops, at_start=not prompt) for prompt in prompts
    ]
    live = len(prompts) == 1 and not output.json
    if live:
        print(prompts[0], end="", flush=True)
    started = time.monotonic()
    ended: set[int] = set()
    for new in generate(net, ids, sampling, ended=ended):
        for row, token in enumerate(new):
            if token is None:
                continue
            shown = replies[row].push(token)
            if live and shown:
                print(shown, end="", flush=True)
            if replies[row].ended_by is None:
                continue
            ended.add(row)
            if output.json:
                print(_as_json(prompts[row], replies[row], time.monotonic() - started, row), flush=True)
            elif live:
                print(flush=True)
            else:
                print(f"[{row + 1}] {prompts[row]}{replies[row].text}", flush=True)
    if output.verbose:
        _tell_speed(sum(reply.tokens for reply in replies), time.monotonic() - started)
    return replies


def converse(
    lines: Iterator[str],
    weights: str,
    tokenizer: str | None = None,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    output: OutputConfig = OutputConfig(),
    device: str = "auto",
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008
) -> None:
    """Continues a document turn by turn: each line is added to it, and so is each continuation. An empty line goes on.

    Arguments are those of `sample`, but for the lines, without their ends.
    """
    net, processor = load(weights, tokenizer, device, runtime)
    sampling = dataclasses.replace(sampling, stop_ids=ends_of(processor))
    session = Session(net, processor, sampling, tuple(output.stop))
    started, n_new = time.monotonic(), 0
    for turn, line in enumerate(lines):
        began = time.monotonic()
        # Between a continuation and what is typed next stands a line's end, as on the screen.
        for shown in session.say(line if not turn or not line else "\n" + line):
            if not output.json:
                print(shown, end="", flush=True)
        reply = session.last
        if reply is None:
            continue
        n_new += reply.tokens
        print(_as_json(line, reply, time.monotonic() - began, turn) if output.json else "", flush=True)
    if output.verbose:
        _tell_speed(n_new, time.monotonic() - started)


def load(
    weights: str, tokenizer: str | None, device: str, runtime: RuntimeConfig
) -> tuple[Hymba, sentencepiece.SentencePieceProcessor]:
    """Network and tokenizer that belong together. Raises FileNotFoundError or ValueError."""
    where = device_of(device)
    net, fingerprint = load_network(weights, runtime, where)
    processor = load_tokenizer(find_tokenizer(weights, tokenizer, fingerprint))
    if processor.get_piece_size() != net.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {processor.get_piece_size()} pieces, but the network's vocab_size is "
            f"{net.config.vocab_size}: give --tokenizer the right one"
        )
    return net, processor


def ends_of(processor: sentencepiece.SentencePieceProcessor) -> tuple[int, ...]:
    """Ids at which a text ends: the tokenizer's EOS, if it has one, and BOS, which starts another document."""
    return tuple(token for token in (processor.bos_id(), processor.eos_id()) if token >= 0)


def gather_prompts(given: list[str], files: list[str]) -> list[str]:
    """The prompts of the command line, `-` replaced by what stdin holds; without any, what is piped in.

    Raises FileNotFoundError or ValueError for a file that is missing or no UTF-8 text.
    """
    if not given and not files:
        return [_of_stdin()] if _is_piped() else [""]
    if given.count(STDIN) > 1:
        raise ValueError("stdin can be read once: give - once")
    return [*(_of_stdin() if prompt == STDIN else prompt for prompt in given), *map(_of_file, files)]


def typed_lines() -> Iterator[str]:
    """Lines from a person, with a mark to type behind on stderr, or from a pipe."""
    asks, first = sys.stdin.isatty(), True
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            if asks:
                print(file=sys.stderr)
            return
        if asks and not _is_text(line):
            # The document goes on as it is.
            print("the line is not UTF-8 and was left out: type it again", file=sys.stderr)
            continue
        yield _as_of_a_file(line, first).removesuffix("\n")
        first = False


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_piped() -> bool:
    """Whether something is piped or redirected into this process; a terminal or /dev/null is nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _of_stdin() -> str:
    # What `echo` puts behind a text is no part of it.
    return _as_of_a_file(sys.stdin.read()).removesuffix("\n")


def _as_of_a_file(text: str, at_start: bool = True) -> str:
    """As reading a text file gives it: no mark of the encoding in front, and line ends of any system are one."""
    text = text.removeprefix("\ufeff") if at_start else text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _of_file(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir() or not path.exists():  # a pipe is read as a file is
        raise not_a_file(f"--prompt_file {name}", path, "a text file")
    try:
        # A mark of the encoding in front is no text.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_file {name} is no UTF-8 text: {error.reason} at byte {error.start}") from error


def _as_json(prompt: str, reply: Reply, seconds: float, index: int) -> str:
    content: dict[str, Any] = {
        "index": index,
        "prompt": prompt,
        "text": reply.text,
        "tokens": reply.tokens,
        "ended_by": reply.ended_by,
        "seconds": round(seconds, 3),
    }
    return json.dumps(content, ensure_ascii=False)


def _tell_speed(tokens: int, seconds: float) -> None:
    print(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} per second)", file=sys.stderr)
