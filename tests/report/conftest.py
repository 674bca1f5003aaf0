"""Shared by the tests of the report: two runs."""

import shutil

import pytest
import yaml


@pytest.fixture(scope="module")
def runs(fitted_run, tmp_path_factory):
    """A run, and a second one like it with another name and window."""
    run = fitted_run
    other = tmp_path_factory.mktemp("report") / "wide"
    shutil.copytree(run, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["net"]["window"] = 77
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    return run, other
