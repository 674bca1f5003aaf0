"""Damaged and hostile artifacts end in an ArtifactError, quickly and without large allocations."""

import copy
import io
import json
import random
import time
import tracemalloc

import pytest
import torch
import zstandard
from any_tensors import load_any, unchecked

import hymba_lightning.quantization.format as format
import hymba_lightning.quantization.frames as frames
from hymba_lightning.model.roles import Role
from hymba_lightning.quantization import ArtifactError, QuantizationConfig, save_artifact
from hymba_lightning.quantization.artifact import decode, read_verified
from hymba_lightning.quantization.rows import quantize_rows

N_MUTATIONS = 10_000
JUNK = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    2**31,
    2**40,
    2**63,
    10**30,
    0.5,
    1e308,
    "",
    "x",
    "alias",
    "int",
    "float16",
    [],
    [0],
    [2**20, 2**20],
    [[]],
    {},
    {"q": 1},
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A small artifact's bytes and the tensors in it."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(12, 10, generator=generator)
    tensors = {
        "tok_emb.weight": torch.randn(6, 4, generator=generator),
        "blocks.0.attn.kv_proj.weight": shared,
        "blocks.1.attn.kv_proj.weight": shared,
        "blocks.0.attn.A_log": torch.randn(4, 4, generator=generator),
    }
    path = tmp_path_factory.mktemp("sample") / "sample"
    columns = torch.arange(-5, 5, dtype=torch.int8)
    save_artifact(
        path,
        tensors,
        quantized={name: quantize_rows(shared, 6)._replace(columns=columns) for name in tensors if "kv_proj" in name},
        config={"d_model": 4},
        tokenizer={"sha256": "ab"},
        metadata={},
        scheme=QuantizationConfig(keep_float_numel=100),
        roles=dict.fromkeys(tensors, Role.MATRIX) | {"blocks.0.attn.A_log": Role.DYNAMICS},
    )
    return path.read_bytes(), load_any(path).state_dict


def split(content: bytes) -> tuple[dict, bytes]:
    """Header and compressed payload of an artifact's bytes."""
    _, _, header_bytes, _ = format.PREAMBLE.unpack(content[: format.PREAMBLE.size])
    packed = content[format.FIXED_BYTES : format.FIXED_BYTES + header_bytes]
    return format.parse_header(packed), content[format.FIXED_BYTES + header_bytes :]


def load(path, content: bytes):
    path.write_bytes(content)
    return load_any(path)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, lost, repeated, moved or overwritten, checksums left as they were."""
    kind = rng.randrange(5)
    start, length = rng.randrange(len(content)), rng.randrange(1, 20)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[start + length :]
    if kind == 2:
        return content + content[start : start + length]
    if kind == 3:
        return content[:start] + rng.randbytes(length) + content[start + length :]
    flipped = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def edit(value, rng: random.Random):
    """A JSON value with one part, at a random depth, replaced, removed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        result = dict(value)
        if rng.random() < 0.1:
            del result[key]
        else:
            result[key] = edit(value[key], rng)
        return result
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        result = list(value)
        if rng.random() < 0.1:
            result.insert(index, copy.deepcopy(value[index]))
        else:
            result[index] = edit(value[index], rng)
        return result
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 16, 10**6])
    return rng.choice(JUNK)


def test_ten_thousand_mutations_end_in_an_error_or_the_same_tensors(sample):
    content, expected = sample
    header, payload = split(content)
    raw_header = json.dumps(header).encode()
    raw_payload = frames.decompress(payload, zstandard.get_frame_parameters(payload).content_size, "payload")
    rng = random.Random(0)
    refused = 0
    start = time.monotonic()
    for index in range(N_MUTATIONS):
        kind = index % 5
        if kind <= 1:
            mutated = damage(content, rng)
        elif kind == 2:  # a forger who also repairs the checksums
            mutated = format.pack(edit(header, rng), payload)
        elif kind == 3:
            mutated = format.seal(frames.compress(damage(raw_header, rng) or b" ", 3), payload)
        else:
            forged = (
                frames.compress(damage(raw_payload, rng) or b"\0", 3) if rng.random() < 0.5 else damage(payload, rng)
            )
            mutated = format.pack(header, forged)
        try:
            artifact = decode(read_verified(io.BytesIO(mutated), len(mutated), unchecked))
        except ArtifactError:
            refused += 1
            continue
        if kind <= 1:
            assert mutated == content or {name: tensor.tolist() for name, tensor in artifact.state_dict.items()} == {
                name: tensor.tolist() for name, tensor in expected.items()
            }
        for name, tensor in artifact.state_dict.items():
            assert torch.isfinite(tensor).all(), name
    assert refused > 0.7 * N_MUTATIONS
    assert time.monotonic() - start < 60


def entry(**changes):
    return {"name": "w", "shape": [4], "storage": "float32", "offset": 0} | changes


def forged_header(tensors: list, **streams: int) -> dict:
    return {
        "config": {},
        "tokenizer": {},
        "metadata": {},
        "quantization": {},
        "tensors": tensors,
        "streams": {"q": 0, "column": 0, "scale": 0, "float16": 0, "float32": 0} | streams,
    }


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (forged_header([entry(shape=[1 << 39])], float32=1 << 39), "over the"),
        (forged_header([entry(shape=[1 << 20, 1 << 30])], float32=4), "lies at"),
        (forged_header([entry(shape=[1 << 39] * 8)], float32=4), "lies at"),
        (forged_header([entry(shape=[-4])], float32=4), "no shape"),
        (forged_header([entry(shape=[True])], float32=1), "no shape"),
        (forged_header([entry(shape=[1] * 9)], float32=1), "no shape"),
        (forged_header([entry(), entry()], float32=8), "lies at|twice"),
        (forged_header([entry(), entry(name="v", offset=0)], float32=8), "v lies at"),
        (forged_header([entry()], float32=5), "its tensors use"),
        (forged_header([entry(storage="pickle")], float32=4), "unknown way"),
        (forged_header([entry(storage="int", bits=9)], q=4, scale=1), "bits"),
        (forged_header([entry(storage="int", bits=6, exponent=10**6)], q=4, scale=1), "exponent"),
        (forged_header([entry(storage="alias", alias_of="w")], float32=4), "no earlier tensor"),
        (forged_header([entry(run="os.system")], float32=4), "malformed"),
        (forged_header([entry(column_offset=0)], float32=4), "w is stored as float32, and only integers have factors"),
        (forged_header([], float32=4), "no table"),
        (forged_header([entry()], float32="4"), "streams is malformed"),
        ({"config": {}}, "no section"),
    ],
)
def test_absurd_headers_are_refused_before_anything_is_allocated(tmp_path, header, match):
    content = format.pack(header, frames.compress(bytes(16), 3))
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=match):
        load(tmp_path / "a", content)
    assert time.monotonic() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_bombs_are_refused(tmp_path):
    bomb = frames.compress(bytes(200 << 20), 3)
    honest = forged_header([entry(shape=[50 << 20])], float32=50 << 20)
    start = time.monotonic()
    with pytest.raises(ArtifactError, match="over the"):
        load(tmp_path / "a", format.pack(honest, bomb))
    with pytest.raises(ArtifactError, match=r"declares 209715200 bytes of content where 16 are expected"):
        load(tmp_path / "a", format.pack(forged_header([entry()], float32=4), bomb))
    with pytest.raises(ArtifactError, match="over the limit"):
        load(tmp_path / "a", format.seal(bomb, b""))
    assert time.monotonic() - start < 1


def test_deeply_nested_headers_are_refused(tmp_path):
    nested = frames.compress(b"[" * 100_000, 3)
    with pytest.raises(ArtifactError, match="not JSON"):
        load(tmp_path / "a", format.seal(nested, b""))


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path, sample):
    header, payload = split(sample[0])
    text = json.dumps(header).encode()
    for old, name in ((b'{"config"', "tensors"), (b'"offset"', "offset")):
        twice = text.replace(old, b'{"tensors": [], "config"' if name == "tensors" else b'"offset": 0, "offset"', 1)
        assert json.loads(twice) == header
        with pytest.raises(ArtifactError, match=f"the name '{name}' stands twice in an object"):
            load(tmp_path / "a", format.seal(frames.compress(twice, 3), payload))
    many = b"{" + b",".join(b'"%d":0' % number for number in range(300_000)) + b',"299999":1}'
    start = time.process_time()
    with pytest.raises(ArtifactError, match="'299999' stands twice"):
        load(tmp_path / "a", format.seal(frames.compress(many, 3), payload))
    assert time.process_time() - start < 1


def test_unknown_version_is_named(tmp_path, sample):
    header, payload = split(sample[0])
    packed = frames.compress(json.dumps(header).encode(), 3)
    with pytest.raises(ArtifactError, match="format version 7, and this package reads 1 and 2"):
        load(tmp_path / "a", format.seal(packed, payload, version=7))


def test_files_of_version_1_are_read_and_have_no_columns(tmp_path):
    tensors = {"w": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}
    scheme = QuantizationConfig(keep_float_numel=0, float32_names=[], float16_names=[])
    roles = {"w": Role.MATRIX}
    save_artifact(tmp_path / "a", tensors, config={}, tokenizer={}, metadata={}, scheme=scheme, roles=roles)
    header, payload = split((tmp_path / "a").read_bytes())
    assert header["streams"].pop("column") == 0
    first = format.seal(frames.compress(json.dumps(header).encode(), 3), payload, version=1)
    expected = load_any(tmp_path / "a").state_dict["w"]
    assert torch.equal(load(tmp_path / "b", first).state_dict["w"], expected)
    with pytest.raises(ArtifactError, match="streams is malformed"):
        load(tmp_path / "c", format.seal(frames.compress(json.dumps(header).encode(), 3), payload))
    claiming = header | {"streams": header["streams"] | {"column": 4}}
    with pytest.raises(ArtifactError, match="streams is malformed"):
        load(tmp_path / "e", format.seal(frames.compress(json.dumps(claiming).encode(), 3), payload, version=1))
    header["tensors"][0]["column_offset"] = 0
    with pytest.raises(ArtifactError, match="w lies at 0 … 4 of the column stream of 0 entries"):
        load(tmp_path / "d", format.seal(frames.compress(json.dumps(header).encode(), 3), payload, version=1))


def test_damage_says_what_is_damaged(tmp_path, sample):
    content = sample[0]
    for position, match in ((70, "header is damaged"), (-3, "payload is damaged")):
        broken = bytearray(content)
        broken[position] ^= 1
        with pytest.raises(ArtifactError, match=match):
            load(tmp_path / "a", bytes(broken))
    with pytest.raises(ArtifactError, match="truncated: "):
        load(tmp_path / "a", content[:-1])
    with pytest.raises(ArtifactError, match="truncated: "):
        load(tmp_path / "a", content[:30])
    with pytest.raises(ArtifactError, match="longer than it says"):
        load(tmp_path / "a", content + b"\0")


def test_codes_and_floats_outside_their_range_are_refused(tmp_path):
    codes = forged_header([entry(storage="int", bits=4, exponent=0, scale_offset=0)], q=4, scale=1)
    with pytest.raises(ArtifactError, match="w has a code over 14"):
        load(tmp_path / "a", format.pack(codes, frames.compress(bytes([0, 15, 3, 4, 60, 0]), 3)))
    floats = forged_header([entry()], float32=4)
    with pytest.raises(ArtifactError, match="w has inf or NaN"):
        load(tmp_path / "a", format.pack(floats, frames.compress(b"\x7f" * 4 + b"\xc0" * 12, 3)))
