"""The fuzz harness: true files pass, nothing is read wrongly, and a careless reader is found out."""

import random

import pytest

from hymba_lightning.studies.fuzz import Format, NotTriedError, Reading, damage, edit, fuzz, run
from hymba_lightning.studies.fuzz_formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_end_in_a_refusal_or_the_right_content(name):
    try:
        form = FORMATS[name]()
    except NotTriedError as error:
        pytest.skip(str(error))
    # Every Parquet file takes a process.
    n = 20 if "parquet" in name else 150
    outcome = fuzz(form, n, seed=1)
    assert (outcome.tried, outcome.wrong, outcome.example) == (n, 0, "")
    assert outcome.refused + outcome.right + outcome.other == n
    assert outcome.refused > 0.2 * n
    assert outcome.slowest < 1
    assert outcome.largest < 200
    assert outcome.row().startswith(f"| {outcome.name} | {n} | ")


def careless(refusals: tuple = (ValueError,), sentence: str = "{path} begins otherwise") -> Format:
    def make(path):
        path.write_bytes(b"0123456789" * 20)
        return path.read_bytes()

    def read(path, content):
        if path.read_bytes()[:1] != b"0":
            raise ValueError(sentence.format(path=path))
        return Reading.RIGHT if path.read_bytes() == b"0123456789" * 20 else Reading.WRONG

    return Format("careless", make, damage, read, refusals)


def test_a_reader_that_takes_damage_is_counted_and_one_that_crashes_ends_the_run(tmp_path):
    outcome = fuzz(careless(), 200)
    assert outcome.wrong > 50
    assert outcome.example.startswith("careless, number ")
    with pytest.raises(ValueError, match="begins otherwise"):
        fuzz(careless(refusals=(KeyError,)), 200)
    with pytest.raises(ValueError, match=r"read wrongly(.|\n)*careless"):
        run({"careless": careless}, ["careless"], 50, 0, tmp_path / "table.md")
    assert "careless" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="unknown format shards: choose from careless"):
        run({"careless": careless}, ["shards"], 1, 0, None)


@pytest.mark.parametrize("sentence", ["it is damaged", "{path}\nis damaged"])
def test_a_refusal_that_names_no_file_or_takes_lines_is_wrong(sentence):
    outcome = fuzz(careless(sentence=sentence), 200)
    assert outcome.refused == 0
    assert outcome.wrong > 100


def test_a_format_whose_package_is_missing_is_left_out_and_said():
    def missing():
        raise NotTriedError("no package")

    table = run({"missing": missing, "shard": FORMATS["shard-alone"]}, [], 5, 0, None)
    assert "| missing: not tried, no package |" in table
    assert "| shard alone, damaged | 5 |" in table
    with pytest.raises(NotTriedError):
        run({"missing": missing}, ["missing"], 5, 0, None)


def test_edits_change_one_part():
    rng = random.Random(0)
    value = {"a": [1, 2, {"b": 3}], "c": "d"}
    assert sum(edit(value, rng) != value for _ in range(100)) > 80
    assert value == {"a": [1, 2, {"b": 3}], "c": "d"}
