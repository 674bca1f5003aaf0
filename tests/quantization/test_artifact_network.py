"""An artifact's tensors are exactly those of its config's network; anything else is refused at once, before memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from any_tensors import load_any
from test_artifact_hostile import edit, split

import hymba_lightning.quantization.format as format
import hymba_lightning.quantization.frames as frames
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.roles import Role
from hymba_lightning.quantization import ArtifactError, QuantizationConfig, load_artifact, save_artifact
from hymba_lightning.quantization.config import SCHEMES as ALL_SCHEMES
from hymba_lightning.quantization.listing import list_artifact

NET = HymbaConfig(
    vocab_size=60, n_layers=3, d_model=32, n_heads=2, n_kv_heads=1, d_state=4, bigram_buckets=8, bigram_dim=8
)
NETS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "shared keys": {"kv_share_every": 2},
    "all shared": {"kv_share_every": 5},
    "meta tokens": {"meta_tokens": 3},
    "per channel": {"merge": "channel"},
    "global": {"global_layers": [0, 2]},
    "mamba 2": {"mixer": "mamba2", "mixer_options": {"head_dim": 8, "groups": 2}},
    "layer windows": {"layer_windows": [3, 8, 5]},
    "auto": {"global_layers": "auto"},
    "wide": {"expand": 2, "dt_rank": 5},
    "bfloat16": {"dynamics_dtype": "bfloat16"},
    "mamba": {"dt_init": "mamba"},
    "normed": {"branch_norm": True},
    "plain": {"bigram_hash": False, "smear_gate": False, "reset_at_bos": False},
    "whole numbers": {"rope_base": 10_000},
}
SCHEMES = [*({"scheme": name} for name in ALL_SCHEMES if name != "gptq"), {"bits": 8}]


def write(path, config: HymbaConfig = NET, tensors: dict | None = None, roles: dict | None = None, **scheme) -> None:
    torch.manual_seed(0)
    weights = Hymba(config).state_dict() if tensors is None else tensors
    save_artifact(
        path,
        weights,
        config=config.to_dict(),
        tokenizer={"sha256": "ab", "vocab_size": config.vocab_size},
        metadata={"steps": 3, "seq_len": 64, "train_seconds": 1.5},
        scheme=QuantizationConfig(keep_float_numel=500, zstd_level=3, **scheme),
        roles=roles,
    )


@functools.cache
def true_parts() -> tuple[str, bytes]:
    """Header, as JSON, and payload of a true artifact."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "a")
        header, payload = split((Path(folder) / "a").read_bytes())
    return json.dumps(header), payload


def forge(path, section: str, changes: dict) -> None:
    """An artifact with other values in its header, whose checksums are right."""
    text, payload = true_parts()
    header = json.loads(text)
    header[section] |= changes
    path.write_bytes(format.seal(frames.frame(json.dumps(header).encode(), 3), payload))


def refused(path, match: str) -> None:
    """Refused by every reader: quickly, in one sentence that names the file, almost without memory."""
    for reader in (
        (load_artifact, functools.partial(list_artifact, code_bytes=lambda: 0)) if match else (load_artifact,)
    ):
        tracemalloc.start()
        started = time.process_time()
        with pytest.raises(ArtifactError, match=match) as error:
            reader(path)
        assert time.process_time() - started < 1
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()
        assert str(error.value).startswith(f"{path} cannot be loaded: ")
        assert str(error.value).endswith("Copy or export it again")
        assert len(str(error.value)) < 1000
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("options", "scheme"), zip(NETS.values(), itertools.cycle(SCHEMES)), ids=NETS)
def test_true_networks_load_bit_for_bit(tmp_path, options, scheme):
    config = dataclasses.replace(NET, **options)
    write(tmp_path / "a", config, **scheme)
    artifact, plain = load_artifact(tmp_path / "a"), load_any(tmp_path / "a")
    assert artifact.state_dict.keys() == plain.state_dict.keys()
    assert all(torch.equal(tensor, plain.state_dict[name]) for name, tensor in artifact.state_dict.items())
    restored = HymbaConfig.from_dict(artifact.config)
    assert restored == config
    Hymba(restored).load_state_dict(artifact.state_dict)
    assert list_artifact(tmp_path / "a", lambda mixer: 0)["config"] == config.to_dict()


def test_laying_a_network_out_leaves_the_random_state(tmp_path):
    write(tmp_path / "a", dataclasses.replace(NET, dt_init="mamba", meta_tokens=2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_artifact(tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())


NUMBERS = [field.name for field in dataclasses.fields(HymbaConfig) if type(field.default) is int]
FLOATS = [field.name for field in dataclasses.fields(HymbaConfig) if type(field.default) is float]
FLAGS = [field.name for field in dataclasses.fields(HymbaConfig) if type(field.default) is bool]


@pytest.mark.parametrize("value", ["7", 7.0, True, None, [7], {"a": 1}, 1e300, 2**31, 10**30, -1, -(2**70), "\x1b[2J"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_field_holds_a_number_in_range(tmp_path, name, value):
    forge(tmp_path / "a", "config", {name: value})
    refused(tmp_path / "a", name if name in ("n_layers", "d_model") else ".")


@pytest.mark.parametrize("value", ["0.5", True, None, [0.5], 10**400, -(10**400), {}])
@pytest.mark.parametrize("name", FLOATS)
def test_a_real_field_holds_a_finite_number(tmp_path, name, value):
    forge(tmp_path / "a", "config", {name: value})
    refused(tmp_path / "a", name)


@pytest.mark.parametrize("word", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_json_reads_as_infinite_are_refused(tmp_path, word):
    text, payload = true_parts()
    text = text.replace('"mlp_slope": 0.9', f'"mlp_slope": {word}')
    assert word in text
    (tmp_path / "a").write_bytes(format.seal(frames.compress(text.encode(), 3), payload))
    refused(tmp_path / "a", "mlp_slope|is not a JSON value")


@pytest.mark.parametrize("value", [1, 0, "true", None, []])
@pytest.mark.parametrize("name", FLAGS)
def test_a_switch_is_true_or_false(tmp_path, name, value):
    forge(tmp_path / "a", "config", {name: value})
    refused(tmp_path / "a", name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_layers": 100_000}, "100000 layers"),
        ({"n_layers": 2**31 - 1}, "layers"),
        ({"n_layers": 2}, "2 layers"),
        ({"n_layers": 257}, "257 layers"),
        ({"d_model": 2**20}, "token table"),
        ({"d_model": 64}, "token table"),
        ({"vocab_size": 2**30}, "token table"),
        ({"vocab_size": 61}, "token table"),
        ({"d_inner": 3}, "does not know: d_inner"),
        ({"global_layers": [0] * 100_000}, "global_layers names 100000"),
        ({"global_layers": ["0"]}, "global_layers"),
        ({"global_layers": [True]}, "global_layers"),
        ({"global_layers": 3}, "global_layers"),
        ({"global_layers": "x" * 100_000}, "global_layers"),
        ({"merge": "\x1b[31m"}, "merge"),
        ({"dt_init": []}, "dt_init"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"rope_base": -1.0}, "rope_base"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
    ],
)
def test_a_config_that_is_not_the_tensors_is_refused(tmp_path, changes, match):
    forge(tmp_path / "a", "config", changes)
    refused(tmp_path / "a", match)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_mult": 2**31 - 1},
        {"mlp_mult": 3},
        {"expand": 2**31 - 1},
        {"bigram_buckets": 2**31 - 1},
        {"bigram_dim": 9},
        {"meta_tokens": 2**31 - 1},
        {"meta_tokens": 1},
        {"d_conv": 2**31 - 1},
        {"dt_rank": 2**31 - 1},
        {"d_state": 64},
        {"n_heads": 4},
        {"tie_embeddings": False},
        {"smear_gate": False},
        {"bigram_hash": False},
        {"merge": "channel"},
        {"mlp_mult": 2**31 - 1, "expand": 2**31 - 1, "bigram_dim": 2**31 - 1},
    ],
)
def test_a_network_that_the_tensors_do_not_fit_is_refused(tmp_path, changes):
    """What the token table and the number of layers do not tell, the laid-out network does."""
    forge(tmp_path / "a", "config", changes)
    started = time.process_time()
    with pytest.raises(ArtifactError, match=r"its tensor .* has the shape|that of no network"):
        load_artifact(tmp_path / "a")
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("tokenizer", {"sha256": ["ab"]}),
        ("tokenizer", {"sha256": 3}),
        ("tokenizer", {"vocab_size": "60"}),
        ("tokenizer", {"vocab_size": 61}),
        ("metadata", {"seq_len": "64"}),
        ("metadata", {"seq_len": 0}),
        ("metadata", {"seq_len": True}),
        ("metadata", {"steps": -1}),
        ("metadata", {"train_seconds": "1"}),
        ("metadata", {"train_seconds": 10**400}),
        ("quantization", {"limit_bytes": "x"}),
        ("quantization", {"limit_bytes": 0}),
        ("quantization", {"coarsen": []}),
    ],
)
def test_what_commands_use_has_its_type(tmp_path, section, changes):
    forge(tmp_path / "a", section, changes)
    refused(tmp_path / "a", next(iter(changes)))


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path):
    tensors = Hymba(NET).state_dict()
    for changed, match in (
        ({name: tensor for name, tensor in tensors.items() if name != "blocks.1.attn.D"}, r"blocks\.1\.attn\.D"),
        (tensors | {"skip_weights": torch.ones(1, 2, 32)}, "skip_weights"),
    ):
        with pytest.raises(ValueError, match=f"^the config's network has a tensor {match}, |^{match} is "):
            write(tmp_path / "b", tensors=changed)
        assert not (tmp_path / "b").exists()
        write(tmp_path / "a", tensors=changed, roles=dict.fromkeys(tensors, Role.MATRIX))
        with pytest.raises(ArtifactError, match=f"its tensor {match} has the shape"):
            load_artifact(tmp_path / "a")
    with pytest.raises(ValueError, match="the config's network has no tensor extra"):
        write(tmp_path / "a", tensors=tensors | {"extra": torch.ones(3)})
    write(
        tmp_path / "a",
        tensors=tensors | {"extra": torch.ones(3)},
        roles=dict.fromkeys([*tensors, "extra"], Role.MATRIX),
    )
    with pytest.raises(ArtifactError, match="its tensor extra has the shape"):
        load_artifact(tmp_path / "a")


def bomb(path, config: HymbaConfig, shapes: dict[str, list[int]], first: str) -> int:
    """A few thousand bytes that say they hold zeros: one tensor `first`, the others its aliases where shapes allow."""
    lines, counts = [], {"q": 0, "column": 0, "scale": 0, "float16": 0, "float32": 0}
    for name, shape in sorted(shapes.items(), key=lambda item: item[0] != first):
        if name != first and shape == shapes[first]:
            lines.append({"name": name, "shape": shape, "storage": "alias", "alias_of": first})
            continue
        numel = torch.Size(shape).numel()
        rows = numel // shape[-1] if len(shape) > 1 else 1
        lines.append(
            {
                "name": name,
                "shape": shape,
                "storage": "int",
                "bits": 8,
                "exponent": 0,
                "offset": counts["q"],
                "scale_offset": counts["scale"],
            }
        )
        counts["q"] += numel
        counts["scale"] += rows
    header = {
        "config": config.to_dict(),
        "tokenizer": {},
        "metadata": {},
        "quantization": {},
        "tensors": lines,
        "streams": counts,
    }
    size = counts["q"] + 2 * counts["scale"]
    path.write_bytes(format.pack(header, frames.frame(bytes(size), 3)))
    return path.stat().st_size


def test_aliases_cannot_multiply_memory(tmp_path):
    wide = dataclasses.replace(NET, vocab_size=1 << 14, d_model=1024, n_heads=2, tie_embeddings=False)
    shapes = {name: list(tensor.shape) for name, tensor in Hymba(NET).state_dict().items()}
    table = [wide.vocab_size, wide.d_model]
    shapes |= {"tok_emb.weight": table} | {f"alias.{index}": table for index in range(60)}
    assert bomb(tmp_path / "a", wide, shapes, "tok_emb.weight") < 50_000
    refused(tmp_path / "a", "weights, over the")
    # Few enough to be within the bound, but not the network's.
    small = dataclasses.replace(NET, vocab_size=1 << 10)
    shapes |= {name: [1 << 10, 32] for name in shapes if name == "tok_emb.weight" or name.startswith("alias")}
    bomb(tmp_path / "a", small, shapes, "tok_emb.weight")
    with pytest.raises(ArtifactError, match=r"alias\.0 has the shape"):
        load_artifact(tmp_path / "a")


# Not getrusage's peak, which is that of the process that started this one where that was larger.
MEMORY = """
import re, sys, time
from pathlib import Path
from hymba_lightning.model import Hymba
from hymba_lightning.model.roles import Role
from hymba_lightning.quantization import ArtifactError, load_artifact
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
before, started = peak(), time.process_time()
try:
    load_artifact(sys.argv[1])
    print("loaded", end=" ")
except ArtifactError:
    print("refused", end=" ")
print((peak() - before) / 1024, time.process_time() - started)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("vocab", "outcome"), [(1 << 13, "loaded"), (1 << 15, "refused"), (1 << 20, "refused")])
def test_a_small_file_of_zeros_takes_little_memory_whatever_it_claims(tmp_path, vocab, outcome):
    config = dataclasses.replace(
        NET, vocab_size=vocab, d_model=512, n_heads=4, n_layers=2, mlp_mult=1, tie_embeddings=False
    )
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Hymba(config).state_dict().items()}
    bomb(tmp_path / "a", config, shapes, "tok_emb.weight")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "a")], capture_output=True, text=True, check=True
    )
    said, megabytes, seconds = done.stdout.split()
    assert said == outcome
    assert float(megabytes) < 200
    assert float(seconds) < 1


def test_forged_headers_of_a_network_end_in_an_error_or_the_same_network(tmp_path):
    write(tmp_path / "a")
    expected, rng, loaded = load_artifact(tmp_path / "a").state_dict, random.Random(1), 0
    text, payload = true_parts()
    header = json.loads(text)
    for _ in range(250):
        forged = edit(header, rng) if rng.random() < 0.3 else header | {"config": edit(header["config"], rng)}
        try:
            (tmp_path / "a").write_bytes(format.seal(frames.frame(json.dumps(forged).encode(), 3), payload))
            artifact = load_artifact(tmp_path / "a")
        except (ArtifactError, ValueError):
            continue
        loaded += 1
        Hymba(HymbaConfig.from_dict(artifact.config)).load_state_dict(artifact.state_dict)
        assert artifact.state_dict.keys() == expected.keys()
    assert loaded < 80
