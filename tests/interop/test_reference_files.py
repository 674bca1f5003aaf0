"""The reference's files: what they hold comes over exactly, and hostile ones end in a clear error."""

import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import zstandard
from golden_vectors import arrays, settings

from hymba_lightning.interop import (
    ReferenceFileError,
    from_reference,
    import_reference,
    read_reference_checkpoint,
    to_reference,
)
from hymba_lightning.interop.checkpoint import read_reference_file
from hymba_lightning.interop.quantized import quantized_reference_file
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import inspect_artifact
from hymba_lightning.quantization.schemes.reference import quantize_reference

TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"


def weights(name: str = "model_seed_shape") -> dict[str, torch.Tensor]:
    return {key.removeprefix("param/"): value for key, value in arrays(name).items() if key.startswith("param/")}


def saved(values) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def quantized_dictionary(state_dict: dict[str, torch.Tensor]) -> dict:
    """The reference's dictionary: matrices of more than 2,000 entries as integers, the rest in float16 or float32."""
    parts = {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {},
        "scales": {},
        "dtypes": {},
        "passthrough": {},
        "qmeta": {},
        "passthrough_orig_dtypes": {},
    }
    for name, tensor in state_dict.items():
        if tensor.ndim == 2 and tensor.numel() > 2000:
            result = quantize_reference(tensor, 6)
            parts["quantized"][name], parts["scales"][name] = result.q, result.scale
            parts["dtypes"][name], parts["qmeta"][name] = "float32", {"scheme": "per_row", "axis": 0}
        elif "scale" in name:
            parts["passthrough"][name] = tensor
        else:
            parts["passthrough"][name] = tensor.half()
            parts["passthrough_orig_dtypes"][name] = "float32"
    return parts


def dequantized(parts: dict) -> dict[str, torch.Tensor]:
    """An independent statement of what such a dictionary stands for."""
    result = {name: q.float() * parts["scales"][name].float().unsqueeze(1) for name, q in parts["quantized"].items()}
    return result | {name: tensor.float() for name, tensor in parts["passthrough"].items()}


def test_plain_checkpoint_is_read_and_imported_exactly(tmp_path):
    path, original = tmp_path / "final_model.pt", weights("model_paper_options")
    torch.save(original, path)
    read = read_reference_checkpoint(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in original.items())
    out = import_reference(str(path), window=16, global_layers="auto", tokenizer=str(TOKENIZER))
    assert out == str(tmp_path / "final_model.hymba")
    artifact, _ = inspect_artifact(out)
    net = artifact.network()
    config, back = to_reference(net)
    assert config == settings("model_paper_options") | {
        "hymba_dt_rank": 3,
        "bigram_buckets": 4096,
        "bigram_hash_dim": 128,
    }
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    assert len(artifact.tokenizer["sha256"]) == 64


@pytest.mark.parametrize("pack", [zstandard.ZstdCompressor(level=3).compress, zlib.compress])
def test_quantized_file_is_read_and_imported_exactly(tmp_path, pack):
    parts = quantized_dictionary(weights())
    path = tmp_path / "final_model.int8.ptz"
    path.write_bytes(pack(saved(parts)))
    expected = dequantized(parts)
    read = read_reference_checkpoint(path)
    assert set(read) == set(expected)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    artifact, report = inspect_artifact(import_reference(str(path), str(tmp_path / "out.hymba"), window=32))
    assert all(torch.equal(artifact.state_dict[name], tensor) for name, tensor in expected.items())
    assert sum(tensor.storage == "int6" for tensor in report.tensors) == len(parts["quantized"])
    assert artifact.config["window"] == 32
    assert artifact.config["reset_at_bos"] is False


def test_the_file_that_is_written_is_the_quantized_network(tmp_path):
    state_dict = {
        f"blocks.0.{name}": torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for name, shape in (("mlp.fc.weight", (300, 256)), ("mlp_scale", (70_000,)), ("attn.c_q.weight", (256, 256)))
    }
    state_dict["tok_emb.weight"] = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    (tmp_path / "a.ptz").write_bytes(quantized_reference_file(state_dict, 6, level=3))
    read = read_reference_file(tmp_path / "a.ptz")
    assert set(read.quantized) == {"blocks.0.mlp.fc.weight"}  # the only matrix of more than 65,536 entries
    rounded = quantize_reference(state_dict["blocks.0.mlp.fc.weight"], 6)
    assert torch.equal(read.state_dict["blocks.0.mlp.fc.weight"], rounded.q.float() * rounded.scale.float()[:, None])
    assert torch.equal(read.state_dict["blocks.0.mlp_scale"], state_dict["blocks.0.mlp_scale"])
    assert torch.equal(read.state_dict["tok_emb.weight"], state_dict["tok_emb.weight"].half().float())
    with pytest.raises(ValueError, match=r"conv\.weight is no matrix"):
        quantized_reference_file({"conv.weight": torch.zeros(70_000, 1, 4)})


def test_prefixes_of_ddp_and_compile_are_dropped_and_sharers_filled_in():
    config, original = settings("model_paper_options"), weights("model_paper_options")
    leaders_only = {
        f"module._orig_mod.{name}": tensor
        for name, tensor in original.items()
        if not name.endswith(("1.attn.kv_proj.weight", "3.attn.kv_proj.weight", "5.attn.kv_proj.weight"))
    }
    net = from_reference(config, leaders_only)
    assert all(torch.equal(to_reference(net)[1][name], tensor) for name, tensor in original.items())


def test_sharers_that_differ_are_refused():
    state_dict = weights("model_paper_options")
    state_dict["blocks.1.attn.kv_proj.weight"] = state_dict["blocks.1.attn.kv_proj.weight"] + 1
    with pytest.raises(ValueError, match=r"blocks\.1.* share one projection"):
        from_reference(settings("model_paper_options"), state_dict)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_layers": None}, r"missing \['num_layers'\]"),
        ({"rope_dims": 16}, r"unknown \['rope_dims'\]"),
        ({"num_layers": 6}, "missing.*blocks.5"),
        ({"mlp_mult": 3}, r"mlp\.fc\.weight \[256, 64\] instead of \[192, 64\]"),
        ({"model_dim": 4_000_000, "num_heads": 4}, r"tok_emb\.weight \[1024, 64\] instead of \[1024, 4000000\]"),
        ({"swa_global_layers": "first"}, "swa_global_layers='first'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, match):
    config = {key: value for key, value in (settings("model_seed_shape") | change).items() if value is not None}
    with pytest.raises(ValueError, match=match):
        from_reference(config, weights())


def test_full_attention_and_listed_layers_survive_the_round_trip():
    for change in ({"sliding_window": 0}, {"swa_global_layers": [0, 3]}):
        config = settings("model_seed_shape") | change
        net = from_reference(config, weights())
        assert to_reference(net)[0] == config
    assert from_reference(
        settings("model_seed_shape") | {"swa_global_layers": "0,3"}, weights()
    ).config.global_layer_set() == {0, 3}


def test_networks_that_the_reference_cannot_express_are_refused():
    with pytest.raises(ValueError, match="reset_at_bos=True, branch_norm=True"):
        to_reference(Hymba(HymbaConfig(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, branch_norm=True)))


class Malicious:
    """Unpickled without care, this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("pack", [lambda content: content, zstandard.ZstdCompressor().compress, zlib.compress])
def test_nothing_in_a_file_is_executed(tmp_path, pack):
    path, target = tmp_path / "evil.pt", tmp_path / "executed"
    for content in (saved({"tok_emb.weight": Malicious(target)}), pickle.dumps(Malicious(target))):
        path.write_bytes(pack(content))
        with pytest.raises(ReferenceFileError, match=r"evil\.pt cannot be read"):
            read_reference_checkpoint(path)
        assert not target.exists()
    torch.load(io.BytesIO(saved(Malicious(target))), weights_only=False)
    assert target.exists(), "the file would have done harm"


def malformed_files() -> dict[str, bytes]:
    good, plain = zstandard.ZstdCompressor().compress(saved(quantized_dictionary(weights()))), saved(weights())
    return {
        "empty": b"",
        "text": b"hello",
        "cut": good[: len(good) // 2],
        "plain cut": plain[: len(plain) // 2],
        "zlib cut": zlib.compress(plain)[:-50],
        "list": saved([1, 2]),
        "numbers": saved({"a": 1}),
        "no tensors": saved({}),
        "nan": saved({"a": torch.tensor([float("nan")])}),
        "repeated": saved({"a": torch.ones(1).expand(1 << 40)}),
        "meta": saved({"a": torch.ones(4, device="meta")}),
    }


@pytest.mark.parametrize("case", malformed_files())
def test_malformed_files_are_refused(tmp_path, case):
    path = tmp_path / "file.pt"
    path.write_bytes(malformed_files()[case])
    with pytest.raises(ReferenceFileError, match=r"file\.pt cannot be read"):
        read_reference_checkpoint(path)


def test_overwritten_files_end_in_the_same_error_or_load(tmp_path):
    """Torch's reader looks at no checksum of its archive, so overwritten weights may pass; nothing else may escape."""
    plain, path, refused = saved(weights()), tmp_path / "file.pt", 0
    for index in range(0, len(plain), len(plain) // 100):
        path.write_bytes(plain[:index] + b"\xff" * 64 + plain[index + 64 :])
        try:
            read_reference_checkpoint(path)
        except ReferenceFileError:
            refused += 1
    assert refused > 5


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_reference_checkpoint(tmp_path / "missing")


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("quantized", None, r"missing parts \['quantized'\]|no dense"),
        ("scales", {}, "scale of .* is no dense"),
        ("dtypes", {}, "unknown dtype None"),
        ("code", {"a": "b"}, r"unknown ones \['code'\]"),
        ("passthrough", [1], "no dictionary of names"),
    ],
)
def test_dictionaries_with_wrong_parts_are_refused(tmp_path, part, value, match):
    parts = quantized_dictionary(weights()) | {part: value}
    if value is None:
        del parts["scales"]
        parts["quantized"] = {"a": torch.ones(3)}
        match = r"missing parts \['scales'\]"
    path = tmp_path / "a.ptz"
    path.write_bytes(zlib.compress(saved(parts)))
    with pytest.raises(ReferenceFileError, match=match):
        read_reference_checkpoint(path)


def test_bombs_are_refused(tmp_path):
    path = tmp_path / "bomb.ptz"
    for content in (zlib.compress(bytes(100 << 20)), zstandard.ZstdCompressor().compress(bytes(100 << 20))):
        path.write_bytes(content)
        with pytest.raises(ReferenceFileError, match="unpacks to more than"):
            read_reference_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(100 << 20))
    with pytest.raises(ReferenceFileError, match="compressed or overlaps"):
        read_reference_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tok_emb.weight": torch.ones(1, 1_000_000)}, "n_kv_heads must be at least 1"),
        ({"blocks.900000000.attn.A_log": torch.ones(1)}, "numbered from 0"),
        ({"blocks.0.attn.q_gain": None}, "no tensor 'blocks.0.attn.q_gain'"),
        ({"blocks.0.attn.conv1d.weight": torch.ones(3)}, "number of axes"),
    ],
)
def test_weights_of_another_network_are_refused_without_building_it(tmp_path, change, match):
    path = tmp_path / "other.pt"
    torch.save({name: value for name, value in (weights() | change).items() if value is not None}, path)
    with pytest.raises(ReferenceFileError, match=match):
        import_reference(str(path))
    assert list(tmp_path.iterdir()) == [path]
