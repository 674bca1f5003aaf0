"""The highest level is tried where it may gain, and once for each content."""

import numpy as np
import pytest
import torch

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import QuantizationConfig, format, save_artifact


@pytest.fixture
def levels(monkeypatch):
    """(level, bytes) of every frame that is made."""
    made = []
    frame = format.frame
    monkeypatch.setattr(
        format, "frame", lambda raw, level, cuts=(): made.append((level, raw)) or frame(raw, level, cuts)
    )
    return made


def noise(n):
    return np.random.default_rng(0).normal(128, 6, n).round().astype(np.uint8).tobytes()


def test_of_long_content_that_repeats_nothing_only_pieces_are_compressed_at_a_high_level(levels):
    content = noise(format.LONG)
    assert format.compress(content, 19) == format.draft(content)
    assert 0 < max(len(raw) for level, raw in levels if level == 19) <= format.PIECES * format.PIECE_BYTES


def test_long_content_with_much_to_find_is_compressed_at_the_level_asked_for():
    # Words drawn from so many that only a high level's search finds them.
    generator = np.random.default_rng(0)
    words = generator.integers(0, 256, (60_000, 10), dtype=np.uint8)
    content = words[generator.integers(0, 60_000, format.LONG // 10 + 1)].tobytes()
    packed = format.compress(content, 9)
    assert len(packed) < 0.97 * len(format.draft(content))
    assert format.decompress(packed, len(content), "payload") == content


def test_short_content_is_always_tried(levels):
    content = noise(10_000)
    format.compress(content, 22)
    assert (22, content) in levels


def test_what_was_measured_last_is_written_without_compressing_it_again(levels, tmp_path):
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, window=8, d_state=4))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scheme = QuantizationConfig(scheme="mixed", limit_bytes=30_000)
    report = save_artifact(
        tmp_path / "a", net.state_dict(), config=net.config.to_dict(), tokenizer={}, metadata={}, scheme=scheme
    )
    payloads = [raw for level, raw in levels if level == 22 and b"tensors" not in raw]
    assert payloads
    assert len(payloads) == len(set(payloads))
    assert report.bytes <= 30_000
