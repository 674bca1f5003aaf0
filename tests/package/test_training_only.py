"""What only training needs stays out of a submission's code."""

from types import SimpleNamespace

from hymba_lightning import closure
from hymba_lightning.closure import needed_files
from hymba_lightning.package import submission

MIXER = "hymba_lightning.model.mixers.mamba"


def test_loops_for_training_stay_out_of_the_archive_and_of_its_settings():
    packed = {str(path).removeprefix("hymba_lightning/ops/") for path in needed_files(closure.REFEREE, MIXER)}
    for entry in closure.TRAINING_ONLY:
        op, _, name = entry.partition(".")
        folder = closure.ROOT / "ops" / op
        assert (folder / f"{name}.py").is_file()
        assert f"{op}/{name}.py" not in packed
        # What takes its place.
        assert f"{op}/backend_{'blocked' if op == 'sliding_window' else 'torch'}.py" in packed
    assert "sliding_window/loops.py" not in packed
    assert {"selective_scan/loops.py", "causal_conv1d/loops.py"} <= packed
    options = {
        f"model.runtime.{name}_backend": value
        for name, value in {"attention": "numba", "loss": "torch", "mlp": "blocked", "scan": "numba"}.items()
    }
    tested = SimpleNamespace(settings={"seq_len": 1, "chunk_tokens": 1, "ttt": {}})
    assert submission._settings(tested, options)["runtime"] == {
        "attention_backend": "auto",
        "loss_backend": "torch",
        "mlp_backend": "auto",
        "scan_backend": "numba",
    }
