"""Batches of sequences that differ in length give what each gives alone, wherever their padding stands."""

import pytest
import torch
from tiny import NET, lively

from hymba_lightning.evaluation import carried
from hymba_lightning.generation.rows import join, read_rows, row_lengths, select, split, without_padding
from hymba_lightning.generation.sampler import SamplingConfig, generate
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig

# Shorter than the window of 16, as long, and far longer.
LENGTHS = (1, 30, 5, 16, 30)
VARIANTS = {
    "window": {},
    "two windows": {"layer_windows": [4, 16]},
    "global layer": {"global_layers": [1]},
    "meta tokens and shared keys": {"meta_tokens": 3, "kv_share_every": 2},
}


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def net(request) -> Hymba:
    return lively(HymbaConfig(**(NET | VARIANTS[request.param]), tied_embed_std=0.3)).eval()


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 1024, (n,), generator=generator) for n in LENGTHS]


def padded(rows, side, pad):
    """Rows as one tensor (B, T) and its mask."""
    longest = max(row.numel() for row in rows)
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(longest - row.numel(), None) if side == "left" else slice(row.numel())
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def test_a_joined_state_goes_on_as_each_row_does_alone(net, rows):
    """Some tokens past the window, so that padding moves out of it; logits of every step."""
    _, states = read_rows(net, rows, [None] * len(rows), 7)
    together = join(states)
    alone = list(states)
    for step in range(20):
        tokens = torch.arange(len(rows))[:, None] * 17 + step
        logits_BV, together = carried.read(net, tokens, together, 7)
        for index in range(len(rows)):
            own, alone[index] = carried.read(net, tokens[index : index + 1], alone[index], 7)
            assert torch.allclose(logits_BV[index], own[0], rtol=0, atol=2e-5), (step, index)


def test_rows_taken_from_a_joined_state_are_the_rows(net, rows):
    _, states = read_rows(net, rows, [None] * len(rows), 64)
    for own, taken in zip(states, split(join(states)), strict=True):
        assert taken.position == own.position
        for layer, got in zip(own.layers, taken.layers, strict=True):
            assert got.hidden is None
            for mine, theirs in zip(
                (layer.keys, layer.values, *layer.recurrent), (got.keys, got.values, *got.recurrent), strict=True
            ):
                assert torch.equal(mine, theirs)
    twice = select(join(states), [2, 0, 2])
    assert twice.layers[0].keys.size(1) == states[2].layers[0].keys.size(1)
    again = join([twice, states[1]])
    assert torch.equal(split(again)[1].layers[1].keys, states[0].layers[1].keys)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_give_what_each_gives_alone(net, rows, side):
    config = SamplingConfig(max_new_tokens=25, temperature=1.0, seed=5)
    ids, mask = padded(rows, side, pad=7)
    together = [list(row) for row in zip(*generate(net, ids, config, mask), strict=True)]
    for index, row in enumerate(rows):
        alone = SamplingConfig(max_new_tokens=25, temperature=1.0, seed=5 + index)
        assert together[index] == [new[0] for new in generate(net, [row.tolist()], alone)]


def test_far_positions_are_turned_back_by_row(rows, monkeypatch):
    net = lively(HymbaConfig(**NET, tied_embed_std=0.3)).eval()
    _, states = read_rows(net, rows, [None] * len(rows), 64)
    expected, _ = carried.read(net, torch.ones(len(rows), 1, dtype=torch.int64), join(states), 64)
    monkeypatch.setattr(carried, "REBASE_AT", 20)
    turned = net.compact(join(states), carried.REBASE_AT)
    assert turned.position.tolist() == [0] * len(rows)
    got, _ = carried.read(net, torch.ones(len(rows), 1, dtype=torch.int64), turned, 64)
    assert torch.allclose(got, expected, rtol=0, atol=2e-5)


def test_bfloat16_batches_draw_what_each_draws_alone(rows):
    """Keys are not turned when rows are joined: in bfloat16 that would cost digits."""
    net = lively(HymbaConfig(**NET, tied_embed_std=0.3))
    net.runtime = RuntimeConfig(compute_dtype="bfloat16")
    states = read_rows(net, rows, [None] * len(rows), 64)[1]
    for own, taken in zip(states, split(join(states)), strict=True):
        assert torch.equal(own.layers[0].keys, taken.layers[0].keys)


def test_masks_are_taken_for_what_they_say():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1]])
    first, length = row_lengths(mask)
    assert (first.tolist(), length.tolist()) == ([1, 0, 0], [2, 2, 3])
    assert without_padding(torch.tensor([[9, 1, 2], [3, 4, 9], [5, 6, 7]]), mask) == [[1, 2], [3, 4], [5, 6, 7]]


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 1]])
def test_a_mask_with_more_than_padding_on_one_side_is_refused(row):
    with pytest.raises(ValueError, match=r"row 1 .* pad rows on the left or on the right"):
        row_lengths(torch.tensor([[1, 1, 1, 1], row]))
    with pytest.raises(ValueError, match=r"\(batch, tokens\)"):
        row_lengths(torch.tensor(row))
