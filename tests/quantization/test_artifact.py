"""Artifacts: round trip, bytes, aliases, reports, limits, and writing that survives a full disk."""

import dataclasses
import pickletools
import resource

import numpy as np
import pytest
import torch
from any_tensors import inspect_any, load_any

import hymba_lightning.quantization.frames as frames
from hymba_lightning.model.config import HymbaConfig
from hymba_lightning.model.hymba import outline
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.quantization import (
    ArtifactError,
    ArtifactTooLargeError,
    QuantizationConfig,
    check_limit,
    is_artifact,
    save_artifact,
)
from hymba_lightning.quantization.rows import dequantize_rows, quantize_rows
from hymba_lightning.quantization.schemes.reference import quantize_reference

SMALL = QuantizationConfig(keep_float_numel=500, zstd_level=3)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    return {
        "tok_emb.weight": draw(60, 16),
        "skip_weights": draw(1, 2, 16),
        "blocks.0.attn.c_q.weight": draw(40, 32),
        "blocks.1.attn.c_q.weight": draw(40, 32),
        "blocks.0.attn.A_log": draw(32, 20),
        "blocks.0.attn.D": draw(600),
        "blocks.0.attn.dt_proj.bias": draw(600),
        "blocks.0.attn.dt_proj.weight": draw(30, 8),
        "blocks.0.attn.conv1d.weight": draw(8, 1, 4),
        "blocks.0.attn.merge_alpha": draw(1),
    }


def save(path, state_dict=None, scheme=SMALL, **changes):
    arguments = {"config": {"d_model": 16}, "tokenizer": {"sha256": "ab"}, "metadata": {"step": 3}} | changes
    tensors = weights() if state_dict is None else state_dict
    # Roles: these are some of a network's tensors, of other shapes.
    arguments.setdefault("roles", roles_of(outline(HymbaConfig.from_dict(arguments["config"]))))
    return save_artifact(path, tensors, scheme=scheme, **arguments)


def test_round_trip_keeps_each_tensor_as_its_rule_says(tmp_path):
    path, original = tmp_path / "net.hymba", weights()
    save(path)
    artifact = load_any(path)
    assert (artifact.config, artifact.tokenizer, artifact.metadata) == ({"d_model": 16}, {"sha256": "ab"}, {"step": 3})
    assert QuantizationConfig(**artifact.quantization) == SMALL
    assert set(artifact.state_dict) == set(original)
    for name, tensor in artifact.state_dict.items():
        assert tensor.dtype == torch.float32
        if name.endswith("c_q.weight"):
            expected = dequantize_rows(quantize_rows(original[name], 6))
        elif name.endswith(("tok_emb.weight", "dt_proj.weight", "conv1d.weight")):
            expected = original[name].half().float()
        else:
            expected = original[name]
        assert torch.equal(tensor, expected.view_as(original[name])), name


def test_reference_scheme_stores_the_reference_numbers(tmp_path):
    scheme = dataclasses.replace(SMALL, scheme="reference", bits=8)
    save(tmp_path / "a", scheme=scheme)
    name = "blocks.0.attn.c_q.weight"
    expected = quantize_reference(weights()[name], 8)
    restored = load_any(tmp_path / "a").state_dict[name]
    assert torch.equal(restored, expected.q.float() * expected.scale.float()[:, None])


def test_name_bits_override_every_other_rule(tmp_path):
    scheme = dataclasses.replace(SMALL, name_bits={"tok_emb": 8, "blocks.1": 4})
    save(tmp_path / "a", scheme=scheme)
    _, report = inspect_any(tmp_path / "a")
    storage = {tensor.name: tensor.storage for tensor in report.tensors}
    assert storage["tok_emb.weight"] == "int8"
    assert storage["blocks.1.attn.c_q.weight"] == "int4"
    assert storage["blocks.0.attn.c_q.weight"] == "int6"


def test_tensors_rounded_elsewhere_are_taken_as_they_are(tmp_path):
    name = "blocks.0.attn.c_q.weight"
    rounded = quantize_rows(weights()[name] * 1.5, 5)
    save(tmp_path / "a", quantized={name: rounded})
    assert torch.equal(load_any(tmp_path / "a").state_dict[name], dequantize_rows(rounded))
    with pytest.raises(ValueError, match="does not have: other"):
        save(tmp_path / "b", quantized={"other": rounded})
    with pytest.raises(ValueError, match="tok_emb"):
        save(tmp_path / "b", quantized={"tok_emb.weight": rounded})


def test_same_weights_give_the_same_bytes(tmp_path):
    save(tmp_path / "a")
    save(tmp_path / "b", dict(reversed(weights().items())))
    save(tmp_path / "c", weights(seed=1))
    contents = [(tmp_path / name).read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_shared_tensors_are_stored_once(tmp_path):
    shared = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    alone = save(tmp_path / "a", {"blocks.0.attn.kv_proj.weight": shared})
    both = save(tmp_path / "b", {"blocks.0.attn.kv_proj.weight": shared, "blocks.1.attn.kv_proj.weight": shared})
    assert both.raw_bytes == alone.raw_bytes
    assert both.tensors[1].storage == "alias of blocks.0.attn.kv_proj.weight"
    first, second = load_any(tmp_path / "b").state_dict.values()
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_small_tensors_that_float16_cannot_hold_become_float32(tmp_path):
    tensors = {"tiny": torch.full((4,), 1e-9), "huge": torch.full((4,), 1e6), "plain": torch.full((4,), 0.1)}
    report = save(tmp_path / "a", tensors, roles=dict.fromkeys(tensors, Role.SCALAR))
    assert {tensor.name: tensor.storage for tensor in report.tensors} == {
        "tiny": "float32",
        "huge": "float32",
        "plain": "float16",
    }
    assert torch.equal(load_any(tmp_path / "a").state_dict["tiny"], tensors["tiny"])


def test_recentred_codes_and_planes_beat_plain_arrays(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "tok_emb.weight": torch.randn(256, 512, generator=generator) * 0.05,
        "blocks.0.mlp.fc.weight": torch.randn(512, 512, generator=generator) * 0.05,
    }
    report = save(tmp_path / "a", tensors, QuantizationConfig())
    quantized = quantize_rows(tensors["blocks.0.mlp.fc.weight"], 6)
    plain = (
        quantized.q.numpy().tobytes()
        + quantized.scale.numpy().tobytes()
        + tensors["tok_emb.weight"].half().numpy().tobytes()
    )
    assert report.bytes < 0.97 * len(frames.zstandard.ZstdCompressor(level=22).compress(plain))
    counts = np.unique(quantized.q.numpy(), return_counts=True)[1] / quantized.q.numel()
    entropy_bytes = -(counts * np.log2(counts)).sum() * quantized.q.numel() / 8
    share = next(tensor.bytes for tensor in report.tensors if tensor.storage == "int6")
    assert entropy_bytes < share < 1.03 * entropy_bytes


@pytest.mark.parametrize("levels", [3, 15, 63, 255])
def test_a_draft_is_never_smaller_than_the_file_will_be(levels):
    generator = np.random.default_rng(0)
    content = np.clip(generator.normal(levels / 2, levels / 8, 200_000).round(), 0, levels - 1).astype(np.uint8)
    draft = frames.draft(content.tobytes())
    for level in (1, 3, 9, 22):
        packed = frames.compress(content.tobytes(), level)
        assert 0.8 * len(draft) < len(packed) <= len(draft)
        assert frames.decompress(packed, content.size, "payload") == content.tobytes()


def test_report_adds_up_and_inspection_repeats_it(tmp_path):
    report = save(tmp_path / "a")
    _, inspected = inspect_any(tmp_path / "a")
    assert inspected == report
    assert report.bytes == (tmp_path / "a").stat().st_size
    assert sum(tensor.raw_bytes for tensor in report.tensors) == report.raw_bytes
    payload_bytes = report.bytes - report.header_bytes
    assert sum(tensor.bytes for tensor in report.tensors) == pytest.approx(payload_bytes, abs=len(report.tensors))
    assert "blocks.0.attn.c_q.weight [40, 32]" in report.table()


def test_file_holds_no_pickle(tmp_path):
    save(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="opcode"):
        list(pickletools.genops(content))
    with pytest.raises(Exception, match=r"(?i)pickle|zip|magic|load"):
        torch.load(tmp_path / "a", weights_only=True)


def test_is_artifact_goes_by_the_magic(tmp_path):
    save(tmp_path / "a.anything")
    (tmp_path / "b.hymba").write_bytes(b"PK\x03\x04")
    assert is_artifact(tmp_path / "a.anything")
    assert not is_artifact(tmp_path / "b.hymba")
    assert not is_artifact(tmp_path / "missing")
    assert not is_artifact(tmp_path)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, "w: row 0 has inf or NaN"),
        ({"w": torch.arange(3)}, "w: only non-empty floating-point"),
        ({"w": torch.zeros(0, 3)}, "w: only non-empty floating-point"),
        ({}, "no tensors"),
    ],
)
def test_tensors_that_cannot_be_stored_are_named(tmp_path, bad, match):
    with pytest.raises(ValueError, match=match):
        save(tmp_path / "a", bad, roles={"w": Role.MATRIX})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", [{"when": object()}, {"loss": float("nan")}])
def test_metadata_must_be_plain(tmp_path, metadata):
    with pytest.raises(ValueError, match="plain values only"):
        save(tmp_path / "a", metadata=metadata)


def test_full_disk_leaves_the_previous_file_whole(tmp_path):
    path = tmp_path / "a"
    save(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="large"):
            save(path, weights(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no artifact at"):
        load_any(tmp_path / "missing")
    (tmp_path / "foreign").write_bytes(b"not mine" * 40)
    with pytest.raises(ArtifactError, match=r"foreign cannot be loaded: it is not an artifact"):
        load_any(tmp_path / "foreign")


def test_limit_names_the_largest_tensors_and_the_remedies(tmp_path):
    report = save(tmp_path / "a")
    check_limit(report.bytes, 1000, report.bytes + 1000, report)
    with pytest.raises(ArtifactTooLargeError, match=r"1 over the limit.*name_bits(.|\n)*c_q\.weight \[40, 32\]"):
        check_limit(report.bytes, 1000, report.bytes + 999, report)


def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"blocks.{i}.mlp.fc.weight": torch.randn(512, 300, generator=generator) * 0.1 for i in range(4)}


def test_scales_get_as_coarse_as_the_limit_needs(tmp_path, caplog):
    free = save(tmp_path / "a", matrices())
    limit = round(0.8 * free.bytes)
    report = save(tmp_path / "b", matrices(), dataclasses.replace(SMALL, limit_bytes=limit))
    check_limit(report.bytes, 0, limit, report)
    assert report.bytes > 0.97 * 0.8 * free.bytes
    assert "times as coarse" in caplog.text
    # Packing a fifth less at 5.4 bits saves 1.1 bits a weight, so scales are about twice as coarse.
    assert report.coarsen == pytest.approx(2**1.08, rel=0.1)
    assert load_any(tmp_path / "b").quantization["coarsen"] == report.coarsen
    errors = [
        sum((load_any(tmp_path / name).state_dict[key] - tensor).square().sum() for key, tensor in matrices().items())
        for name in "ab"
    ]
    assert errors[0] < errors[1] < 6 * errors[0]


def test_scales_stay_fine_where_everything_fits_or_nothing_would(tmp_path):
    free = save(tmp_path / "a", matrices())
    assert free.coarsen == 1
    hopeless = dataclasses.replace(SMALL, limit_bytes=30_000)
    refused = save(tmp_path / "b", matrices(), hopeless)
    assert (refused.coarsen, refused.bytes) == (1, pytest.approx(free.bytes, abs=100))
    unfitted = save(tmp_path / "c", matrices(), dataclasses.replace(SMALL, limit_bytes=1, fit_limit=False))
    assert unfitted.bytes == pytest.approx(free.bytes, abs=100)
    with pytest.raises(ArtifactTooLargeError):
        check_limit(refused.bytes, 0, hopeless.limit_bytes, refused)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheme", "int3"),
        ("bits", 9),
        ("clip_quantile", 0.1),
        ("clip_steps", 0),
        ("name_bits", {"fc": 1}),
        ("coarsen", 0.5),
        ("zstd_level", 0),
        ("limit_bytes", 0),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        QuantizationConfig(**{field: value})
