"""The rate of prepare: both are timed on the same texts, in pairs, and too little text is refused."""

import pytest

from hymba_lightning import studies
from hymba_lightning.studies.prepare_rate import Pair, Spent, table


def test_a_pair_of_each_is_timed(tmp_path, capsys):
    texts = "".join(f'{{"text": "document {number}: {number * 77} words"}}\n' for number in range(2000))
    (tmp_path / "a.jsonl").write_text(texts)
    options = ["--megabytes", "0.03", "--vocab_size", "300", "--workers", "1", "--pairs", "2"]
    studies.run(["prepare", str(tmp_path / "a.jsonl"), *options])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("| median |")
    with pytest.raises(ValueError, match=r"bytes of text, not 3,000,000: give more, or ask for fewer"):
        studies.run(["prepare", str(tmp_path / "a.jsonl"), "--megabytes", "3"])
    with pytest.raises(ValueError, match=r"--suffix '\.xz' is unknown"):
        studies.run(["prepare", str(tmp_path / "a.jsonl"), "--suffix", ".xz"])


def test_ratios_say_how_many_times_as_fast_prepare_is():
    pair = Pair(bare=Spent(wall=3.0, processor=4.0), prepare=Spent(wall=2.0, processor=1.0))
    assert (pair.wall_ratio, pair.processor_ratio) == (1.5, 4.0)
    assert "| 1.00 | 1.50 | 1.50 | 4.00 | 1.00 | 4.00 |" in table([pair], 3_000_000)
