"""AdamW for everything (arXiv:1711.05101): the baseline."""

from __future__ import annotations

from hymba_lightning.training.optim import HymbaOptimizer


class Optimizer(HymbaOptimizer):
    """Every group by `torch.optim.AdamW`; only matrices and, under `embed_decay`, the token table decay."""

    takes = ()
    matrix_lr = 0.003
