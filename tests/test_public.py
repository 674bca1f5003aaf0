"""What the package offers at its top: every name is there, and none is imported before it is asked for."""

import subprocess
import sys

import hymba_lightning


def test_every_public_name_can_be_imported():
    named = {name for names in hymba_lightning.HOMES.values() for name in names}
    assert named == set(hymba_lightning.__all__)
    for name in hymba_lightning.__all__:
        assert getattr(hymba_lightning, name).__name__ == name
    assert set(hymba_lightning.__all__) <= set(dir(hymba_lightning))
    assert not hasattr(hymba_lightning, "Hymbo")


def test_the_import_is_light():
    code = "import hymba_lightning, sys; print('torch' in sys.modules, hymba_lightning.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == f"False {hymba_lightning.__version__}\n"
