"""flex_attention over packed documents: its block masks, its shapes, and how often both are made."""

import functools

import pytest
import torch
from document_cases import BATCH, BOS, LENGTH, assert_same, attention_operands, positions
from op_cases import RATIO, assert_close, outputs_and_gradients, random
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition

from hymba_lightning.ops.documents import document_positions
from hymba_lightning.ops.sliding_window import compiled_flex as flex
from hymba_lightning.ops.sliding_window import sliding_window_attention


def blocks(count, indices):
    return [
        [sorted(row[:number].tolist()) for number, row in zip(*rows, strict=True)]
        for rows in zip(count[:, 0], indices[:, 0], strict=True)
    ]


@pytest.mark.parametrize(
    ("n_queries", "kept", "window"), [(700, 0, 200), (512, 256, 256), (640, 0, 640), (300, 99, 100), (512, 0, 48)]
)
def test_flexs_block_mask_of_documents_is_torchs_own(n_queries, kept, window):
    from torch.nn.attention.flex_attention import create_block_mask

    n_keys, n_rows = n_queries + kept, 3
    ids = torch.full((n_rows, n_queries), 5)
    ids[0, [3, 128, 260]] = BOS
    ids[2, 256] = BOS
    position = document_positions(ids, BOS, torch.tensor([0, kept, 250]))

    def visible(b, h, t, j):
        row, query = t // n_queries, t % n_queries
        distance = query + kept - (j - row * n_keys)
        return (row == j // n_keys) & (distance >= 0) & (distance < window) & (distance <= position[row, query])

    size = n_rows * n_queries, n_rows * n_keys
    ours = flex.documents_block_mask(n_keys, window, position)
    t, j = torch.arange(size[0])[:, None], torch.arange(size[1])
    assert torch.equal(ours.mask_mod(0, 0, t, j), visible(0, 0, t, j))
    torchs = create_block_mask(visible, None, None, *size, device="cpu")
    assert ours.kv_num_blocks.shape == torchs.kv_num_blocks.shape, "one list, whatever the rows"
    for part in ("", "full_"):
        for side in ("kv", "q"):
            names = f"{part}{side}_num_blocks", f"{part}{side}_indices"
            found, expected = (blocks(*(getattr(mask, name) for name in names)) for mask in (ours, torchs))
            if part or kept == 0 or n_queries % 128 == 0:
                assert found == expected
            else:  # blocks between the keys of two sequences are looked at in vain
                assert all(set(e) <= set(f) for e, f in zip(expected[0], found[0], strict=True))


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
            mask = flex.documents_block_mask(512, 100, position)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_a_larger_compiled_graph_every_sequence_has_its_own_documents():
    def attention(q, k, v, ids, backend):
        position = document_positions(ids, BOS)
        return sliding_window_attention(q, k, v, window=48, scale=0.25, doc_position_BT=position, backend=backend)

    compiled = torch.compile(functools.partial(attention, backend="flex"), dynamic=False)
    operands = {
        name: random(2, 512, heads, 64, seed=seed).cuda().requires_grad_()
        for seed, (name, heads) in enumerate({"q": 4, "k": 2, "v": 2}.items())
    }
    weights = (random(2, 512, 4, 64, seed=3).cuda(),)
    for starts in ([[256], []], [[], [256]], [[5, 300], [128, 384]]):
        ids = torch.full((2, 512), 5, device="cuda")
        for row, places in zip(ids, starts, strict=True):
            row[places] = BOS
        got, expected = (
            outputs_and_gradients(functools.partial(call, ids=ids), operands, weights)
            for call in (compiled, functools.partial(attention, backend="naive"))
        )
        assert_same(got, expected, 1e-3)
