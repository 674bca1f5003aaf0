"""What scripts/demo and scripts/test install: pinned, each file by its hash, and refused where the hash is another."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Version by name; of several, the last."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE)
    return {normalised(name): version for name, version in found}


@pytest.mark.parametrize("group", ["base", "cpu", "cuda", "dev"])
def test_every_pin_has_its_files_hashes(group):
    text = (ROOT / "requirements" / f"{group}.txt").read_text()
    blocks = re.split(r"\n(?=\w)", text.strip())[1:]
    assert blocks
    for block in blocks:
        pin, *hashes = block.split(" \\\n    ")
        assert re.fullmatch(r"[\w.-]+==[\w.+]+( ; .*)?", pin)
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in hashes)


def test_hashes_are_those_of_the_pinned_versions_and_cover_what_is_needed():
    base, cuda, dev = (pins(ROOT / "requirements" / f"{group}.txt") for group in ("base", "cuda", "dev"))
    pinned = pins(ROOT / "constraints.txt")
    triton = {"triton": pinned["triton"]}
    assert pinned == {name: version for name, version in (base | dev | triton).items() if name in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {
        extra: {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
        for extra, requirements in ({"": project["dependencies"]} | project["optional-dependencies"]).items()
    }
    assert names[""] <= set(base)
    assert names["dev"] <= set(dev)
    assert {name for name in cuda if name.startswith("nvidia-")}
    assert not {name for name in base if name.startswith(("nvidia-", "cuda-"))}


@pytest.mark.slow
def test_a_file_with_another_hash_is_not_installed_and_the_remedy_is_said(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment", tmp_path / "scripts")
    for name in ("constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_text("")
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").write_text("")
    (tmp_path / "requirements" / "base.txt").write_text(f"tiny==1.0 --hash=sha256:{'0' * 64}\n")
    done = subprocess.run(
        ["bash", "-c", "source scripts/environment && echo installed"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "HYMBA_EXTRAS": "",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(tmp_path),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
    )
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "set HYMBA_UNHASHED=1" in done.stderr
    assert "installed" not in done.stdout
    assert not (tmp_path / ".venv" / ".installed").exists()


@pytest.mark.parametrize(("there", "asked", "made"), [("dev", "", False), ("", "dev", True), ("dev", "dev", False)])
def test_an_environment_with_more_than_is_asked_for_serves(tmp_path, there, asked, made):
    """The demo runs in the tests' environment instead of making it anew without what the tests need."""
    for name in ("scripts/environment", "constraints.txt", "pyproject.toml", "requirements/base.txt"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    sum_of_pins = "$(cat constraints.txt requirements/*.txt pyproject.toml | cksum)"
    script = f'mkdir .venv; echo "{sum_of_pins} {there}" > .venv/.installed; source scripts/environment; echo kept'
    (tmp_path / "bin").mkdir()
    # A Python that makes no environment.
    (tmp_path / "bin" / "python3.12").write_text('#!/bin/sh\n[ "$1" = -c ]\n')
    (tmp_path / "bin" / "python3.12").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"HYMBA_EXTRAS": asked, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ("Making .venv" in done.stdout, "kept" in done.stdout) == (made, not made)
