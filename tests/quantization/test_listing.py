"""`hymba inspect`: what it says is what the file holds, quickly, and a damaged file is refused in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hymba_lightning.closure import evaluation_code_bytes
from hymba_lightning.commands import run_command
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.roles import Role
from hymba_lightning.quantization import (
    ArtifactError,
    QuantizationConfig,
    inspect_artifact,
    load_artifact,
    save_artifact,
)
from hymba_lightning.quantization.listing import as_table, list_artifact

NET = HymbaConfig(
    vocab_size=60,
    n_layers=2,
    d_model=32,
    n_heads=2,
    n_kv_heads=1,
    d_state=4,
    bigram_buckets=8,
    bigram_dim=8,
    kv_share_every=2,
    dt_rank=2,
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("listing") / "net.hymba"
    net = Hymba(NET)
    for parameter in net.parameters():  # so that no two are equal
        torch.nn.init.normal_(parameter)
    save_artifact(
        path,
        net.state_dict(),
        config=NET.to_dict(),
        tokenizer={"sha256": "ab"},
        metadata={"steps": 3},
        scheme=QuantizationConfig(keep_float_numel=500, bits=5, limit_bytes=1_000_000),
    )
    return path


def test_the_listing_is_the_file(artifact):
    listing = list_artifact(artifact, lambda mixer: 1000)
    loaded, report = inspect_artifact(artifact)
    assert (listing["config"], listing["tokenizer"], listing["metadata"]) == (
        NET.to_dict(),
        {"sha256": "ab"},
        {"steps": 3},
    )
    assert listing["bytes"] == artifact.stat().st_size
    assert listing["share"] == (listing["bytes"] + 1000) / 1_000_000
    for tensor, expected in zip(listing["tensors"], report.tensors, strict=True):
        assert (tensor["name"], tensor["storage"], tensor["bytes"]) == (expected.name, expected.storage, expected.bytes)
        assert tensor["weights"] == loaded.state_dict[tensor["name"]].numel()
        assert tensor["bits_per_weight"] == 8 * expected.bytes / tensor["weights"]
    storage = {tensor["name"]: tensor["storage"] for tensor in listing["tensors"]}
    assert storage["blocks.0.attn.kv_proj.weight"] == "int5"
    assert storage["blocks.1.attn.kv_proj.weight"].startswith("alias")
    assert sum(tensor["bytes"] for tensor in listing["tensors"]) + listing["header_bytes"] == pytest.approx(
        listing["bytes"], abs=len(listing["tensors"])
    )


def test_the_table_is_aligned_and_counts_shared_weights_once(artifact):
    text = as_table(list_artifact(artifact, lambda mixer: 1000))
    assert "d_model 32" in text
    assert "bits 5, keep_float_numel 500, limit_bytes 1000000, scheme rows\n" in text
    rows = text.split("\n\n")[1].splitlines()
    assert len(rows) == 1 + len(Hymba(NET).state_dict()) + 2
    end = rows[0].index("bytes") + len("bytes")
    for row in rows[1:]:
        assert row[:end].rsplit(None, 1)[-1].replace(",", "").isdigit()
        assert row[end : end + 1] in ("", " ")
    assert rows[-1].split()[1] == f"{sum(parameter.numel() for parameter in Hymba(NET).parameters()):,}"


def test_as_json_it_is_the_same(artifact, capsys):
    run_command("inspect", [str(artifact), "--json"])
    assert json.loads(capsys.readouterr().out) == list_artifact(artifact, evaluation_code_bytes)


def test_names_cannot_steer_the_terminal(tmp_path):
    tensors = Hymba(NET).state_dict()
    path = tmp_path / "a\x1b[1m"
    tensors["\x1b[2Jw\u202e"] = tensors["skip_weights"] + 1
    save_artifact(
        path,
        tensors,
        config=NET.to_dict(),
        tokenizer={},
        metadata={"\x1b[31m": "\x07"},
        scheme=QuantizationConfig(),
        roles=dict.fromkeys(tensors, Role.MATRIX),
    )
    table = as_table(list_artifact(path, lambda mixer: 1000))
    assert not any(character in table for character in "\x1b\x07\u202e")
    with pytest.raises(ArtifactError, match=r"\ufffd\[2Jw\ufffd") as refused:
        load_artifact(path)
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:300], "truncated"),
        (lambda content: content[:-20] + b"x" * 20, "damaged"),
        (lambda content: b"PK\x03\x04" + content, "not an artifact"),
        (None, "does not exist"),
    ],
)
def test_a_damaged_file_is_refused_within_a_second(artifact, tmp_path, change, message):
    path = tmp_path / "bad.hymba"
    if change:
        path.write_bytes(change(artifact.read_bytes()))
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "hymba_lightning", "inspect", str(path)], capture_output=True, text=True, check=False
    )
    after = os.times()
    assert done.returncode == 2
    assert done.stderr.startswith("hymba inspect: ")
    assert message in done.stderr
    assert "bad.hymba" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    # Its processor's seconds: the machine may be busy.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_inspecting_waits_for_no_torch(artifact):
    code = (
        "import sys; from hymba_lightning.commands import run_command; "
        f"run_command('inspect', [{str(artifact)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
