"""`hymba study`: comparisons over many runs, and measurements of parts. Nothing heavy is imported to list them.

A study is a module of this package with `main(args)`, and a line in `STUDIES`.
"""

from __future__ import annotations

import importlib
import sys

from hymba_lightning import usage

# Name → (module, what it tells).
STUDIES = {
    "ablation": ("ablation", "variants of a config over seeds, queued on devices; differences paired by seed"),
    "seeds": ("seeds", "one config over seeds: mean and spread of every stage, and whether it beats a baseline"),
    "context": ("context_scaling", "the same steps at several sequence lengths: milliseconds and bits per byte"),
    "ttt": ("ttt", "ways to score and adapt one artifact: bits per byte against seconds"),
    "quantization": ("quantization", "every scheme on one checkpoint: bytes against loss"),
    "ranks": (
        "rank_scaling",
        "the training step on 1, 2, 4 … GPUs of one host: efficiency, what sharing gradients costs",
    ),
    "start": ("start_time", "seconds from a fit's start to its first counted step, with cold and with warm caches"),
    "step": ("step_time", "one training step and its parts, by sequence length"),
    "ops": ("op_times", "each op's backends beside other packages'"),
    "reference": ("reference_step", "our training step beside the reference's own script"),
    "generation": ("long_generation", "time and memory of a new token at growing contexts"),
    "released": ("official_cost", "memory and speed of the released Hymba models' shape, with random weights"),
    "kernels": ("kernels", "the Triton kernels: right and how fast on this GPU, or what they take, without one"),
    "prepare": ("prepare_rate", "the rate of `hymba prepare` beside SentencePiece alone, on the same texts and cores"),
    "fuzz": ("fuzz", "damaged and forged files of every format: refused, or read rightly?"),
}
# What other tools, and the scripts of earlier versions, call them.
OTHER_NAMES = {
    "ablate": "ablation",
    "sweep": "ablation",
    "bench_step": "step",
    "scaling": "ranks",
    "ddp": "ranks",
    "bench_ops": "ops",
    "bench_reference": "reference",
    "bench_generation": "generation",
    "bench_prepare": "prepare",
    "sample": "generation",
    "official": "released",
    "check_gpu_kernels": "kernels",
    "kernel_resources": "kernels",
}


def overview() -> str:
    """What `hymba study` prints."""
    width = max(map(len, STUDIES)) + 2
    lines = "\n".join(f"  {name:<{width}} {line}" for name, (_, line) in STUDIES.items())
    return f"""usage: hymba study <study> [options]

Compare runs, or measure a part.

studies:
{lines}

`hymba study <study> --help` explains every option. A study of runs that was interrupted goes on where it was.
"""


def run(args: list[str]) -> None:
    """`hymba study <args>`.

    Raises:
        UsageError: there is no such study, or its options cannot be understood.
        SystemExit: with 1 where a run failed or a check did not hold.
    """
    if not args or args[0] in ("-h", "--help"):
        print(overview(), end="")
        return
    usage.check_name("study", args[0], STUDIES, OTHER_NAMES)
    study = importlib.import_module(f"{__name__}.{STUDIES[args[0]][0]}")
    from hymba_lightning.studies.runs import RunFailedError

    try:
        study.main(args[1:])
    except RunFailedError as failed:
        print(failed, file=sys.stderr)
        sys.exit(1)
