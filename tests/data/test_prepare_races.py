"""Two at once, and killed at any moment: one is refused, and what is there is whole or goes on. With real processes.

HYMBA_RACES sets how many of each are tried.
"""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest

from hymba_lightning.data.manifest import first_damage, read_manifest
from hymba_lightning.data.tokenizer import train_tokenizer

RACES = int(os.environ.get("HYMBA_RACES", "2"))
TEXTS = [f"document {number}: " + " ".join(f"w{number * k % 97}" for k in range(60)) for number in range(900)]
# Saves after every few documents, so that there is something to go on from.
CODE = """
import sys, hymba_lightning.data.corpus as corpus
from hymba_lightning.__main__ import main
corpus.SAVE_SECONDS = 0.05
sys.argv = ["hymba", "prepare", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for index in range(3):
        (folder / f"{index}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[300 * index : 300 * (index + 1)])
        )
    (folder.parent / "t.model").write_bytes(train_tokenizer(TEXTS[:200], 300))
    return folder


def start(source, out, *more: str) -> subprocess.Popen:
    arguments = [
        str(source),
        "--out",
        str(out),
        "--tokenizer",
        str(source.parent / "t.model"),
        "--shard_tokens",
        "20000",
        "--workers",
        "2",
        "--progress",
        "false",
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def shards(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.bin"))}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an undisturbed preparation writes, by its seed; and how long it takes."""
    made = {}
    for seed in ("0", "1"):
        out = tmp_path_factory.mktemp(f"whole{seed}")
        started = time.monotonic()
        assert start(source, out, "--seed", seed).wait() == 0
        made[seed] = shards(out)
        made["seconds"] = time.monotonic() - started
    return made


@pytest.mark.slow
@pytest.mark.parametrize("race", range(RACES))
def test_of_two_at_once_one_is_refused_and_the_data_are_whole(source, whole, tmp_path, race):
    chance = random.Random(race)
    other = chance.choice(["0", "1"])
    first = start(source, tmp_path / "out", "--seed", "0")
    time.sleep(chance.uniform(0, whole["seconds"]))
    second = start(source, tmp_path / "out", "--seed", other)
    results = [process.communicate(timeout=120) for process in (first, second)]
    codes = [first.returncode, second.returncode]
    assert 0 in codes
    for code, (said, error) in zip(codes, results, strict=True):
        if code:
            assert error.count("\n") == 1
            assert "is in use by hymba prepare (process" in error or "made with another" in error
        else:
            assert "written in" in said or "is up to date" in said
    made_by = "0" if codes[0] == 0 else other
    assert shards(tmp_path / "out") == whole[made_by]
    assert first_damage(tmp_path / "out", read_manifest(tmp_path / "out")) is None


@pytest.mark.slow
@pytest.mark.parametrize("race", range(RACES))
def test_killed_at_any_moment_it_leaves_the_old_data_or_what_can_be_finished(source, whole, tmp_path, race):
    chance = random.Random(100 + race)
    out = tmp_path / "out"
    assert start(source, out, "--seed", "0").wait() == 0
    left_behind = set()
    for _ in range(3):
        process = start(source, out, "--seed", "1", "--overwrite", "true")
        time.sleep(chance.uniform(0.3 if race % 2 else 0.7, 1.05) * whole["seconds"])
        process.send_signal(signal.SIGKILL)
        process.communicate()
        try:
            read_manifest(out)
        except ValueError as error:
            left_behind.add("begun" if "are being replaced" in str(error) else str(error))
        else:
            assert shards(out) in (whole["0"], whole["1"])
    assert left_behind <= {"begun"}
    process = start(source, out, "--seed", "1", "--overwrite", "true")
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert shards(out) == whole["1"]
    assert first_damage(out, read_manifest(out)) is None
    assert not (out / ".partial").exists() or not list((out / ".partial").glob("*.bin"))


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_the_files_obey_the_umask(source, tmp_path, mask):
    before = os.umask(mask)
    try:
        assert start(source, tmp_path / "out").wait() == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert {"manifest.json", "tokenizer.model", "text_train_000000.bin", ".digests.json"} <= set(modes)
    assert {name: mode for name, mode in modes.items() if mode & mask} == {}
