"""What the tests of saved folders share."""

import pytest
from tiny import NET, TOKENIZER, lively

from hymba_lightning import HymbaConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with both files of weights, not to be changed; a test file may have another one of this name."""
    net = lively(HymbaConfig(**NET, tied_embed_std=0.3)).eval()
    return net.save_pretrained(tmp_path_factory.mktemp("saved"), tokenizer=TOKENIZER, weights="both")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to spoil, of the folder that the test file's `saved` is."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path
