"""The process that reads one Parquet file for `parquet_rows`: pyarrow on an untrusted file."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from hymba_lightning.data.sources import row_of

ROWS_AT_ONCE = 256
BATCH_BYTES = 32 << 20
MEMORY_BYTES = 2 << 30


def main(arguments: list[str]) -> None:
    """Runs `answer` for a path, a text_key and a limit, given as text, and writes to standard output."""
    path, text_key, limit = arguments[0], arguments[1], int(arguments[2])
    threading.Thread(target=_end_with_input, daemon=True).start()
    answers = sys.stdout.buffer
    # What libraries print must not get among the answers.
    sys.stdout = sys.stderr
    answer(path, text_key, limit, answers)


def answer(path: str, text_key: str, limit: int, answers: IO[bytes]) -> None:
    """Writes pickled ("rows", rows), …, and ("end", None) or ("error", (kind, cause)).

    The process must do nothing else: its memory is limited from here on, and a damaged file may crash it.

    Args:
        path: The file.
        text_key: The column.
        limit: Most bytes of a text.
        answers: Where to write.
    """
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    with contextlib.suppress(ImportError, ValueError, OSError):
        resource = importlib.import_module("resource")
        most = MEMORY_BYTES + _data_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        for rows in _rows(path, text_key, limit):
            pickle.dump(("rows", [tuple(row) for row in rows]), answers, pickle.HIGHEST_PROTOCOL)
        last: tuple[str, Any] = ("end", None)
    except _ColumnError as error:
        last = ("error", ("no text column", str(error)))
    except MemoryError:
        last = ("error", ("too much memory", f"reading it needs more than {MEMORY_BYTES >> 20:,} MiB"))
    except (ValueError, OSError, TypeError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        last = ("error", ("corrupt Parquet", f"no Parquet file, or a damaged one ({first})"))
    pickle.dump(last, answers, pickle.HIGHEST_PROTOCOL)
    answers.flush()


def _data_bytes() -> int:
    """What this process has allocated already, as the limit counts it."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _end_with_input() -> None:
    """The parent holds this process's input: whatever ends it ends this one."""
    sys.stdin.buffer.read()
    os._exit(1)


class _ColumnError(Exception):
    """The file holds no column of texts of that name."""


def _rows(path: str, text_key: str, limit: int) -> Iterator[list]:
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    arrow.set_cpu_count(1)
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        if text_key not in names:
            raise _ColumnError(f"no column {text_key!r} among {', '.join(names)}; set text_key")
        if names.count(text_key) > 1:
            raise _ColumnError(f"{names.count(text_key)} columns {text_key!r}; give one of them another name")
        kind = file.schema_arrow.field(text_key).type
        values = kind.value_type if arrow.types.is_dictionary(kind) else kind
        is_text = (
            arrow.types.is_string,
            arrow.types.is_large_string,
            arrow.types.is_string_view,
            arrow.types.is_binary,
            arrow.types.is_large_binary,
            arrow.types.is_binary_view,
        )
        if not any(check(values) for check in is_text):
            raise _ColumnError(f"no texts in column {text_key!r}, but {kind}; set text_key")
        total, done = max(file.metadata.num_rows, 1), 0
        for batch in file.iter_batches(_batch_rows(file, text_key), columns=[text_key], use_threads=False):
            rows, n_bytes = [], 0
            for value in _values(batch.column(0), limit):
                done += 1
                rows.append(row_of(value, min(done / total, 1.0), text_key, limit))
                # Rows may share one long text that the file holds once.
                n_bytes += len(rows[-1].text or "")
                if n_bytes > BATCH_BYTES:
                    yield rows
                    rows, n_bytes = [], 0
            yield rows
        if done != file.metadata.num_rows:
            raise ValueError(f"{done:,} rows instead of {file.metadata.num_rows:,}")


def _batch_rows(file: Any, text_key: str) -> int:
    """Rows whose texts are together about BATCH_BYTES, by the file's own account."""
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    columns = [
        group.column(index)
        for group in groups
        for index in range(group.num_columns)
        if group.column(index).path_in_schema == text_key
    ]
    n_bytes = sum(column.total_uncompressed_size for column in columns)
    return max(1, min(ROWS_AT_ONCE, BATCH_BYTES * max(file.metadata.num_rows, 1) // max(n_bytes, 1)))


def _values(column: Any, limit: int) -> Iterator[Any]:
    """Python values: bytes that are UTF-8 as text, those that are not, or too many, as a view of bytes."""
    if hasattr(column, "dictionary"):
        # A long text that many rows share is there once.
        texts = list(_values(column.dictionary, limit))
        yield from (None if index is None else texts[index] for index in column.indices.to_pylist())
        return
    arrow = importlib.import_module("pyarrow")
    if arrow.types.is_string_view(column.type) or arrow.types.is_binary_view(column.type):
        column = column.cast(arrow.large_binary())
    _, offsets, data = column.buffers()
    is_large = arrow.types.is_large_string(column.type) or arrow.types.is_large_binary(column.type)
    all_ends = np.frombuffer(offsets, np.int64 if is_large else np.int32)
    ends = all_ends[column.offset : column.offset + len(column) + 1].tolist()
    content = memoryview(b"" if data is None else data)
    for is_valid, start, end in zip(column.is_valid().to_pylist(), ends, ends[1:], strict=False):
        text = content[start:end]
        try:
            yield None if not is_valid else text if len(text) > limit else str(text, "utf-8")
        except UnicodeDecodeError:
            yield text
