"""What every scheme keeps to, whichever files there are in its folder."""

import dataclasses

import pytest
import torch

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import QuantizationConfig, calibrate, load_artifact, save_artifact
from hymba_lightning.quantization.config import SCHEMES
from hymba_lightning.quantization.rows import dequantize_rows
from hymba_lightning.quantization.schemes import in_words, scheme_of

NET = HymbaConfig(
    vocab_size=96, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, window=8, d_state=4, bigram_hash=False
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Hymba(NET)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape))
    return net


@pytest.mark.parametrize("name", SCHEMES)
def test_an_artifact_of_any_scheme_is_the_network_again_and_the_same_file_each_time(net, tmp_path, name):
    config = QuantizationConfig(scheme=name, keep_float_numel=500, zstd_level=3)
    batches = [torch.randint(96, (1, 200), generator=torch.Generator().manual_seed(1))]
    known = calibrate(net, config, batches)._asdict()
    for file in ("a", "b"):
        save_artifact(
            tmp_path / file, net.state_dict(), config=NET.to_dict(), tokenizer={}, metadata={}, scheme=config, **known
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    artifact = load_artifact(tmp_path / "a")
    assert artifact.quantization["scheme"] == name
    for key, tensor in net.state_dict().items():
        error = (artifact.state_dict[key] - tensor).square().mean().sqrt() / tensor.square().mean().sqrt()
        assert error < 0.2, key


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "mixed"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_codes_stay_inside_their_bits(name, bits):
    config = QuantizationConfig(scheme=name, bits=bits)
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 40)[:, None]
    rounded = scheme_of(config).round("w", weight, bits, config)
    assert rounded.bits == bits
    assert int(rounded.q.abs().max()) <= 2 ** (bits - 1) - 1
    weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="w: row 3 has inf or NaN"):
        scheme_of(config).round("w", weight, bits, config)


def test_absmax_keeps_the_largest_entry_of_each_row_and_a_search_may_not():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    largest = weight.abs().amax(1)
    kept = {}
    for name in ("absmax", "rows"):
        config = QuantizationConfig(scheme=name, bits=4, clip_quantile=0.99)
        kept[name] = dequantize_rows(scheme_of(config).round("w", weight, 4, config)).abs().amax(1)
    torch.testing.assert_close(kept["absmax"], largest, rtol=1e-3, atol=0)
    assert (kept["rows"] < 0.99 * largest).float().mean() > 0.8


def test_a_name_that_says_6_bits_means_6_bits():
    assert QuantizationConfig(scheme="int6").scheme == "rows"
    with pytest.raises(ValueError, match="the scheme 'int6' rounds to 6 bits, not to bits=8: give the scheme 'rows'"):
        QuantizationConfig(scheme="int6", bits=8)
    with pytest.raises(ValueError, match=f"scheme='int7' is unknown: choose from {', '.join(SCHEMES)}"):
        QuantizationConfig(scheme="int7")
    for wrong in ({"gptq": True}, {"coarsen": 2.0}):
        with pytest.raises(ValueError, match=r"(the scheme|every scheme but) 'reference'"):
            dataclasses.replace(QuantizationConfig(scheme="reference"), **wrong)


def test_help_names_every_scheme():
    assert all(f"'{name}': " in in_words() for name in SCHEMES)
