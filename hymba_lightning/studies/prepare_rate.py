"""How fast `prepare` is beside SentencePiece alone, which is given the same texts as a list, on as many cores.

A pair is one of each, whichever first by turns; only ratios of pairs say something on a busy machine.
"""

from __future__ import annotations

import gzip
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zstandard

from hymba_lightning.data.documents import DocumentReader
from hymba_lightning.data.inputs import EXCLUDED_FOLDERS, find_inputs
from hymba_lightning.data.prepare import prepare
from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@dataclass(frozen=True)
class Spent:
    """What one call took."""

    wall: float
    """Seconds."""
    processor: float
    """Seconds, of helper processes too."""


@dataclass(frozen=True)
class Pair:
    """One call of each."""

    bare: Spent
    prepare: Spent

    @property
    def wall_ratio(self) -> float:
        """How many times as fast `prepare` is."""
        return self.bare.wall / self.prepare.wall

    @property
    def processor_ratio(self) -> float:
        """The same in processor time."""
        return self.bare.processor / self.prepare.processor


def take_texts(inputs: list[str], n_bytes: int) -> list[str]:
    """The first documents of the inputs, of about so many UTF-8 bytes. Raises ValueError where there are fewer."""
    texts, left = [], n_bytes
    for document in DocumentReader(find_inputs(inputs, EXCLUDED_FOLDERS, 0, Path("/nowhere")), "text", None):
        text = document.utf8[:left].decode("utf-8", errors="ignore")
        texts.append(text)
        left -= len(document.utf8)
        if left <= 0:
            return texts
    raise ValueError(f"the inputs hold {n_bytes - left:,} bytes of text, not {n_bytes:,}: give more, or ask for fewer")


def measure(texts: list[str], *, vocab_size: int, workers: int, pairs: int, suffix: str = ".zst") -> list[Pair]:
    """
    Args:
        texts: Documents.
        vocab_size: Of the tokenizer, which is trained on their begin.
        workers: Processes of `prepare`, and threads of SentencePiece.
        pairs: How often both are timed.
        suffix: Of the file that `prepare` reads them from: "", ".gz" or ".zst".
    """
    results: list[Pair] = []
    with tempfile.TemporaryDirectory(prefix="hymba-rate-") as temporary:
        folder = Path(temporary)
        source, model = folder / f"texts.jsonl{suffix}", folder / "t.model"
        source.write_bytes(PACKERS[suffix]("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
        sample = "".join(texts)[:4_000_000]
        model.write_bytes(
            train_tokenizer([sample[start : start + 2000] for start in range(0, len(sample), 2000)], vocab_size)
        )
        processor = load_tokenizer(model)

        def bare() -> None:
            processor.encode(texts, num_threads=workers)

        def prepared() -> None:
            prepare(
                [str(source)],
                str(folder / "out"),
                tokenizer=str(model),
                val_fraction=0.3,
                workers=workers,
                overwrite=True,
                progress=False,
                seed=len(results),
            )

        for index in range(pairs):
            first, second = (bare, prepared) if index % 2 else (prepared, bare)
            spent = {each: _spent(each) for each in (first, second)}
            results.append(Pair(spent[bare], spent[prepared]))
    return results


def table(pairs: list[Pair], n_bytes: int) -> str:
    """A row for each pair (Markdown), and the medians."""
    megabytes = n_bytes / 1e6
    lines = [
        "| bare, MB/s | prepare, MB/s | ratio | bare, processor s | prepare, processor s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {megabytes / pair.bare.wall:.2f} | {megabytes / pair.prepare.wall:.2f} | {pair.wall_ratio:.2f} | "
        f"{pair.bare.processor:.2f} | {pair.prepare.processor:.2f} | {pair.processor_ratio:.2f} |"
        for pair in pairs
    ]
    medians = [
        statistics.median(ratios) for ratios in zip(*((p.wall_ratio, p.processor_ratio) for p in pairs), strict=True)
    ]
    return "\n".join([*lines, f"| median | | {medians[0]:.2f} | | | {medians[1]:.2f} |"])


def _spent(call: Callable[[], None]) -> Spent:
    wall, processor = time.perf_counter(), _processor_seconds()
    call()
    return Spent(time.perf_counter() - wall, _processor_seconds() - processor)


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
