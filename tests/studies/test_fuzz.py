"""The fuzz harness: true files pass, nothing is read wrongly, and a careless reader is found out."""

import random

import pytest

from hymba_lightning.studies.fuzz import FORMATS, Format, damage, edit, fuzz, run


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_end_in_a_refusal_or_the_right_content(name):
    outcome = fuzz(FORMATS[name](), 150, seed=1)
    assert (outcome.tried, outcome.wrong) == (150, 0)
    assert outcome.refused + outcome.right == 150
    assert outcome.refused > 60
    assert outcome.slowest < 1
    assert outcome.largest < 200
    assert outcome.row().startswith(f"| {outcome.name} | 150 | ")


def careless(refusals: tuple = (ValueError,)) -> Format:
    def make(path):
        path.write_bytes(b"0123456789" * 20)
        return path.read_bytes()

    def read(path, content):
        if path.read_bytes()[:1] != b"0":
            raise ValueError
        return path.read_bytes() == b"0123456789" * 20

    return Format("careless", make, damage, read, refusals)


def test_a_reader_that_takes_damage_is_counted_and_one_that_crashes_ends_the_run(tmp_path, monkeypatch):
    assert fuzz(careless(), 200).wrong > 50
    with pytest.raises(ValueError, match=r"^$"):
        fuzz(careless(refusals=(KeyError,)), 200)
    monkeypatch.setitem(FORMATS, "careless", careless)
    with pytest.raises(ValueError, match=r"read wrongly(.|\n)*careless"):
        run(["careless"], 50, 0, tmp_path / "table.md")
    assert "careless" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="unknown format shard"):
        run(["shard"], 1, 0, None)


def test_edits_change_one_part():
    rng = random.Random(0)
    value = {"a": [1, 2, {"b": 3}], "c": "d"}
    assert sum(edit(value, rng) != value for _ in range(100)) > 80
    assert value == {"a": [1, 2, {"b": 3}], "c": "d"}
