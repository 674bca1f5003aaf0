"""Training on several folders by share: exact, in each one's own order, the same after going on, of one tokenizer."""

import json
import re
import shlex
import shutil
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NET

from hymba_lightning.cli import run
from hymba_lightning.commands import run_command
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.mixture import MixedSpans
from hymba_lightning.data.prepare import prepare
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.options import shipped_configs

TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"
SEQ_LEN = 7


def write(folder, first, n_tokens, val=False):
    """Shards whose tokens count up from `first`."""
    folder.mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    write_shard(folder / "x_train_000000.bin", np.arange(first, first + n_tokens))
    if val:
        write_shard(folder / "x_val_000000.bin", np.arange(900, 1000))
    return folder


@pytest.fixture
def folders(tmp_path):
    return write(tmp_path / "a", 0, 400, val=True), write(tmp_path / "b", 400, 80), write(tmp_path / "c", 600, 240)


def mixed(folders, **arguments):
    a, b, c = folders
    arguments = {"mixture": {str(b): 0.25, str(c): 0.3}, "seq_len": SEQ_LEN, "micro_batch_size": 2} | arguments
    return HymbaDataModule(str(a), **arguments)


class Numbers:
    """Stands for a part's spans."""

    spans_per_pass = n_tokens = 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 97), min_size=2, max_size=5), st.integers(0, 10**12))
def test_every_part_gets_its_share_of_every_beginning_and_none_of_its_spans_twice(weights, start):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    spans = MixedSpans([Numbers() for _ in shares], shares)
    seen = Counter()
    for span in range(120):
        part, own = spans.place(span)
        assert own == seen[part]  # in its own order, nothing left out
        seen[part] += 1
        for index, share in enumerate(shares):
            assert abs(seen[index] - share * (span + 1)) < len(shares)
    # A number's place does not depend on what was asked before, however far on.
    far = [spans.place(start + offset) for offset in range(50)]
    assert [MixedSpans(spans.parts, shares).place(start + offset) for offset in range(50)] == far
    for part in range(len(shares)):
        own = [number for index, number in far if index == part]
        assert own == list(range(own[0], own[0] + len(own))) if own else True


def test_batches_are_the_folders_own_spans_in_their_own_order(folders):
    data = mixed(folders)
    firsts = [int(row[0]) for i in range(100) for row in data.train_batch(i).inputs]
    own = {
        name: [first for first in firsts if low <= first < high]
        for name, low, high in (("a", 0, 400), ("b", 400, 600), ("c", 600, 1000))
    }
    assert {name: len(found) for name, found in own.items()} == {"a": 90, "b": 50, "c": 60}
    alone = HymbaDataModule(str(folders[0]), seq_len=SEQ_LEN, micro_batch_size=1)
    assert own["a"] == [int(alone.train_batch(i).inputs[0, 0]) for i in range(90)]
    # The smaller folder begins again: ten spans of eight tokens.
    assert own["b"][:10] == own["b"][10:20] == list(range(400, 480, 8))
    located = [data.train_spans.locate(span) for span in range(200)]
    assert {path.parent.name for path, _ in located} == {"a", "b", "c"}


def test_a_run_goes_on_where_it_was_and_validates_on_the_first_folder(folders):
    data = mixed(folders)
    expected = [data.train_batch(i).inputs.tolist() for i in range(8)]
    again = mixed(folders)
    again.load_state_dict(data.state_dict() | {"spans": 10})
    assert [batch.inputs.tolist() for batch in islice(iter(again.train_dataloader()), 3)] == expected[5:]
    assert data.val_stream().n_tokens == 100
    # What was trained on, and how much of each, is in the digest; validation's is the folder's own.
    assert data.data_digest("train") != mixed(folders, mixture={str(folders[1]): 0.25}).data_digest("train")
    assert data.data_digest("val") == HymbaDataModule(str(folders[0]), seq_len=SEQ_LEN).data_digest("val")
    other_share = mixed(folders, mixture={str(folders[1]): 0.26, str(folders[2]): 0.3})
    assert data.data_digest("train") != other_share.data_digest("train")


def test_what_cannot_be_mixed_is_refused(folders, tmp_path):
    a, b, c = map(str, folders)
    for mixture, message in (
        ([(b, 0.3)], "name folders with their shares"),
        ({b: 0.7, c: 0.3}, "1 of the sequences together"),
        ({b: 0.0}, "a share of 0.0; a share lies between 0 and 1"),
        ({b: float("nan")}, "a share of nan"),
        ({a: 0.5}, "twice"),
        ({b: 0.2, f"{c}/../b": 0.2}, "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed(folders, mixture=mixture)
    with pytest.raises(ValueError, match="one place"):
        mixed(folders, train_files=str(folders[0] / "*_train_*.bin"))
    with pytest.raises(FileNotFoundError, match="nowhere, which is no folder"):
        mixed(folders, mixture={str(tmp_path / "nowhere"): 0.5}).setup("fit")
    (folders[1] / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"b of data.mixture is of another tokenizer .*prepare it again"):
        mixed(folders).setup("fit")
    (folders[1] / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="does not say of which tokenizer"):
        mixed(folders).setup("fit")
    shutil.copy(TOKENIZER, folders[1] / "tokenizer.model")
    shutil.copy(folders[0] / "x_val_000000.bin", folders[2] / "y_train_000000.bin")
    with pytest.raises(ValueError, match="training on validation text"):
        mixed(folders).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({}, False), ({"val_fraction": 0.3}, False), ({"val_fraction": 0.05}, True), ({"seed": 1}, True)],
)
def test_folders_that_were_split_in_another_way_are_told_of(tmp_path, caplog, arguments, told):
    """A text of both would be trained on in one and scored in the other."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"some text {n} " * 9}) + "\n" for n in range(60)))
    for name, changed in (("own", {}), ("other", arguments)):
        options = {"tokenizer": str(TOKENIZER), "val_fraction": 0.2, "workers": 1, "progress": False} | changed
        prepare([str(tmp_path / "a.jsonl")], out=str(tmp_path / name), **options)
    data = HymbaDataModule(tmp_path / "own", seq_len=8, mixture={str(tmp_path / "other"): 0.5})
    data.setup("fit")
    assert ("a text in both may be trained on and scored" in caplog.text) == told


def test_the_shipped_mixture_trains_as_its_header_says(tmp_path, monkeypatch):
    """Its commands, with a few kilobytes of text and a smaller network."""
    monkeypatch.chdir(tmp_path)
    for name in ("web", "books"):
        Path(name).mkdir()
        for number in range(40):
            Path(name, f"{number}.txt").write_text(f"{name} {number} has words and more words. " * 8, encoding="utf-8")
    header = re.findall(
        r"^#   hymba (.*)$", shipped_configs()["web_and_books"].read_text(encoding="utf-8"), re.MULTILINE
    )
    *prepares, fit = [shlex.split(line.replace("1024", "300")) for line in header]
    for command, *arguments in prepares:
        run_command(command, arguments)
    small = NET | {"vocab_size": 300}
    toy = [f"--model.net.{name}={value}" for name, value in small.items()]
    toy += ["--trainer.max_steps=10", "--model.budget_seconds=null", "--data.seq_len=32", "--data.val_tokens_limit=64"]
    run([*fit, *toy, "--export.enabled=false", "--summary.plots=false"])
    config = yaml.safe_load(Path("runs/web_and_books/config.yaml").read_text())
    assert config["data"]["mixture"] == {"data/books": 0.3}
    data = HymbaDataModule("data/web", mixture=config["data"]["mixture"], seq_len=32, micro_batch_size=1)
    texts = [data.processor.decode(data.train_batch(step).inputs[0].tolist()) for step in range(10)]
    assert sum("books" in text for text in texts) == 3
    assert sum("web" in text for text in texts) == 7
    assert data.val_stream().n_tokens == HymbaDataModule("data/web", seq_len=32).val_stream().n_tokens
