"""Texts out of Parquet files and Hugging Face datasets, a row at a time. Both need packages of the extra `data`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

PARQUET_SUFFIXES = (".parquet",)
HUB_PREFIX = "hf:"
ROWS_AT_ONCE = 256


class UnreadableSourceError(ValueError):
    """A file or data set that holds no texts as asked for."""


class Row(NamedTuple):
    """One row's text, or whatever is in its place, and how much of the source is read with it."""

    text: Any
    share: float


def _package(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {name.split('.')[0]}, which cannot be imported ({error}): "
            'pip install "hymba-lightning[data]"'
        ) from error


def parquet_rows(path: Path, text_key: str) -> Iterator[Row]:
    """The column `text_key` of a Parquet file, in constant memory.

    Raises:
        ImportError: pyarrow is not installed.
        UnreadableSourceError: No Parquet file, or it has no such column.
    """
    parquet = _package("pyarrow.parquet", f"{path}, a Parquet file,")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:
        raise UnreadableSourceError(f"no Parquet file ({error})") from error
    with file:
        columns = file.schema_arrow.names
        if text_key not in columns:
            raise UnreadableSourceError(f"no column {text_key!r} among {', '.join(columns)}; set text_key")
        total, done = file.metadata.num_rows, 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[text_key]):
            for value in batch.column(0).to_pylist():
                done += 1
                yield Row(value, done / total)


def hub_rows(name: str, text_key: str) -> Iterator[Row]:
    """The column `text_key` of a data set on the Hugging Face hub or in a local folder, streamed.

    Args:
        name: hf:PATH, hf:PATH:SPLIT or hf:PATH:SPLIT:CONFIG, e.g. hf:roneneldan/TinyStories:train. SPLIT is train
            where it is not given.
        text_key: The column.

    Raises:
        ImportError: The package datasets is not installed.
        UnreadableSourceError: It has no such column, configuration or split.
        OSError: It does not exist, or the hub cannot be reached.
    """
    datasets = _package("datasets", f"{name}, a Hugging Face data set,")
    path, _, rest = name.removeprefix(HUB_PREFIX).partition(":")
    split, _, config = rest.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except ValueError as error:
        raise UnreadableSourceError(str(error)) from error
    columns = rows.column_names
    if columns is not None and text_key not in columns:
        raise UnreadableSourceError(f"no column {text_key!r} among {', '.join(columns)}; set text_key")
    total = rows.info.splits[split or "train"].num_examples if rows.info.splits else None
    for done, row in enumerate(rows, start=1):
        yield Row(row.get(text_key), done / total if total else 0.0)
