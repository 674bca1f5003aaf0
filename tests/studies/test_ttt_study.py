"""The study of recipes and the measurement of long generation."""

import dataclasses
import json

import pytest
import torch
import yaml
from tiny import NET, tiny_data, write_data

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.options import shipped_configs
from hymba_lightning.quantization import QuantizationConfig, save_artifact
from hymba_lightning.studies import ttt
from hymba_lightning.studies.long_generation import measure, table
from hymba_lightning.studies.ttt import TTTStudy, run_study

STUDY = {
    "baseline": "cold",
    "common": {"freeze_blocks": 0, "limit_seconds": None},
    "recipes": {
        "cold": {"epochs": 0},
        "carried": {"epochs": 0, "mode": "carried"},
        "trained": {"epochs": 1, "lr": 0.1, "chunk_tokens": 128, "parameters": "mlp"},
    },
}


@pytest.fixture
def study_file(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return tmp_path / "study.yaml"


def export(path, tokenizer):
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(**NET))
    save_artifact(
        path,
        net.state_dict(),
        config=net.config.to_dict(),
        tokenizer=tokenizer,
        metadata={},
        scheme=QuantizationConfig(),
    )


def test_a_study_gives_table_plot_and_goes_on_where_it_was(tmp_path, study_file, monkeypatch):
    export(tmp_path / "a.hymba", {})
    data = tiny_data(write_data(tmp_path / "data"))
    study = TTTStudy.from_yaml(study_file)
    first = run_study(study, tmp_path / "a.hymba", data, tmp_path, only=["carried"])
    assert "| trained |" not in first
    text = run_study(study, tmp_path / "a.hymba", data, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == set(STUDY["recipes"])
    assert all(result["tokens"] == 699 for result in results.values())
    assert results["trained"]["bpb"] < results["cold"]["bpb"]
    assert len(results["trained"]["chunk_bpb"]) == 6
    assert results["trained"]["settings"]["chunk_tokens"] == 128
    assert text.splitlines()[2].startswith("| trained |")
    assert text == (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    monkeypatch.setattr(ttt, "run_recipe", lambda *_: pytest.fail("a recipe was run again"))
    assert run_study(study, tmp_path / "a.hymba", data, tmp_path) == text
    # What would stand in one table with numbers of something else is refused.
    other = dataclasses.replace(study, recipes=study.recipes | {"trained": study.recipes["trained"] | {"lr": 0.2}})
    with pytest.raises(ValueError, match=r"a result of trained with other settings \(lr 0\.1, now 0\.2\)"):
        run_study(other, tmp_path / "a.hymba", data, tmp_path)
    with pytest.raises(ValueError, match=r"results of something else \(validation text \w+, now \w+\)"):
        run_study(study, tmp_path / "a.hymba", tiny_data(write_data(tmp_path / "more", n_val=800)), tmp_path)
    with pytest.raises(ValueError, match=r"no such recipes: \['warm'\]; choose from \['carried', 'cold', "):
        run_study(study, tmp_path / "a.hymba", data, tmp_path, only=["warm"])
    export(tmp_path / "b.hymba", {"sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"b\.hymba was made for another tokenizer"):
        run_study(study, tmp_path / "b.hymba", data, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "none"}, "baseline 'none'"),
        ({"recipes": {"cold": None}}, "cold is None; names with values are needed"),
        ({"recipes": {"cold": {"chunk_tokens": 0}}}, "chunk_tokens of cold is 0; a whole number of at least 1"),
        ({"recipes": {"cold": {"epoch": 1}}}, "no study of recipes"),
        ({"recipes": {"cold": {"mode": "hot"}}}, "hot"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path, change, message):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(STUDY | change))
    with pytest.raises(ValueError, match=message):
        TTTStudy.from_yaml(tmp_path / "wrong.yaml")


def test_the_kept_recipes_are_a_study():
    study = TTTStudy.from_yaml(shipped_configs("studies")["ttt_recipes"])
    assert study.settings(study.baseline)[0].epochs == 3
    assert study.settings("chunks of 32K")[1] == 32768


def test_long_contexts_cost_no_more_memory():
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(**NET))
    results = list(measure(net, [100, 4000], n_new=5, prefill_tokens=256))
    assert results[0].state_bytes == results[1].state_bytes
    assert [result.context for result in results] == [100, 4000]
    assert "| 4,000 |" in table(results)
    with pytest.raises(ValueError, match="rise"):
        next(measure(net, [10, 5], n_new=1))
