"""Window attention by flex_attention: few compiled shapes for many lengths, and the block mask from its formula."""

import functools

import pytest
import torch
import torch.nn.functional as F
from attention_cases import case
from op_cases import RATIO, assert_close, outputs_and_gradients, random

from hymba_lightning.ops.sliding_window import compiled_flex as flex
from hymba_lightning.ops.sliding_window import sliding_window_attention


@pytest.mark.parametrize("head_dim", [2, 12, 16, 20])
def test_flex_never_sees_heads_narrower_than_it_compiles_for(head_dim, monkeypatch):
    widths = []

    def attention(q, k, v, **options):
        widths.append({x.size(-1) for x in (q, k, v)})
        return flex.flex_attention(q, k, v, **options)

    monkeypatch.setattr(flex, "_compiled", lambda: attention)
    operands = case(2, 20, 33, 6, 2, head_dim)
    out = flex.sliding_window_attention_flex(*operands.values(), 9, head_dim**-0.5)
    assert widths == [{max(head_dim, 16)}]
    assert_close("out", out, sliding_window_attention(**operands, window=9, backend="naive"), RATIO[torch.float32])


def flex_attention_of(n_queries, n_keys, window=20):
    operands = case(1, n_queries, n_keys, 4, 2, 16)
    out = flex.sliding_window_attention_flex(*operands.values(), window, 0.25)
    assert_close("out", out, sliding_window_attention(**operands, window=window, scale=0.25, backend="naive"), 3e-6)


def test_flex_compiles_a_few_shapes_for_many_lengths(traced_flex):
    for n_queries in (100, 129, 150, 160, 180, 192, 200, 250, 256):
        for kept in (0, 5, 18, 19, 60):
            flex_attention_of(n_queries, n_queries + kept)
    assert set(traced_flex) == {(1, 4, length, 16) for length in (128, 192, 256, 384)}
    # Without and with a window's keys before it, and for 192 and 256 once more: keys to which nothing is added are a
    # view with other strides.
    assert len(traced_flex) == 9


def test_flex_compiles_more_shapes_than_torchs_own_limit(traced_flex):
    for window in range(2, 20):
        flex_attention_of(30, 30, window)
    assert len(traced_flex) == 18


def test_flex_refuses_to_make_every_score(traced_flex, monkeypatch):
    monkeypatch.setattr(flex, "MAX_COMPILED_SHAPES", 2)
    flex_attention_of(30, 30, 4)
    flex_attention_of(30, 30, 5)
    with pytest.raises(flex.UncompiledAttentionError, match=r"all 128 x 128 scores.*more than 2 shapes"):
        flex_attention_of(30, 30, 6)
    flex_attention_of(30, 30, 4)
    with torch.compiler.set_stance("force_eager"), pytest.raises(flex.UncompiledAttentionError, match="switched on"):
        flex_attention_of(30, 30, 4)


@pytest.mark.parametrize(
    ("length", "rounded"),
    [
        (1, 128),
        (128, 128),
        (129, 192),
        (192, 192),
        (193, 256),
        (257, 384),
        (385, 512),
        (32768, 32768),
        (32769, 49152),
        (49153, 65536),
    ],
)
def test_lengths_are_rounded_to_two_in_each_doubling(length, rounded):
    assert flex.rounded_length(length) == rounded


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "window"),
    [(30, 30, 9), (30, 33, 9), (30, 38, 9), (30, 50, 9), (1, 9, 9), (1, 4, 9), (140, 200, None)],
)
def test_flex_in_a_rounded_shape_matches_naive(n_queries, n_keys, window, monkeypatch):
    def dense(q, k, v, *, block_mask, scale, enable_gqa, **_):
        t, j = (torch.arange(x.size(2)) for x in (q, k))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=block_mask.mask_mod(0, 0, t[:, None], j), scale=scale, enable_gqa=enable_gqa
        )

    # flex_attention itself has no backward on a CPU.
    monkeypatch.setattr(flex, "_compiled", lambda: dense)
    operands = case(2, n_queries, n_keys, 4, 2, 16)
    weights = (random(2, n_queries, 4, 16, seed=3),)
    got, gradients = outputs_and_gradients(
        lambda **qkv: flex.sliding_window_attention_flex(*qkv.values(), window, 0.25), operands, weights
    )
    expected, expected_gradients = outputs_and_gradients(
        functools.partial(sliding_window_attention, window=window, scale=0.25, backend="naive"), operands, weights
    )
    assert_close("out", got[0], expected[0], 3e-6)
    for name, reference in expected_gradients.items():
        assert_close(f"gradient of {name}", gradients[name], reference, 3e-6)


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "window"),
    [
        (512, 512, 128),
        (700, 700, 200),
        (300, 900, 256),
        (1, 400, 100),
        (640, 640, 640),
        (640, 640, 1),
        (257, 1000, 129),
    ],
)
def test_block_mask_from_its_formula_is_torchs_own(n_queries, n_keys, window):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, t, j):
        distance = t + n_keys - n_queries - j
        return (distance >= 0) & (distance < window)

    def blocks(count, indices):
        return [sorted(row[:number].tolist()) for number, row in zip(count[0, 0], indices[0, 0], strict=True)]

    ours = flex.window_block_mask(n_queries, n_keys, window, torch.device("cpu"))
    torchs = create_block_mask(visible, None, None, n_queries, n_keys, device="cpu")
    assert blocks(ours.kv_num_blocks, ours.kv_indices) == blocks(torchs.kv_num_blocks, torchs.kv_indices)
    full, torchs_full = ((mask.full_kv_num_blocks, mask.full_kv_indices) for mask in (ours, torchs))
    assert blocks(*full) == blocks(*torchs_full)
    assert ours.seq_lengths == (n_queries, n_keys)


def test_block_mask_of_a_long_sequence_is_small():
    mask = flex.window_block_mask(65536, 65536, 512, torch.device("cpu"))
    tensors = (
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        mask.q_num_blocks,
        mask.q_indices,
        mask.full_q_num_blocks,
        mask.full_q_indices,
    )
    assert sum(x.numel() * x.element_size() for x in tensors) < 8 * 2**20
