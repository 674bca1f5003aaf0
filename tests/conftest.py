"""Shared by all tests: one thread, and the folder of shared test modules on the path."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fitted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny run that was fitted, exported and tested; config and data beside it. Do not change it."""
    from fitted import make_run

    return make_run(tmp_path_factory.mktemp("fitted"))
