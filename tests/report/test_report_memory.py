"""The report's section on memory: what `hymba probe` wrote about this run's weights, and of no other."""

import json
import re
import shutil
from pathlib import Path

import pytest

from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.probes.copying import Copy
from hymba_lightning.probes.decay import Memory
from hymba_lightning.probes.positions import Bin, Curve
from hymba_lightning.probes.probe import Probe
from hymba_lightning.probes.recall import Recall
from hymba_lightning.report.page import write_report

PARTS = ["whole network", "recurrence off", "state emptied every 256", "state emptied every 1,024", "window cut to 16"]


def probed(run: Path, folder: Path, **changes: object) -> Path:
    """A copy of the run with a probe of its artifact, in the probe's own writing."""
    shutil.copytree(run, folder)
    curves = [Curve(name, 1.5, 0.01 * i, 0.001, [Bin(8, 9, 1.5, 0.1, 0.0, 0.0)]) for i, name in enumerate(PARTS)]
    probe = Probe(
        file="artifact.hymba",
        file_sha256=json.loads((run / "record.json").read_text())["artifact"]["sha256"],
        weights_sha256="w",
        data="d",
        seq_len=64,
        sequences=2,
        curves=curves,
        copies=[Copy(16, 2, 1.25, 0.1), Copy(32, 2, 0.0, 0.1)],
        recalls=[Recall(pairs, distance, 8, 0.5, 0.1) for pairs in (1, 4) for distance in (8, 16)],
        memory=[Memory(layer, [0.5, 3.25, 4.0, 5.0], 9.0) for layer in (0, 1)],
        recall_steps=3,
        seconds=1.0,
        environment={},
        folder=folder,
    )
    (folder / "probe.json").write_text(json.dumps(json.loads(probe.as_json()) | changes))
    return folder


def section(page: str) -> str:
    return page.partition("What the memory is worth")[2].partition("</section>")[0]


def test_what_was_probed_of_each_run_stands_beside_the_others(runs, tmp_path):
    one, two = probed(runs[0], tmp_path / "one"), probed(runs[1], tmp_path / "two", copies=[])
    path = write_report([str(one), str(two), str(runs[0])], str(tmp_path / "report"))
    found = section(path.read_text())
    for i, name in enumerate(PARTS[1:], start=1):
        row = found.partition(f"<td>{name}</td>")[2].partition("</tr>")[0]
        assert row.count(f"+{10 * i}.0 ± 1.0") == 2
        assert row.count("–") == 1, "the run that was not probed"
    pictures = {"memory_state", "memory_window", "memory_copies", "memory_passkey", "memory_decay"}
    assert {one.stem for one in path.parent.glob("memory_*.png")} == pictures
    assert found.count("<svg") == len(pictures)
    state = found.partition("<b>The recurrent state, emptied</b>")[2].partition("</svg>")[0]
    assert state.count("<polyline") == 2
    assert found.partition("<b>A repeated passage</b>")[2].partition("</svg>")[0].count("<polyline") == 1


def test_layers_are_whole_numbers_and_a_share_is_seen_as_one(runs, tmp_path):
    run = probed(runs[0], tmp_path / "run", memory=[{"layer": n, "tokens": [1, n], "longest": 9} for n in range(4)])
    found = section(write_report([str(run)], str(tmp_path / "report")).read_text())
    layers = found.partition("<b>How long states last</b>")[2].partition("</svg>")[0]
    assert re.findall(r'text-anchor="middle">([\d.]+)<', layers) == ["0", "1", "2", "3"]
    passkey = found.partition("<b>A passkey looked up</b>")[2].partition("</svg>")[0]
    shares = re.findall(r'text-anchor="end">([\d.]+)<', passkey)
    assert (float(shares[0]), float(shares[-1])) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"file_sha256": "0" * 64}, "probe.json is not of this run&#x27;s weights"),
        ({"curves": [{"name": "whole network"}, 7]}, "rows in probe.json are damaged"),
        (
            {"memory": [{"layer": 0, "tokens": [1, "x"], "longest": 2}, {"layer": 1, "tokens": 3}]},
            "1 of 1 rows in probe",
        ),
        ({"copies": {"distance": 1}}, "1 of 1 rows in probe"),
    ],
    ids=["other weights", "curves", "memory", "copies"],
)
def test_a_probe_of_other_weights_or_damaged_is_a_note(runs, tmp_path, changes, note):
    run = probed(runs[0], tmp_path / "run", **changes)
    page = write_report([str(run)], str(tmp_path / "report")).read_text()
    assert note in page.partition("<h2>Missing</h2>")[2]
    assert bool(section(page)) == ("file_sha256" not in changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"copies": [{"distance": 0, "gain": 1.0, "error": 0.1}, {"distance": 8, "gain": 1.0, "error": 0.1}]},
        {"curves": [{"name": "state emptied every ,", "bpb": 1.0, "worse": 0.1, "worse_error": 0.1}]},
        {"curves": [{"name": "whole", "bpb": 10**400, "worse": 0.1, "worse_error": 0.1}]},
        {"memory": [{"layer": layer, "tokens": [1, 2], "longest": 2} for layer in (0, 5e-324)]},
    ],
    ids=["no distance", "no number of tokens", "beyond floats", "next to nothing apart"],
)
def test_no_number_of_a_probe_ends_the_report(runs, tmp_path, changes):
    run = probed(runs[0], tmp_path / "run", **changes)
    assert write_report([str(run)], str(tmp_path / "report")).is_file()


def test_a_probe_of_the_last_checkpoint_of_a_run_without_scores_is_its_own(runs, tmp_path):
    checkpoint = runs[0] / "checkpoints" / "last.ckpt"
    run = probed(runs[0], tmp_path / "killed", file_sha256=file_sha256(checkpoint))
    for name in ("record.json", "summary.json", "test_summary.json", "artifact.hymba"):
        (run / name).unlink()
    assert section(write_report([str(run)], str(tmp_path / "report")).read_text())


def test_a_run_that_was_not_probed_has_no_such_section(runs, tmp_path):
    assert "What the memory is worth" not in write_report([str(runs[0])], str(tmp_path / "report")).read_text()
