"""Score-first test-time training: the reference's numbers, the rules of the score, and any number of ranks."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from golden_vectors import arrays, network, settings, ttt_chunks, ttt_config
from tiny_lightning import run_ranks

from hymba_lightning.data.token_stream import Chunk
from hymba_lightning.evaluation import ScoreFirstTTT, TTTConfig, score_first_ttt

MODES = {
    "cold": {},
    "sliding": {"mode": "sliding", "stride": 16},
    "carried": {"mode": "carried", "warm_tokens": 48},
    "carried, made anew after updates": {"mode": "carried", "warm_tokens": 48, "state_after_update": "rewarm"},
}


@pytest.fixture(scope="module")
def golden():
    return arrays("ttt"), settings("ttt")


def total(scores):
    result = scores[0].score
    for other in scores[1:]:
        result = result + other.score
    return result


def run(golden, chunks=None, **changes):
    vectors, values = golden
    net = network(values["cfg"], vectors)
    chunks = chunks or ttt_chunks(vectors, values["chunk_tokens"])
    scores = score_first_ttt(net, chunks, values["seq_len"], ttt_config(values, **changes))
    return net, scores


def test_equals_the_reference(golden):
    vectors, values = golden
    net, scores = run(golden)
    assert total(scores).bpb == pytest.approx(values["ttt_val_bpb"], abs=1e-4)
    assert total(scores).loss == pytest.approx(values["ttt_val_loss"], abs=1e-4)
    state = net.state_dict()
    for key, expected in vectors.items():
        if key.startswith("after/"):
            value = state[key.removeprefix("after/")]
            assert float((value - expected).norm() / expected.norm().clamp_min(1e-12)) < 1e-4, key
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_no_epochs_only_scores(golden):
    vectors, values = golden
    net, scores = run(golden, epochs=0)
    assert total(scores).bpb == pytest.approx(values["plain_val_bpb"], abs=1e-4)
    for key, value in net.state_dict().items():
        assert torch.equal(value, vectors[f"param/{key}"]), key


def test_every_token_after_the_first_is_scored_once(golden):
    vectors, values = golden
    chunks = ttt_chunks(vectors, values["chunk_tokens"], n_tokens=1200)
    _, scores = run(golden, chunks, drop_partial=False, epochs=0)
    assert total(scores).n_tokens == 1199
    assert total(scores).n_bytes == sum(int(chunk.target_bytes.long().sum()) for chunk in chunks)
    _, dropped = run(golden, chunks, epochs=0)
    assert total(dropped).n_tokens < 1199


@pytest.mark.parametrize("mode", MODES)
def test_a_later_token_changes_no_earlier_score(golden, mode):
    """A probability depends on the artifact and the tokens before it alone: bit for bit, across chunks."""
    vectors, values = golden
    chunks = ttt_chunks(vectors, values["chunk_tokens"])
    _, scores = run(golden, chunks, drop_partial=False, epochs=1, **MODES[mode])
    before = torch.cat([score.nats for score in scores])
    for position in (700, 1000):
        changed_vectors = dict(vectors)
        changed_vectors["tokens"] = vectors["tokens"].clone()
        changed_vectors["tokens"][position] = (vectors["tokens"][position] + 3) % 1000
        _, other = run(
            golden, ttt_chunks(changed_vectors, values["chunk_tokens"]), drop_partial=False, epochs=1, **MODES[mode]
        )
        after = torch.cat([score.nats for score in other])
        assert torch.equal(before[: position - 1], after[: position - 1])
        assert not torch.equal(before[position - 1 :], after[position - 1 :])


def test_the_causality_check_catches_a_cheat(golden):
    """Training on a chunk before scoring it does change earlier scores: the check above can fail."""
    vectors, values = golden

    def adapt_then_score(chunk_vectors):
        net = network(values["cfg"], vectors)
        config = ttt_config(values, epochs=1, drop_partial=False)
        nats = []
        for chunk in ttt_chunks(chunk_vectors, values["chunk_tokens"])[:3]:
            peek = chunk._replace(index=0, n_chunks=2)
            cheat = ScoreFirstTTT(net, values["seq_len"], config)
            cheat.score_chunk(peek)
            cheat.adapt_chunk(peek)
            honest = ScoreFirstTTT(net, values["seq_len"], TTTConfig(epochs=0))
            nats.append(honest.score_chunk(peek).nats)
        return torch.cat(nats)

    changed = dict(vectors)
    changed["tokens"] = vectors["tokens"].clone()
    changed["tokens"][700] = (vectors["tokens"][700] + 3) % 1000
    assert not torch.equal(adapt_then_score(vectors)[:699], adapt_then_score(changed)[:699])


def test_scores_are_final_before_the_weights_move(golden):
    vectors, values = golden
    net = network(values["cfg"], vectors)
    chunks = ttt_chunks(vectors, values["chunk_tokens"])
    ttt = ScoreFirstTTT(net, values["seq_len"], ttt_config(values))
    untouched = copy.deepcopy(net)
    first = ttt.score_chunk(chunks[0])
    kept = first.nats.clone()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), untouched.parameters(), strict=True))
    ttt.adapt_chunk(chunks[0])
    assert torch.equal(first.nats, kept)
    assert not torch.equal(net.tok_emb.weight, untouched.tok_emb.weight)


def test_order_is_enforced(golden):
    vectors, values = golden
    chunks = ttt_chunks(vectors, values["chunk_tokens"])
    ttt = ScoreFirstTTT(network(values["cfg"], vectors), values["seq_len"], ttt_config(values))
    with pytest.raises(ValueError, match="score first"):
        ttt.adapt_chunk(chunks[0])
    with pytest.raises(ValueError, match="left-to-right"):
        ttt.score_chunk(chunks[1])
    ttt.score_chunk(chunks[0])
    with pytest.raises(ValueError, match="left-to-right"):
        ttt.score_chunk(chunks[0])
    with pytest.raises(ValueError, match="not adapted"):
        ttt.score_chunk(chunks[1])
    ttt.adapt_chunk(chunks[0])
    with pytest.raises(ValueError, match="adapt once"):
        ttt.adapt_chunk(chunks[0])


def test_an_interrupted_update_leaves_a_network_that_can_be_trained(golden):
    vectors, values = golden
    net, chunks = network(values["cfg"], vectors).eval(), ttt_chunks(vectors, values["chunk_tokens"])
    ttt = ScoreFirstTTT(net, values["seq_len"], ttt_config(values))
    ttt.score_chunk(chunks[0])

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = net.blocks[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ttt.adapt_chunk(chunks[0])
    hook.remove()
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not net.training


def test_a_rate_that_drives_the_weights_away_is_named(golden):
    vectors, values = golden
    chunks = ttt_chunks(vectors, values["chunk_tokens"])
    config = dataclasses.replace(ttt_config(values), lr=1e6)
    with pytest.raises(ValueError, match=r"^chunk 1 scores nan nats: training on those before .* lower ttt.lr$"):
        score_first_ttt(network(values["cfg"], vectors), chunks, values["seq_len"], config)


def test_the_last_chunk_is_not_trained_on(golden):
    vectors, values = golden
    net = network(values["cfg"], vectors)
    single = Chunk(0, 1, vectors["tokens"].long()[:257], torch.ones(256, dtype=torch.int16))
    score_first_ttt(net, [single], values["seq_len"], ttt_config(values))
    assert torch.equal(net.tok_emb.weight, vectors["param/tok_emb.weight"])


def _rank(rank: int, size: int, n_tokens: int, over_all_ranks: bool, folder: str) -> None:
    dist.init_process_group("gloo")
    golden = arrays("ttt"), settings("ttt")
    chunks = ttt_chunks(golden[0], 256, n_tokens)
    update = {"update_seqs": 4, "batch_seqs": 3} if over_all_ranks else {"batch_seqs": 4 // size}
    net, scores = run(golden, chunks, drop_partial=False, **update)
    torch.save({"nats": torch.cat([s.nats for s in scores]), "weights": net.state_dict()}, f"{folder}/{size}-{rank}.pt")


@pytest.mark.ddp
@pytest.mark.parametrize(("n_tokens", "over_all_ranks"), [(1200, False), (514 + 60, False), (1200, True)])
def test_any_number_of_ranks_gives_the_same_score(tmp_path: Path, n_tokens, over_all_ranks):
    """Sequences that two ranks cannot share evenly, a partial one, and a chunk shorter than one sequence: no hang, the
    same weights on both ranks, and one rank's score at the same global batch."""
    for size in (1, 2):
        run_ranks(_rank, size, n_tokens, over_all_ranks, str(tmp_path), world_size=size)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first["nats"], second["nats"])
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
        assert torch.allclose(value, one["weights"][key], atol=1e-5), key
    assert one["nats"].numel() == n_tokens - 1
    bits = [float(result["nats"].double().sum()) for result in (one, first)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)
    assert one["nats"].dtype == torch.float32
