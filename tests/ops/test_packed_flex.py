"""flex_attention over packed documents: its block masks, its shapes, and how often both are made."""

import functools

import pytest
import torch
from document_cases import BATCH, BOS, LENGTH, assert_same, attention_operands, positions
from op_cases import RATIO, outputs_and_gradients, random
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition

from hymba_lightning.ops.documents import document_positions
from hymba_lightning.ops.sliding_window import compiled_flex as flex
from hymba_lightning.ops.sliding_window import sliding_window_attention
from hymba_lightning.ops.testing import assert_close


def blocks(count, indices):
    return [
        [sorted(row[:number].tolist()) for number, row in zip(*rows, strict=True)]
        for rows in zip(count[:, 0], indices[:, 0], strict=True)
    ]


@pytest.mark.parametrize(
    ("n_queries", "kept", "window"), [(700, 0, 200), (500, 300, 256), (640, 0, 640), (300, 99, 100)]
)
def test_flexs_block_mask_of_documents_is_torchs_own(n_queries, kept, window):
    from torch.nn.attention.flex_attention import create_block_mask

    n_keys = n_queries + kept
    ids = torch.full((2, n_queries), 5)
    ids[0, [3, 128, 260]] = BOS
    position = document_positions(ids, BOS, torch.tensor([0, 250]))

    def visible(b, h, t, j):
        distance = t + kept - j
        return (distance >= 0) & (distance < window) & (distance <= position[b, t])

    ours = flex.window_block_mask(n_queries, n_keys, window, torch.device("cpu"), position)
    torchs = create_block_mask(visible, 2, None, n_queries, n_keys, device="cpu")
    assert blocks(ours.kv_num_blocks, ours.kv_indices) == blocks(torchs.kv_num_blocks, torchs.kv_indices)
    full, torchs_full = ((mask.full_kv_num_blocks, mask.full_kv_indices) for mask in (ours, torchs))
    assert blocks(*full) == blocks(*torchs_full)
    t, j = torch.arange(n_queries)[:, None], torch.arange(n_keys)
    for row in range(2):
        assert torch.equal(ours.mask_mod(row, 0, t, j), visible(row, 0, t, j))


@pytest.fixture
def dense_flex(monkeypatch):
    """Flex's calls, computed with a dense mask: flex_attention itself has no backward on a CPU. Lists the masks."""
    masks = []

    def dense(q, k, v, *, block_mask, scale, enable_gqa, **_):
        masks.append(block_mask)
        b, t, j = (torch.arange(size) for size in (q.size(0), q.size(2), k.size(2)))
        seen = block_mask.mask_mod(b[:, None, None, None], 0, t[:, None], j)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )

    monkeypatch.setattr(flex, "_compiled", lambda: dense)
    return masks


@pytest.mark.parametrize(("kept", "window"), [(0, 20), (5, 20), (19, 20), (60, 20), (60, None)])
def test_flex_in_a_rounded_shape_matches_naive(kept, window, dense_flex):
    doc_position_BT = positions()
    operands = {
        "q_BTHK": random(BATCH, LENGTH, 4, 16),
        "k_BSGK": random(BATCH, LENGTH + kept, 2, 16, seed=1),
        "v_BSGK": random(BATCH, LENGTH + kept, 2, 16, seed=2),
    }
    weights = (random(BATCH, LENGTH, 4, 16, seed=3),)
    got = outputs_and_gradients(
        lambda **qkv: flex.sliding_window_attention_flex(*qkv.values(), window, 0.25, doc_position_BT),
        operands,
        weights,
    )
    naive = functools.partial(
        sliding_window_attention, window=window, scale=0.25, doc_position_BT=doc_position_BT, backend="naive"
    )
    assert_same(got, outputs_and_gradients(naive, operands, weights), RATIO[torch.float32])


def test_flex_makes_a_batchs_mask_once_for_all_layers(dense_flex):
    operands, first, second = attention_operands(random, random), positions(), positions()
    for doc_position_BT in (first, first, second):
        flex.sliding_window_attention_flex(*operands.values(), 20, 0.25, doc_position_BT)
    assert dense_flex[0] is dense_flex[1]
    assert dense_flex[0] is not dense_flex[2]
    kept = len(flex._masks_of_documents)
    del first, doc_position_BT
    assert len(flex._masks_of_documents) == kept - 1, "it goes with its batch"


def test_flex_compiles_once_for_any_documents(traced_flex):
    operands = attention_operands(random, random)
    for starts in ([0], [0, 5, 70], range(0, LENGTH, 7)):
        ids = torch.full((BATCH, LENGTH), 5)
        ids[:, list(starts)] = BOS
        position = document_positions(ids, BOS)
        out = flex.sliding_window_attention_flex(*operands.values(), 20, 0.25, position)
        call = functools.partial(sliding_window_attention, doc_position_BT=position, backend="naive")
        assert_close("out", out, call(*operands.values(), window=20, scale=0.25), 3e-6)
    assert len(traced_flex) == 1


def test_a_compiled_graph_makes_a_batchs_mask_once_for_all_layers():
    """What torch's own partitioner leaves of the masks of one layer and of four."""
    sorts = {}

    def layers(x, ids, n_layers):
        position = document_positions(ids, BOS)
        for _ in range(n_layers):
            mask = flex.window_block_mask(512, 512, 100, torch.device("cpu"), position)
            for blocks_of in (mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices):
                x = (x * blocks_of.sum()).sin()
        return x.sum()

    for n_layers in (1, 4):
        targets = []

        def record(graph, examples, targets=targets):
            targets += [str(node.target) for node in graph.graph.nodes]
            return graph

        backend = functools.partial(
            aot_module_simplified,
            fw_compiler=record,
            bw_compiler=record,
            partition_fn=min_cut_rematerialization_partition,
        )
        torch._dynamo.reset()
        compiled = torch.compile(layers, backend=backend, fullgraph=True)
        compiled(random(3).requires_grad_(), torch.randint(0, 50, (2, 512)), n_layers).backward()
        sorts[n_layers] = sum("sort" in target for target in targets)
    assert sorts[4] == sorts[1] > 0
    torch._dynamo.reset()
