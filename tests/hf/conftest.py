"""What the tests of saved folders share."""

import pytest


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to spoil, of the folder that the test file's `saved` is."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path
