"""torch.compile, whose caches keep all of a network's training step from one process to the next."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._functorch.config
import torch._inductor.config


def compiled(function: Callable[..., Any], *, dynamic: bool | None) -> Any:
    """`function`, compiled at its first call, as torch.compile(function, dynamic=dynamic) does.

    By default torch keeps no joint graph of forward and backward that has an autograd.Function in it, as ours do: every
    process would derive, cut and lower it anew. A Function's two bodies are part of a graph's key, so that none is
    taken for another's.
    """
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # The gradient formulas of custom operators are not: a changed one would meet the graph of the one before.
    tag = torch.compiler.config.cache_key_tag
    if _sources() not in tag:
        torch.compiler.config.cache_key_tag = f"{tag} {_sources()}".strip()
    # Not at the top: torch's compiler takes its time to import.
    from hymba_lightning.ops.joined_gradients import JoinedGradients

    if torch._inductor.config.post_grad_custom_post_pass is None:
        torch._inductor.config.post_grad_custom_post_pass = JoinedGradients()
    return torch.compile(function, dynamic=dynamic)


@functools.cache
def _sources() -> str:
    """SHA-256 of the sources that may hold operators: a mixer can bring its own."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("model", "ops"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"hymba-{digest.hexdigest()[:16]}"
