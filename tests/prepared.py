"""Texts to prepare, as JSON lines and in files; what a reader makes of a file; what a prepared folder holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hymba_lightning.data.documents import DocumentReader
from hymba_lightning.data.inputs import InputFile
from hymba_lightning.data.prepare import PrepareSummary, prepare
from hymba_lightning.data.shards import Shard, find_shards
from hymba_lightning.data.skips import Skips
from hymba_lightning.data.tokenizer import file_sha256, load_tokenizer

TEXTS = [f"document {number}: " + " ".join(f"w{number * k % 97}" for k in range(40)) for number in range(60)]
WORDS = ["def", "return", "ångström", "if", "width", "height", "(x)", "\n    ", "  ", "日本", "▁", "1,234", "\t", "'''"]


def json_lines(texts: Iterable[str]) -> bytes:
    """A line of JSON for each text."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def words_text(seed: int, n_words: int = 300) -> str:
    """A document of words, spaces and line ends of all sorts."""
    random = np.random.default_rng(seed)
    return f"# document {seed}\n" + " ".join(random.choice(WORDS, n_words))


def read(path: Path, strict: bool = False, **arguments: Any) -> tuple[list[str], dict[str, Any]]:
    """Texts of a file, and what was skipped."""
    text_key, separator = arguments.pop("text_key", "text"), arguments.pop("separator", None)
    reader = DocumentReader([InputFile(path, path.name)], text_key, separator, Skips(strict), **arguments)
    return [document.text for document in reader], reader.skips.state()


def only_kind(skipped: dict[str, Any]) -> str:
    """The one kind of what was skipped."""
    (kind,) = skipped["kinds"]
    return kind


def run(sources: Any, out: Path, tokenizer: str | None, **arguments: Any) -> PrepareSummary:
    """Prepares one source, or several, with a given tokenizer."""
    sources = sources if isinstance(sources, list) else [sources]
    defaults = {"out": str(out), "tokenizer": tokenizer, "val_fraction": 0.3, "workers": 1, "progress": False}
    return prepare([str(source) for source in sources], **(defaults | arguments))


def tokens(out: Path, split: str) -> list[int]:
    """Ids of a split."""
    opened = [Shard(path) for path in find_shards(f"*_{split}_*.bin", out)]
    return [token for shard in opened for token in shard.read(0, shard.n_tokens).tolist()]


def documents(out: Path, split: str) -> list[str]:
    """Texts of a split, decoded from the shards."""
    processor = load_tokenizer(out / "tokenizer.model")
    cut: list[list[int]] = []
    for token in tokens(out, split):
        if token == processor.bos_id():
            cut.append([])
        else:
            cut[-1].append(token)
    return [processor.decode(ids) for ids in cut]


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what is in a folder, by name."""
    return {path.name: file_sha256(path) for path in folder.iterdir() if not path.name.startswith(".")}


def prepare_words(tmp_path: Path, inputs: list[str] | None = None, **arguments: Any) -> PrepareSummary:
    """Prepares the files of the fixture `texts`, with a tokenizer of their own unless one is given."""
    defaults = {"out": tmp_path / "out", "tokenizer": None, "vocab_size": 330, "val_fraction": 0.2}
    return run(inputs or [tmp_path / "in"], **(defaults | arguments))
