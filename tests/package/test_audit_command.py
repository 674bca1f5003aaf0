"""`hymba audit` on an artifact and on a submission's folder: honest ones pass, forged code is named."""

import contextlib
import io
import json
import math
import os
import shutil
import tarfile
import time

import pytest
import torch
from code_archive import rewrite_code
from fitted import without_native_loops

from hymba_lightning.closure import ARCHIVE
from hymba_lightning.commands import run_command
from hymba_lightning.errors import report
from hymba_lightning.evaluation import TTTConfig
from hymba_lightning.package import audit as audit_module
from hymba_lightning.package.audit_artifact import artifact_evaluator
from hymba_lightning.package.digests import sha256, shorten
from hymba_lightning.package.submission import package

QUICK = ["--tokens", "40", "--past_positions", "4", "--seed", "3", "--ttt.freeze_blocks", "0"]
NO_SUMS = ["--distribution_positions", "0"]


@pytest.fixture(scope="module")
def folder(fitted_run, tmp_path_factory):
    parent = tmp_path_factory.mktemp("audited")
    run, out = without_native_loops(fitted_run, parent / "run"), parent / "mine"
    package(str(run), str(out), name="Tiny", author="A", github_id="a", blurb="Small.", evaluate=False)
    return out


def outcome(path, fitted_run, capsys, *options: str) -> tuple[int, str]:
    data = next(fitted_run.parent.rglob("tokenizer.model")).parent
    try:
        run_command("audit", [str(path), "--data_dir", str(data), *QUICK, *options])
        code = 0
    except SystemExit as end:
        code = end.code
    except (ValueError, OSError) as error:
        code = report(error, "hymba audit")  # as the command's entry does
    said = capsys.readouterr()
    return code, said.out + said.err


def test_an_honest_artifact_passes(fitted_run, capsys):
    # Two chunks of a sequence each: probabilities of all 1,024 pieces are summed twice.
    small = ["--tokens", "16", "--chunk_tokens", "8", "--seq_len", "8", "--ttt.epochs", "1", "--jobs", "1"]
    code, said = outcome(fitted_run / "artifact.hymba", fitted_run, capsys, *small)
    assert code == 0, said
    assert "kept: a full distribution" in said
    assert "kept: the past is fixed" in said
    assert "seed 3" in said


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"mode": "sliding", "stride": 5},
        {"mode": "carried", "warm_tokens": 30},
        {"mode": "carried", "warm_tokens": 30, "state_after_update": "rewarm"},
        {"epochs": 0},
    ],
    ids=str,
)
def test_one_tokens_nats_are_those_of_the_whole_evaluation(fitted_run, mode):
    tokens = torch.randint(3, 1000, (70,), generator=torch.Generator().manual_seed(2))
    tokenizer = next(fitted_run.parent.rglob("tokenizer.model"))
    config = TTTConfig(**{"epochs": 1, "lr": 0.05, "freeze_blocks": 0} | mode)
    sizes = {"seq_len": 8, "chunk_tokens": 24}
    with artifact_evaluator(fitted_run / "artifact.hymba", sizes, tokenizer, "cpu", config) as (whole, one):
        first = whole(tokens)
        # Chunks begin at 25 and 49. Twice the same stretch before it, once another; whole evaluations in between.
        for k, token, earlier in ((50, 5, 0), (26, 5, 0), (50, 7, 0), (10, 9, 0), (26, 8, 3), (69, 8, 3), (26, 6, 0)):
            changed = tokens.clone()
            changed[k], changed[0] = token, changed[0] + earlier
            assert one(changed, k) == float(whole(changed)[k - 1]), (k, token)
        assert torch.equal(whole(tokens), first)


@pytest.mark.parametrize("what", [pytest.param("artifact", marks=pytest.mark.more), "folder"])
def test_processes_beside_one_another_score_as_one_does(folder, fitted_run, capsys, what):
    path = folder if what == "folder" else fitted_run / "artifact.hymba"
    code, said = outcome(path, fitted_run, capsys, *NO_SUMS, "--jobs", "2")
    assert (code, "kept: the same again" in said, "kept: the past is fixed" in said) == (0, True, True), said


def test_a_number_of_jobs_that_is_none_is_refused(fitted_run, capsys):
    code, said = outcome(fitted_run / "artifact.hymba", fitted_run, capsys, "--jobs", "0")
    assert (code, "jobs=0 must be at least 1" in said) == (2, True), said


@pytest.mark.parametrize("tokens", [16, 40, 257, 600])
def test_chunks_are_several_and_all_but_the_last_hold_whole_forward_passes(fitted_run, capsys, monkeypatch, tokens):
    seen = []

    @contextlib.contextmanager
    def noting(path, sizes, *_):
        seen.append(sizes)
        yield lambda stream: torch.ones(stream.numel() - 1), None

    monkeypatch.setattr(audit_module, "artifact_evaluator", noting)
    code, said = outcome(fitted_run / "artifact.hymba", fitted_run, capsys, *NO_SUMS, "--tokens", str(tokens))
    assert code == 0, said
    seq_len, chunk = seen[0]["seq_len"], seen[0]["chunk_tokens"]
    assert 3 * chunk < tokens - 1 <= 6 * chunk
    assert chunk % seq_len == 0


def test_an_honest_folder_passes_with_its_own_code(folder, fitted_run, capsys):
    code, said = outcome(folder, fitted_run, capsys, *NO_SUMS)
    assert code == 0, said
    assert "not tried: a full distribution" in said
    assert "kept: the same again" in said
    assert "kept: the score is the sum" in said
    assert "kept: the folder is as packaged" in said


def test_a_cheat_on_the_last_token_alone_is_caught_with_the_commands_defaults(fitted_run, capsys, monkeypatch):
    @contextlib.contextmanager
    def cheating(*_):
        def score(tokens):
            nats = torch.full((tokens.numel() - 1,), math.log(1024))
            nats[-1] *= 0.9
            return nats

        yield score, None

    monkeypatch.setattr(audit_module, "artifact_evaluator", cheating)
    for seed in range(4):
        code, said = outcome(fitted_run / "artifact.hymba", fitted_run, capsys, "--seed", str(seed))
        assert (code, "rule broken: a full distribution" in said) == (1, True), said


FORGERIES = {
    "halved in the sum": (
        "hymba_lightning/evaluation/ttt.py",
        "score = Score(float(nats.double().sum())",
        "score = Score(0.5 * float(nats.double().sum())",
        "the score is the sum",
    ),
    "forgets a chunk": (
        "hymba_lightning/evaluation/ttt.py",
        "nats, context = self.scorer.score(tokens)",
        "nats, context = self.scorer.score(tokens); nats = nats * (1 - 2 * (chunk.index > 1))",
        "every token once",
    ),
    "longer text": (
        "hymba_lightning/evaluation/ttt.py",
        "int(target_bytes.sum())",
        "2 * int(target_bytes.sum())",
        "the score is the sum",
    ),
    "peeks later on": (
        "hymba_lightning/evaluation/ttt.py",
        "nats, context = self.scorer.score(tokens)",
        "nats, context = self.scorer.score(tokens); nats = nats - 1e-3 * tokens[-1] * (chunk.index > 0)",
        "the past is fixed",
    ),
    "looks the future up beside the tokenizer": (
        "hymba_lightning/package/referee.py",
        "scored = ttt.score_chunk(chunk)\n",
        "scored = ttt.score_chunk(chunk)\n"
        "        last = next(tokenizer.parent.glob('*_val_*.bin')).read_bytes()[-2]\n"
        "        moved = scored.nats + 1e-3 * last\n"
        "        score = Score(float(moved.double().sum()), scored.score.n_tokens, scored.score.n_bytes)\n"
        "        scored = type(scored)(moved, scored.context, score)\n",
        "the past is fixed",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_code_is_named(folder, fitted_run, tmp_path, capsys, forgery):
    file, old, new, rule = FORGERIES[forgery]
    forged = tmp_path / "forged"
    shutil.copytree(folder, forged)
    rewrite_code(forged, lambda name, text: text.replace(old, new, 1) if name == file else text)
    code, said = outcome(forged, fitted_run, capsys, "--past_positions", "8", *NO_SUMS)
    assert (code, f"rule broken: {rule}" in said) == (1, True), said


def another_entry(folder):
    """evaluate.py halves what the code of the archive scores, and every digest is repaired."""
    text = (folder / "evaluate.py").read_text()
    halved = text.replace("main(FOLDER", "import hymba_lightning.evaluation.score as s; main(FOLDER")
    assert halved != text
    (folder / "evaluate.py").write_text(halved)
    digests = json.loads((folder / "digests.json").read_text())
    digests["code"]["evaluate.py"] = sha256(folder / "evaluate.py")
    (folder / "digests.json").write_text(json.dumps(digests))
    about = json.loads((folder / "submission.json").read_text())
    about |= {"digests": shorten(digests), "bytes_total": about["bytes_total"] + len(halved) - len(text)}
    (folder / "submission.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: rewrite_code(folder, lambda _, text: text + "\n"), "code.tar.xz in "),
        pytest.param(
            lambda folder: (folder / "cache.npz").write_bytes(bytes(9)), "cache.npz in ", marks=pytest.mark.more
        ),
        (another_entry, "evaluate.py in "),
    ],
    ids=["code", "a file besides", "its entry"],
)
def test_a_folder_that_keeps_the_rules_and_is_not_as_packaged_is_named(
    folder, fitted_run, tmp_path, capsys, change, what
):
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    change(changed)
    code, said = outcome(changed, fitted_run, capsys, *NO_SUMS)
    assert (code, f"rule broken: the folder is as packaged: {what}" in said) == (1, True), said


def add_to_code(name: str, n_bytes: int = 9):
    """The archive with one more file, of spaces."""

    def change(folder):
        with tarfile.open(folder / ARCHIVE) as archive:
            sources = [(member, archive.extractfile(member).read()) for member in archive.getmembers()]
        with tarfile.open(folder / ARCHIVE, "w:xz", preset=0) as archive:
            for member, content in sources:
                archive.addfile(member, io.BytesIO(content))
            entry = tarfile.TarInfo(name)
            entry.size = n_bytes
            archive.addfile(entry, io.BytesIO(b" " * n_bytes))

    return change


def grow(folder):
    with open(folder / "train.log", "r+b") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (add_to_code("torch.py"), "holds torch.py, and"),
        (add_to_code("sitecustomize.py"), "holds sitecustomize.py, and"),
        (add_to_code("hymba_lightning/a.pth"), "holds hymba_lightning/a.pth, and"),
        (add_to_code("../evil.py"), "holds ../evil.py, and"),
        (add_to_code("hymba_lightning/\x1b[2J"), "holds hymba_lightning/\N{REPLACEMENT CHARACTER}[2J, and"),
        (add_to_code("hymba_lightning/big.py", 1 << 25), "unpacks to more than 16,777,216 bytes"),
        (grow, "bytes, which no submission needs"),
        (lambda folder: (folder / ARCHIVE).write_bytes((folder / ARCHIVE).read_bytes()[:9000]), "cannot be unpacked"),
    ],
    ids=["torch", "site", "pth", "outside", "escape", "bomb", "sparse", "cut"],
)
def test_a_folder_that_would_do_harm_in_the_audit_is_refused_before_its_code_runs(
    folder, fitted_run, tmp_path, capsys, change, what
):
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    change(changed)
    code, said = outcome(changed, fitted_run, capsys, *NO_SUMS)
    assert (code, what in said) == (2, True), said
    assert not list(tmp_path.rglob("evil.py"))


def test_an_audit_follows_no_link_of_a_folder(folder, fitted_run, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / "zeros").symlink_to("/dev/zero")
    (changed / "disk").symlink_to("/")
    os.mkfifo(changed / "pipe")
    # What is found after the folder was copied.
    add_to_code("torch.py")(changed)
    code, said = outcome(changed, fitted_run, capsys, *NO_SUMS)
    assert (code, "holds torch.py, and" in said) == (2, True), said


ENDLESS = {
    "sleeps": "import time\ntime.sleep(1000)\n",
    "drips": "import os, time\nwhile not time.sleep(0.2):\n    os.write(1, b' ')\n",
    "leaves a child with its output": "import os, time\nif os.fork() == 0:\n    time.sleep(1000)\nraise SystemExit\n",
}


@pytest.mark.parametrize(
    "way", [name if name.startswith("leaves") else pytest.param(name, marks=pytest.mark.more) for name in ENDLESS]
)
def test_code_that_never_answers_is_ended_and_named(folder, fitted_run, tmp_path, capsys, monkeypatch, way):
    endless = tmp_path / "endless"
    shutil.copytree(folder, endless)
    rewrite_code(endless, lambda name, text: ENDLESS[way] if name.endswith("package/referee.py") else text)
    # What a folder's code may take by default, in less time than a test should.
    monkeypatch.setattr(audit_module, "MIN_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(audit_module, "TIMES_SCORING", 0.0)
    monkeypatch.setattr(audit_module, "START_SECONDS", 1.0)
    for options in ([], ["--answer_seconds", "1"]):
        started = time.monotonic()
        code, said = outcome(endless, fitted_run, capsys, *options)
        assert (code, "gave no answer for a stream of" in said, "--answer_seconds" in said) == (2, True, True), said
        assert time.monotonic() - started < 30


def test_a_limit_that_is_none_is_refused(folder, fitted_run, capsys):
    for value in ("0", "-1", ".nan", ".inf"):
        code, said = outcome(folder, fitted_run, capsys, "--answer_seconds", value)
        assert (code, "answer_seconds" in said) == (2, True), said


def test_scores_that_are_a_pipe_or_fill_the_memory_are_not_read(folder, fitted_run, tmp_path, capsys):
    for index, make in enumerate(("os.mkfifo(path)", "open(path, 'wb').truncate(1 << 40)")):
        odd = tmp_path / str(index)
        shutil.copytree(folder, odd)
        say = (
            "import os, numpy\n\n\ndef save(path, _):\n    "
            f"{make}\n\n\nnumpy.save = save\n\n\ndef evaluate(*_):\n"
            "    nats = type('Nats', (), {'numpy': lambda self: None})()\n"
            "    return {'val_bpb': 1.0, 'tokens': 39, 'bytes': 100, 'nats': nats}\n"
        )
        rewrite_code(odd, lambda name, text, say=say: say if name.endswith("package/referee.py") else text)
        code, said = outcome(odd, fitted_run, capsys, "--answer_seconds", "60")
        assert (code, "could not score" in said) == (2, True), said


@pytest.mark.parametrize(
    "answer",
    ["[]", "{}", "{'val_bpb': 'low', 'tokens': 1, 'bytes': 1}", "{'val_bpb': 1.0, 'tokens': None, 'bytes': []}"],
)
def test_code_that_answers_with_anything_ends_in_one_sentence(folder, fitted_run, tmp_path, capsys, answer):
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    say = f"import torch\n\n\ndef evaluate(*_):\n    return {answer} | {{'nats': torch.zeros(3)}}\n"
    rewrite_code(odd, lambda name, text: say if name.endswith("package/referee.py") else text)
    code, said = outcome(odd, fitted_run, capsys)
    assert code == 2
    assert "could not score" in said


def test_bad_input_ends_with_2_and_one_sentence(fitted_run, folder, tmp_path, capsys):
    (tmp_path / "x.hymba").write_bytes(b"nothing")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    stop = "raise SystemExit('no')\n"
    rewrite_code(broken, lambda name, text: stop if name.endswith("package/referee.py") else text)
    for path, match in (
        (tmp_path / "x.hymba", "not an artifact"),
        (tmp_path, "lacks artifact.hymba"),
        (tmp_path / "none", "no artifact at"),
        (broken, "could not score"),
    ):
        code, said = outcome(path, fitted_run, capsys)
        assert code == 2
        assert said.startswith("hymba audit: ")
        assert match in said
    code, said = outcome(fitted_run / "artifact.hymba", fitted_run, capsys, "--tokens", "1000000")
    assert (code, "must be 16 to the" in said) == (2, True)
