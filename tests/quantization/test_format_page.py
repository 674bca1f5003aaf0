"""docs/artifact.md is enough to read an artifact: a reader written from that page alone, beside the package's own."""

import hashlib
import json
import math
import struct

import numpy as np
import pytest
import torch
import zstandard

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import QuantizationConfig, load_artifact, save_artifact

NET = {"vocab_size": 300, "n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "bigram_buckets": 64}


def read(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and weights, by name."""
    magic, version, header_bytes, payload_bytes = struct.unpack("<8sIIQ", data[:24])
    assert (magic, version, len(data)) == (bytes.fromhex("8948594D42410D0A"), 2, 88 + header_bytes + payload_bytes)
    packed_header, payload = data[88 : 88 + header_bytes], data[88 + header_bytes :]
    assert hashlib.sha256(payload).digest() == data[24:56]
    assert hashlib.sha256(data[:56] + packed_header).digest() == data[56:88]
    header = json.loads(zstandard.decompress(packed_header))
    content, streams = zstandard.decompress(payload), {}
    kinds = (("q", 1, "u1"), ("column", 1, "u1"), ("scale", 2, "<f2"), ("float16", 2, "<f2"), ("float32", 4, "<f4"))
    for name, width, dtype in kinds:
        size = header["streams"][name] * width
        planes = np.frombuffer(content[:size], "u1").reshape(width, -1)
        streams[name] = np.frombuffer(planes[::-1].T.tobytes(), dtype)
        content = content[size:]
    assert content == b""
    weights: dict[str, np.ndarray] = {}
    for line in header["tensors"]:
        shape, storage = line["shape"], line["storage"]
        count = math.prod(shape)
        if storage == "alias":
            values = weights[line["alias_of"]]
        elif storage == "int":
            rows, q_max = (count // shape[-1] if len(shape) > 1 else 1), 2 ** (line["bits"] - 1) - 1
            codes = streams["q"][line["offset"] :][:count].reshape(rows, -1)
            scale = streams["scale"][line["scale_offset"] :][:rows].astype(np.float64)
            step = (scale * 2.0 ** line["exponent"]).astype(np.float32)
            values = (codes.astype(np.float32) - q_max) * step[:, None]
            if "column_offset" in line:
                places = streams["column"][line["column_offset"] :][: shape[-1]].astype(np.float64)
                values *= (2 ** ((places - 128) / 4)).astype(np.float32)
        else:
            values = streams[storage][line["offset"] :][:count].astype(np.float32)
        weights[line["name"]] = values.reshape(shape)
    return header, weights


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationConfig(keep_float_numel=500, zstd_level=3),
        QuantizationConfig(bits=4, keep_float_numel=0, coarsen=1.5, zstd_level=3),
        QuantizationConfig(scheme="mixed", zstd_level=3, limit_bytes=80_000),
    ],
    ids=["6 bits", "4 bits", "mixed"],
)
def test_the_page_is_enough_to_read_an_artifact(scheme, tmp_path):
    torch.manual_seed(0)
    config = HymbaConfig(**NET, kv_share_every=2)
    net = Hymba(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path, about = tmp_path / "net.hymba", {"metadata": {"steps": 3}, "tokenizer": {"vocab_size": 300}}
    save_artifact(path, net.state_dict(), config=config.to_dict(), scheme=scheme, **about)
    header, weights = read(path.read_bytes())
    expected = load_artifact(path)
    assert {line["storage"] for line in header["tensors"]} >= {"int", "float32", "alias"}
    assert any("column_offset" in line for line in header["tensors"]) is (scheme.scheme == "mixed")
    assert (header["config"], header["metadata"]) == (expected.config, expected.metadata)
    assert list(weights) == list(expected.state_dict)
    for name, tensor in expected.state_dict.items():
        assert np.array_equal(weights[name], tensor.numpy()), name
