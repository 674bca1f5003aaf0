"""A score of batches one after another, as validation has them; a submission's evaluation does without."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hymba_lightning.data.sequences import Batch
from hymba_lightning.evaluation.score import Score, sum_over_ranks
from hymba_lightning.model import Hymba


@torch.no_grad()
def score_batches(net: Hymba, batches: Iterator[Batch], device: torch.device) -> Score:
    """Scores this rank's batches and adds up over all ranks. Every rank must call it, with however many batches."""
    was_training = net.training
    net.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        if not batch.inputs.numel():
            continue
        nats_BT = net(batch.inputs.to(device), batch.targets.to(device), reduction="none")
        sums += torch.stack(
            [
                nats_BT.double().sum(),
                torch.tensor(float(nats_BT.numel()), device=device).double(),
                batch.target_bytes.to(device).double().sum(),
            ]
        )
    net.train(was_training)
    nats, n_tokens, n_bytes = sum_over_ranks(sums).tolist()
    return Score(nats, int(n_tokens), int(n_bytes))
