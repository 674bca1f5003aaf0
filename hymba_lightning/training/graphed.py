"""Forward and backward of the training step as a CUDA graph, under Lightning's automatic optimization.

`training_step` replays the graph and so has made the gradients when it returns. Lightning then calls `zero_grad`, which
therefore must not clear them, and `backward`, which only has to share them among the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hymba_lightning.model.gradients import Gradients


def uses_cuda_graph(obstacle: str | None, wanted: bool | None, compiled: bool) -> bool:
    """Whether a step is recorded: as `wanted` says, or, where that is None, if it is compiled and has no `obstacle`.

    Raises:
        ValueError: a graph is wanted where there can be none.
    """
    if wanted and obstacle:
        raise ValueError(f"model.cuda_graph is true, but {obstacle}: leave it at null")
    return obstacle is None and (compiled if wanted is None else wanted)


def start_gradients(
    optimizers: Iterable[Optimizer], forward: Callable[..., Tensor], parameters: list[Tensor]
) -> Gradients:
    """The gradients of a run, cleared after every step of its optimizers; recorded on a GPU only."""
    gradients = Gradients(forward, parameters, record=parameters[0].is_cuda)
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: gradients.clear())
    return gradients


def average_over_ranks(sums: list[Tensor]) -> None:
    """The mean over the ranks of the process group, where there is one, in place."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for flat in sums:
            dist.all_reduce(flat)
            flat.div_(dist.get_world_size())
