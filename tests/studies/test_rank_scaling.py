"""The step on several ranks: what is measured, what is predicted, and the picture of the exchange."""

import json

import pytest

from hymba_lightning.studies.rank_scaling import RankTime, main, predict, table
from hymba_lightning.studies.rank_trace import EXCHANGE, Span, beside, draw, on_the_gpu

TINY = [
    *("--net.vocab_size", "64", "--net.n_layers", "2", "--net.d_model", "32"),
    *("--net.n_heads", "2", "--net.n_kv_heads", "1", "--net.window", "8"),
]


def timed(ranks, *, gradient=40.0, reduction=0.0, optimizer=2.0, alone=0.0, latency=0.0, accumulate=1):
    total = gradient * accumulate + reduction + optimizer
    return RankTime(
        ranks=ranks,
        accumulate=accumulate,
        total=total,
        shortest=total - 1,
        longest=total + 1,
        gradient=gradient * accumulate,
        reduction=reduction,
        optimizer=optimizer,
        reduction_alone=alone,
        latency=latency,
        payload=100_000_000,
        tokens=65_536 * ranks * accumulate,
    )


@pytest.mark.more
def test_two_ranks_make_the_step_of_a_fit(tmp_path, capsys):
    """In processes of their own: groups of one and of two, and one micro-batch and two."""
    options = "--ranks 1 2 --predict 4 --seq_len 32 --tokens 64 --steps 3 --warmup 1 --compile false --trace true"
    main(["--out", str(tmp_path / "out"), *options.split(), *TINY])
    done = capsys.readouterr().out
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in done.splitlines() if line.startswith("|")][2:]
    assert [row[:2] for row in rows] == [["1", "1"], ["1", "2"], ["2", "1"], ["2", "2"], ["4, predicted", "1"]]
    assert (tmp_path / "out/table.md").read_text() == done
    times = [RankTime(**time) for time in json.loads((tmp_path / "out/times.json").read_text())]
    assert [time.tokens for time in times] == [64, 128, 128, 256]
    assert all(time.reduction_alone == 0 for time in times[:2])
    assert all(time.reduction_alone > 0 and time.latency > 0 for time in times[2:])
    assert len({time.payload for time in times}) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["table.md", "times.json", "trace.json.gz"]


def test_what_cannot_be_measured_is_refused_before_a_process_starts(tmp_path):
    line = ["--out", str(tmp_path / "out"), "--seq_len", "32", "--compile", "false", *TINY]
    with pytest.raises(ValueError, match="48 tokens a micro-batch are no multiple of seq_len 32"):
        main([*line, "--tokens", "48"])
    with pytest.raises(ValueError, match=r"--ranks must rise from 1 or more, got \[2, 1\]"):
        main([*line, "--tokens", "64", "--ranks", "2", "1"])
    with pytest.raises(ValueError, match="--predict needs the step on one rank and on several"):
        main([*line, "--tokens", "64", "--ranks", "2", "--predict", "8"])
    for option, value, least in (
        ("accumulate", 0, 1),
        ("seq_len", 0, 1),
        ("tokens", -64, 1),
        ("steps", 0, 1),
        ("warmup", -1, 0),
        ("predict", 0, 1),
    ):
        given = ["--tokens", "64", "--ranks", "1", "2", f"--{option}", str(value)]
        with pytest.raises(ValueError, match=f"--{option} must be at least {least}, got {value}"):
            main([*line, *given])
    with pytest.raises(ValueError, match="n_layers must be at least 2"):
        main([*line, "--tokens", "64", "--net.n_layers", "1"])
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_named_and_left(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file: name a folder"):
        main(["--out", str(tmp_path / "out"), "--seq_len", "32", "--tokens", "64", *TINY])
    assert (tmp_path / "out").read_text() == "mine"


def test_a_reduction_grows_as_a_rings_does():
    """100 MB over two ranks: 100 MB through each link in 1 ms; over eight 175 MB, and seven waits instead of one."""
    times = [timed(1), timed(2, reduction=1.6, optimizer=3.0, alone=1.1, latency=0.1)]
    total, reduction = predict(times, 8)
    assert reduction == pytest.approx(7 * 0.1 + 1.75)
    assert total == pytest.approx(40 + reduction + 3.0)
    assert predict(times, 2)[1] == pytest.approx(1.1)
    with pytest.raises(ValueError, match="on one rank and on several"):
        predict(times[1:], 8)


def test_efficiency_is_against_one_rank_with_as_many_micro_batches():
    times = [
        timed(1),
        timed(1, accumulate=2),
        timed(2, reduction=2.0, alone=1.0),
        timed(2, reduction=2.0, alone=1.0, accumulate=2),
    ]
    cells = [line.split("|") for line in table(times, [8]).splitlines() if line.startswith("|")][2:]
    assert [row[8].strip() for row in cells] == ["1.000", "1.000", "0.955", "0.976", "0.960"]


def kernel(name, begin, duration, cat="kernel"):
    return {"ph": "X", "cat": cat, "name": name, "ts": 1000.0 + begin, "dur": duration}


def test_a_trace_tells_what_of_the_exchange_is_hidden(tmp_path):
    events = [
        kernel("forward and backward", 0, 100, "gpu_user_annotation"),
        kernel("Optimizer.step#Muon.step", 130, 50, "gpu_user_annotation"),
        kernel("gemm", 0, 60),
        kernel("gemm", 62, 38),
        kernel("ncclDevKernel_AllReduce", 90, 40),
        kernel("muon", 130, 30),
        kernel("ncclDevKernel_AllGather", 160, 20),
        kernel("a launch on the host", 0, 500, "cpu_op"),
    ]
    spans = on_the_gpu({"traceEvents": events})
    assert sorted(spans) == sorted(
        [
            Span("forward and backward", 0.0, 0.1),
            Span("optimizer", 0.13, 0.16),
            Span(EXCHANGE, 0.09, 0.13),
            Span(EXCHANGE, 0.16, 0.18),
        ]
    )
    assert beside(spans) == (pytest.approx(0.06), pytest.approx(0.01))
    assert "0.06 ms in the trace, 0.01 ms of them beside" in draw(spans, "2 × GPU, $x$", tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 1000
    assert on_the_gpu({"traceEvents": events[-1:]}) == []
