"""What ranks are compared by before a run: what makes them one run, and nothing that may differ."""

from pathlib import Path

import pytest
from tiny import tiny_data, tiny_module, tiny_trainer, write_data
from tiny_lightning import run_ranks

from hymba_lightning.training.module import HymbaModule


class Annotated(HymbaModule):
    """A user's module, which keeps what it was given beside the network's options."""

    def __init__(self, scratch: str = "", words: frozenset = frozenset(), probe: object = None, **options):
        super().__init__(**options)
        self.save_hyperparameters("scratch", "words")
        self.hparams["probe"] = probe


def _fit_with_own_options(rank: int, folder: Path) -> None:
    own = {"scratch": f"/scratch/node-{rank}", "words": frozenset({str(rank), "a"}), "probe": lambda: rank}
    plain = tiny_module()
    module = Annotated(**own, net=plain.net.config, optimizer=plain.optimizer_config, runtime=plain.net.runtime)
    trainer = tiny_trainer(folder / str(rank), max_steps=2, devices=2, strategy="ddp", limit_val_batches=0)
    trainer.fit(module, datamodule=tiny_data(folder / "data"))
    assert trainer.global_step == 2


@pytest.mark.ddp
def test_a_users_own_options_may_differ_from_rank_to_rank(tmp_path):
    write_data(tmp_path / "data")
    run_ranks(_fit_with_own_options, tmp_path)
