"""Documents packed into one sequence: the network computes each as if it stood alone, whatever is done with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_network import SMALL as SMALL_NETWORK
from torch._dynamo.utils import counters

from hymba_lightning.evaluation.carried import CarriedScorer, read, score_onward
from hymba_lightning.generation.rows import join, read_rows, select, split
from hymba_lightning.generation.sampler import SamplingConfig, generate
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.gradients import Gradients
from hymba_lightning.ops.testing import rms_ratio
from hymba_lightning.probes.cuts import nats_of

BOS = 1
SMALL = SMALL_NETWORK | {"packed_documents": True}
# Starts of documents in a sequence of 40 tokens, for each of two rows; the second begins within a document.
STARTS = ([0, 3, 4, 17, 39], [11, 30])
VARIANTS = [
    {},
    {"mixer": "mamba2"},
    {"global_layers": [1]},
    {"layer_windows": [3, 8, 2, 12]},
    {"kv_share_every": 2, "merge": "concat", "expand": 2, "branch_norm": True, "branch_gate": 3},
    {"d_conv": 2, "smear_gate": False, "bigram_hash": False},
]
NAMES = ["-".join(str(part) for item in changes.items() for part in item) or "plain" for changes in VARIANTS]
each_variant = pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)


def small(runtime: RuntimeConfig | None = None, **changes) -> Hymba:
    """A small network whose zero-initialised matrices are random, and whose state lasts long enough to be missed."""
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(**(SMALL | {"dt_init": "mamba"} | changes)), runtime)
    for parameter in net.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def tokens(starts=STARTS, length=40, seed=1) -> torch.Tensor:
    ids = torch.randint(2, 64, (len(starts), length), generator=torch.Generator().manual_seed(seed))
    for row, places in enumerate(starts):
        ids[row, places] = BOS
    return ids


def documents(ids_T):
    """The pieces of a row that begin with BOS or with the row."""
    starts = sorted({0, *(ids_T == BOS).nonzero().flatten().tolist(), ids_T.numel()})
    return [ids_T[first:last] for first, last in itertools.pairwise(starts)]


@each_variant
def test_a_sequence_of_documents_is_the_documents_one_by_one(changes):
    """Logits, and the gradient of every parameter, of the same weights without the option, document by document."""
    ids, weight = tokens(), torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(2))
    packed, alone = small(**changes), small(**changes | {"packed_documents": False})
    together = packed(ids)
    (together * weight).sum().backward()
    rows = [torch.cat([alone(piece[None])[0] for piece in documents(row)]) for row in ids]
    one_by_one = torch.stack(rows)
    (one_by_one * weight).sum().backward()
    assert rms_ratio(together, one_by_one) < 1e-5
    for (name, a), (_, b) in zip(packed.named_parameters(), alone.named_parameters(), strict=True):
        assert rms_ratio(a.grad, b.grad) < 1e-4, name
    with torch.no_grad():
        assert rms_ratio(alone(ids), one_by_one) > 1e-2, "without the option documents do read each other"


@each_variant
def test_nothing_leaks_into_the_next_document(changes):
    """Neither the tokens of documents before, nor gradients to them, by a single bit."""
    net = small(**changes)
    starts = ([0, 12, 25],)
    ids, other = tokens(starts, seed=1), tokens(starts, seed=5)
    other[:, 12:] = ids[:, 12:]
    seen = {}

    def keep(module, inputs, output):
        output.retain_grad()
        seen["embedded"] = output

    hook = net.tok_emb.register_forward_hook(keep)
    logits = net(ids)
    logits[:, 12:25].square().sum().backward()
    gradient = seen["embedded"].grad[0]
    assert not gradient[:12].any()
    assert not gradient[25:].any()
    assert gradient[12:25].any()
    hook.remove()
    with torch.no_grad():
        assert torch.equal(net(other)[:, 12:], logits[:, 12:])
        assert not torch.equal(net(other)[:, :12], logits[:, :12])


@each_variant
def test_a_sequence_cut_anywhere_gives_the_logits_of_the_whole(changes):
    net, ids = small(**changes).eval(), tokens()
    with torch.no_grad():
        whole = net(ids)
        for cuts in ([1, 3, 4, 18, 39], [20], list(range(1, 40))):
            pieces, state = [], None
            for first, stop in itertools.pairwise([0, *cuts, 40]):
                logits, state = net(ids[:, first:stop], state=state, return_state=True)
                state = net.compact(state, 16)
                pieces.append(logits)
            assert rms_ratio(torch.cat(pieces, dim=1), whole) < 1e-5
        assert state.doc_tokens.tolist() == [1, 10]
        assert any(tensor is state.doc_tokens for tensor in state.tensors())


def test_gradients_go_through_a_carried_state_to_their_own_document_only():
    net, ids = small(), tokens()
    whole = net(ids)
    whole.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    first, state = net(ids[:, :14], return_state=True)
    second = net(ids[:, 14:], state=state)
    torch.cat([first, second], dim=1).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert rms_ratio(parameter.grad, expected[name]) < 1e-4, name


def test_recomputation_and_bfloat16_serve_documents():
    ids = tokens()
    plain, recomputed = small(), small(RuntimeConfig(activation_checkpointing=True))
    rounded = small(RuntimeConfig(compute_dtype="bfloat16"))
    for net in (plain, recomputed, rounded):
        net(ids[:, :-1], ids[:, 1:]).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    with torch.no_grad():
        assert rms_ratio(rounded(ids), plain(ids)) < 0.03


def test_one_compiled_graph_serves_any_number_of_documents():
    net = small(n_layers=2)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(net.forward, dynamic=False, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for starts in (STARTS, ([], []), (range(40), range(0, 40, 3))):
            ids = tokens([list(places) for places in starts])
            loss = compiled(ids[:, :-1], ids[:, 1:])
            torch.testing.assert_close(loss, net(ids[:, :-1], ids[:, 1:]))
            loss.backward()
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_rows_of_different_lengths_generate_what_each_does_alone():
    """A row's document may have begun before its prompt's last BOS, and a generated BOS begins another."""
    net = small(global_layers=[2]).eval()
    rows = [tokens([[0, 9]], 13, seed=1)[0], tokens([[2]], 5, seed=2)[0], tokens([[0]], 21, seed=3)[0]]
    onward = [torch.randint(2, 64, (3, 1), generator=torch.Generator().manual_seed(i)) for i in range(12)]
    onward[4][1] = onward[7][:] = BOS
    with torch.no_grad():
        _, states = read_rows(net, rows, [None] * 3, 4)
        state, alone = join(states), [*split(join(states))]
        for token in onward:
            batch, state = read(net, token, state, 4)
            single = []
            for index in range(3):
                out, alone[index] = read(net, token[index : index + 1], alone[index], 4)
                single.append(out)
            assert rms_ratio(batch, torch.cat(single)) < 1e-5
        texts = [torch.cat([row, *(token[index] for token in onward)]) for index, row in enumerate(rows)]
        for index, text in enumerate(texts):
            last = documents(text)[-1]
            assert rms_ratio(batch[index], net(last[None])[0, -1]) < 1e-5
        assert select(state, [2, 0]).doc_tokens.tolist() == state.doc_tokens[[2, 0]].tolist()


def test_generation_after_a_document_is_that_of_its_own_text():
    net = small().eval()
    text = tokens([[0, 15]], 25)[0].tolist()
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.0)
    drawn = [[step[0] for step in generate(net, [prompt], sampling)] for prompt in (text, text[15:])]
    assert drawn[0] == drawn[1]


def test_a_text_scored_in_parts_gets_the_nats_of_its_documents():
    net = small().eval()
    text = tokens([[0, 7, 8, 33, 70]], 91)[0]
    expected = torch.cat(
        [net(piece[None, :-1], piece[None, 1:], reduction="none")[0] for piece in documents(text) if len(piece) > 1]
    )
    inside = torch.tensor([int(token) != BOS for token in text[1:]])
    with torch.no_grad():
        whole = nats_of(net, text[None])[0]
        scorer = CarriedScorer(net, 16, 64, True)
        parts = torch.cat([scorer.score(text[first : first + 31]).nats for first in (0, 30, 60)])
        onward = score_onward(net, text, None, 13)[0]
    for nats in (whole, parts, onward):
        torch.testing.assert_close(nats[inside], expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_option_is_off_by_default_and_then_not_in_files():
    assert not HymbaConfig().packed_documents
    assert "packed_documents" not in HymbaConfig().to_dict()
    config = HymbaConfig(packed_documents=True)
    assert HymbaConfig.from_dict(config.to_dict()) == config
    state = small(packed_documents=False)(tokens(), return_state=True)[1]
    assert state.doc_tokens is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"reset_at_bos": False}, "needs reset_at_bos"), ({"meta_tokens": 3}, "meta_tokens=3.*each of its documents")],
)
def test_what_documents_cannot_be_packed_with_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        HymbaConfig(packed_documents=True, **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_on_a_gpu_serves_any_documents():
    """Compiled, bfloat16, replayed as a CUDA graph for batches whose documents differ in number and place."""
    changes = {"d_model": 64, "window": 48, "layer_windows": [48, 16, 48, 300], "expand": 2}
    net = small(RuntimeConfig(compute_dtype="bfloat16"), **changes).cuda()
    exact = small(
        RuntimeConfig(**dict.fromkeys(("scan_backend", "conv_backend", "attention_backend"), "naive")), **changes
    )
    exact.cuda().load_state_dict(net.state_dict())
    torch._dynamo.reset()
    gradients = Gradients(torch.compile(net.forward, dynamic=False), list(net.parameters()), record=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, starts in enumerate(([5, 300], [], [0, 1, 2, 511], range(0, 512, 3), [256], range(64, 512, 64))):
            ids = tokens([list(starts), list(starts)[1:]], 513, seed=step).cuda()
            gradients.clear()
            loss = gradients.add(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            expected = exact(ids[:, :-1], ids[:, 1:])
            found = torch.autograd.grad(expected, list(exact.parameters()))
            torch.testing.assert_close(loss.float(), expected.detach(), rtol=5e-3, atol=5e-3)
            assert (
                rms_ratio(
                    *(torch.cat([g.flatten() for g in side]) for side in ([p.grad for p in net.parameters()], found))
                )
                < 0.1
            )
    assert gradients.shapes_recorded == [(2, 512)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_leaks_on_a_gpu():
    changes = {"d_model": 64, "window": 200, "layer_windows": [200, 48, 200, 700]}
    net = small(RuntimeConfig(compute_dtype="bfloat16"), **changes).cuda().eval()
    ids, other = (tokens([[0, 300]], 512, seed=seed).cuda() for seed in (1, 2))
    other[:, 300:] = ids[:, 300:]
    compiled = torch.compile(net.forward, dynamic=False)
    for forward in (net, compiled):
        with torch.no_grad():
            before, after = forward(ids), forward(other)
        assert torch.equal(before[:, 300:], after[:, 300:])
        assert not torch.equal(before[:, :300], after[:, :300])
