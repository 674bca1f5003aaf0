"""The comparison of op times: peers compute what ours do, and what is wrong is not timed."""

import dataclasses

import pytest
import torch

from hymba_lightning.studies import op_peers, op_subjects, op_times

CPU = torch.device("cpu")


def subjects():
    return {
        "scan": op_subjects.scan_subject(1, 40, 8, 2, CPU, torch.float32),
        "conv": op_subjects.conv_subject(1, 40, 8, 4, CPU, torch.float32),
        "attention": op_subjects.attention_subject(1, 40, 4, 2, 8, 16, CPU, torch.float32),
        "loss": op_subjects.loss_subject(40, 64, 30.0, CPU, torch.float32),
    }


@pytest.mark.parametrize("name", ["scan", "conv", "attention", "loss"])
def test_every_contender_agrees_with_the_definition_and_is_timed(name):
    subject = subjects()[name]
    names = [contender.name for contender in subject.contenders]
    assert {"scan": "numba", "conv": "numba", "attention": "blocked", "loss": "torch"}[name] in names
    assert [op_times.problem_with(contender, subject) for contender in subject.contenders] == [""] * len(names)
    results = op_times.time_subject(subject, rounds=2)
    assert list(results) == names
    assert all(0 < result.spread[0] <= result.both <= result.spread[1] for result in results.values())


def test_wrong_gradient_is_named_and_not_timed():
    subject = subjects()["conv"]
    right = subject.contenders[0]

    def stops_the_gradient(x_BTE, weight_EW, bias_E):
        return right.run(x_BTE, weight_EW.detach() + 0 * weight_EW, bias_E)

    wrong = op_peers.Contender("wrong", stops_the_gradient)
    subject = dataclasses.replace(subject, contenders=[right, wrong])
    results = op_times.time_subject(subject, rounds=1)
    assert results["wrong"].problem.startswith("wrong: weight_EW is off by 1.0e+00")
    assert not results[right.name].problem
    printed = op_times.table(subject, results, op_times.Ceilings(10.0, 0.1))
    assert "| wrong | wrong: weight_EW is off by 1.0e+00, not timed |" in printed


def test_floor_is_the_nearer_of_both_limits():
    subject = subjects()["attention"]
    subject = dataclasses.replace(subject, megabytes=30.0, gigaflops=4.0)
    assert op_times.Ceilings(10.0, 100.0).floor_ms(subject) == pytest.approx(3.0)
    assert op_times.Ceilings(1000.0, 0.5).floor_ms(subject) == pytest.approx(8.0)


def test_attention_work_counts_only_the_band():
    whole = op_subjects.attention_subject(1, 100, 2, 1, 8, 1000, CPU, torch.float32)
    banded = op_subjects.attention_subject(1, 100, 2, 1, 8, 10, CPU, torch.float32)
    assert whole.gigaflops == pytest.approx(6 * 2 * 2 * 8 * 5050 / 1e9)
    assert banded.gigaflops == pytest.approx(6 * 2 * 2 * 8 * sum(min(i + 1, 10) for i in range(100)) / 1e9)
