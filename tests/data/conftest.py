"""Shared by the tests of data: a tokenizer, and files of words."""

from __future__ import annotations

from pathlib import Path

import prepared
import pytest

from hymba_lightning.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a model of 300 pieces, with byte fallback."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(train_tokenizer(prepared.TEXTS, 300))
    return str(path)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Forty files in two folders below `in`: their texts, by name."""
    written = {}
    for seed in range(40):
        path = tmp_path / "in" / ("deep/er" if seed % 2 else "") / f"file{seed}.{'py' if seed % 3 else 'txt'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(prepared.words_text(seed).encode())
        written[path.name] = prepared.words_text(seed)
    return written
