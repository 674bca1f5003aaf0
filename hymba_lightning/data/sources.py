"""Texts out of Parquet files and Hugging Face datasets, a row at a time. Both need packages of the extra `data`."""

from __future__ import annotations

import importlib
import pickle
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, cast

from hymba_lightning.data.processes import isolated_python
from hymba_lightning.data.streams import SourceError

PARQUET_SUFFIXES = (".parquet",)
HUB_PREFIX = "hf:"


class Row(NamedTuple):
    """One row's text, or why it has none."""

    text: str | None
    share: float
    """How much of the source is read with it."""
    kind: str = ""
    """As `Skips.add` takes it."""
    cause: str = ""


class UnreadableDatasetError(ValueError):
    """A data set that was asked for by name cannot be read."""


def row_of(value: Any, share: float, text_key: str, limit: int) -> Row:
    """A row by its value, which may be anything."""
    if value is None:
        return Row(None, share, "no text", f"no text under {text_key!r} (it is empty)")
    if not isinstance(value, str | bytes | memoryview):
        return Row(None, share, "no text", f"no text under {text_key!r} (it is of type {type(value).__name__})")
    try:
        n_bytes = len(value.encode("utf-8")) if isinstance(value, str) and not value.isascii() else len(value)
    except UnicodeEncodeError as error:
        return Row(None, share, "not UTF-8", f"no text under {text_key!r} ({error})")
    if n_bytes > limit:
        return Row(None, share, "too long", f"longer than {limit:,} bytes; raise max_document_bytes to keep it")
    if not isinstance(value, str):
        return Row(None, share, "not UTF-8", f"no text under {text_key!r} (it is not UTF-8)")
    return Row(value, share)


def parquet_rows(path: Path, text_key: str, limit: int) -> Iterator[Row]:
    """The column `text_key` of a Parquet file, in constant memory.

    A process of its own reads it, whose memory is bounded: a file that is made to blow up, or to crash the reader,
    costs itself only.

    Args:
        path: The file.
        text_key: The column: texts, or bytes that are UTF-8.
        limit: Most bytes of a text.

    Raises:
        ImportError: pyarrow is not installed.
        SourceError: No Parquet file, it has no such column of texts, or it is damaged.
    """
    _package("pyarrow", f"{path}, a Parquet file,")
    command = isolated_python("hymba_lightning.data.parquet", str(path), text_key, str(limit))
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    answers = cast(IO[bytes], process.stdout)
    try:
        yield from answered_rows(answers, process.wait)
    finally:
        process.kill()
        process.wait()
        answers.close()
        cast(IO[bytes], process.stdin).close()


def answered_rows(answers: IO[bytes], ended: Callable[[], int]) -> Iterator[Row]:
    """The rows that `parquet.answer` writes.

    Args:
        answers: Where it writes them.
        ended: Waits for the process that writes; its status.

    Raises:
        SourceError: As `parquet_rows`.
    """
    while True:
        try:
            kind, content = pickle.load(answers)  # type: ignore[arg-type]
        except (EOFError, pickle.UnpicklingError) as error:
            raise SourceError(
                "corrupt Parquet",
                f"reading the Parquet file ended with status {ended()}; "
                "it is damaged, or a row group needs too much memory",
            ) from error
        if kind == "end":
            return
        if kind == "error":
            raise SourceError(*content)
        yield from (Row(*row) for row in content)


def hub_rows(name: str, text_key: str, limit: int) -> Iterator[Row]:
    """The column `text_key` of a data set on the Hugging Face hub or in a local folder, streamed.

    Args:
        name: hf:PATH, hf:PATH:SPLIT or hf:PATH:SPLIT:CONFIG, e.g. hf:roneneldan/TinyStories:train. PATH may be a folder
            that `save_to_disk` wrote. SPLIT is train where it is not given.
        text_key: The column.
        limit: Most bytes of a text.

    Raises:
        ImportError: The package datasets is not installed.
        UnreadableDatasetError: It does not exist, cannot be reached, or has no such column, configuration or split.
    """
    datasets = _package("datasets", f"{name}, a Hugging Face data set,")
    path, _, rest = name.removeprefix(HUB_PREFIX).partition(":")
    split, _, config = rest.partition(":")
    split = split or "train"
    if not path:
        raise UnreadableDatasetError(f"{name} names no data set: give {HUB_PREFIX}NAME[:SPLIT[:CONFIG]]")
    try:
        rows = (
            _from_disk(datasets, path, split)
            if _is_saved(Path(path).expanduser())
            else datasets.load_dataset(path, config or None, split=split, streaming=True)
        )
        columns = rows.column_names
        if columns is not None and text_key not in columns:
            raise ValueError(f"it has no column {text_key!r} among {', '.join(columns)}; set text_key")
        total = rows.info.splits[split].num_examples if rows.info.splits and split in rows.info.splits else None
        for done, row in enumerate(rows, start=1):
            yield row_of(row.get(text_key), done / total if total else 0.0, text_key, limit)
    except Exception as error:
        # datasets raises errors of its own, of the hub, of HTTP and of file systems.
        first = next(iter(str(error).strip().splitlines()), "")
        raise UnreadableDatasetError(f"{name} cannot be read: {first or type(error).__name__}") from error


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _from_disk(datasets: ModuleType, path: str, split: str) -> Any:
    loaded = datasets.load_from_disk(str(Path(path).expanduser()))
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"it has no split {split!r}, but {', '.join(loaded)}; name one as {HUB_PREFIX}{path}:SPLIT")
    return loaded[split]


def _package(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {name.split('.')[0]}, which cannot be imported ({error}): "
            'pip install "hymba-lightning[data]"'
        ) from error
