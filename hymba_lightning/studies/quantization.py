"""Bytes against loss: one network rounded in many ways, each scored on the same tokens beside the float weights.

The reference's own quantizer in its own file is the peer. A recipe whose result is in results.json is not run again.
"""

from __future__ import annotations

import bz2
import dataclasses
import itertools
import json
import lzma
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from hymba_lightning.checkpoints import weights_sha256
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.files import write_atomic
from hymba_lightning.interop.checkpoint import read_reference_file
from hymba_lightning.interop.quantized import quantized_reference_file
from hymba_lightning.interop.reference import rename
from hymba_lightning.model import Hymba, RuntimeConfig
from hymba_lightning.package.export import check_data, read_source
from hymba_lightning.plots import panels, save_figure
from hymba_lightning.quantization import QuantizationConfig, load_artifact, save_artifact
from hymba_lightning.quantization.artifact import read_parts
from hymba_lightning.quantization.format import boundaries
from hymba_lightning.quantization.frames import compress
from hymba_lightning.quantization.schemes import Calibration, calibrate
from hymba_lightning.studies.arguments import StudyParser
from hymba_lightning.studies.runs import check_subject, read_json
from hymba_lightning.units import bits_per_byte

REFERENCE = "reference's file, int6"
# Bytes of the mixed artifacts, as shares of the reference's file.
SHARES = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
# The lowest clip quantile that is tried: few levels want more of a row's tail cut off.
CLIPS = {5: 0.99, 6: 0.999, 7: 0.999, 8: 0.9995}
COLORS = {"reference": "#c8641e", "rounded": "#9aa3ad", "GPTQ": "#5a6570", "mixed": "#7fb0dd", "mixed, GPTQ": "#2563a8"}


@dataclass(frozen=True)
class Recipe:
    """One way to store the network; `share` of the reference's bytes is the limit of a mixed one."""

    name: str
    series: str
    scheme: QuantizationConfig | None = None
    """None is the reference's own file."""
    bits: int = 6
    share: float | None = None


def recipes() -> list[Recipe]:
    """The reference's file at 6 and 8 bits, each uniform width, and mixed widths at several limits, ± GPTQ."""
    listed = [Recipe(REFERENCE, "reference"), Recipe("reference's file, int8", "reference", bits=8)]
    for bits, clip in CLIPS.items():
        for gptq, series in ((False, "rounded"), (True, "GPTQ")):
            scheme = QuantizationConfig(bits=bits, clip_quantile=clip, gptq=gptq, fit_limit=False)
            listed.append(Recipe(f"int{bits}, {'GPTQ' if gptq else 'rounded'}", series, scheme, bits))
    for share, gptq in itertools.product(SHARES, (False, True)):
        series = "mixed, GPTQ" if gptq else "mixed"
        listed.append(
            Recipe(
                f"{series}, {share:.0%} of the reference's bytes",
                series,
                QuantizationConfig(scheme="mixed", gptq=gptq),
                share=share,
            )
        )
    return listed


@torch.no_grad()
def compare(net: Hymba, other: Hymba, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Bits per byte of both networks on the same tokens (batches as the data module's), and KL(net ‖ other) in nats a
    token, the mean."""
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        log_p, log_q = (each(inputs).float().log_softmax(-1) for each in (net, other))
        nats_p, nats_q = (-each.gather(-1, targets.long()[..., None]).double().sum() for each in (log_p, log_q))
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).double().sum()
        sums += torch.stack(
            [
                nats_p.cpu(),
                nats_q.cpu(),
                divergence.cpu(),
                torch.tensor(float(inputs.numel())),
                batch.target_bytes.double().sum(),
            ]
        )
    nats_p, nats_q, divergence, n_tokens, n_bytes = sums.tolist()
    per_byte = bits_per_byte(1.0, n_bytes)
    return {
        "float_bpb": nats_p * per_byte,
        "bpb": nats_q * per_byte,
        "gap": (nats_q - nats_p) * per_byte,
        "kl": divergence / n_tokens,
        "tokens": n_tokens,
    }


def write(
    recipe: Recipe, weights: dict[str, Tensor], net: Hymba, calibration: Calibration, path: Path, reference_bytes: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Writes the recipe's file at `path`; returns the weights read back, and bytes and seconds."""
    started = time.monotonic()
    if recipe.scheme is None:
        path.write_bytes(quantized_reference_file(weights, recipe.bits))
        written = time.monotonic()
        stored = rename(read_reference_file(path).state_dict)
    else:
        scheme = recipe.scheme
        if recipe.share is not None:
            limit = int(recipe.share * reference_bytes)
            scheme = dataclasses.replace(scheme, limit_bytes=limit)
        save_artifact(
            path,
            weights,
            config=net.config.to_dict(),
            tokenizer={},
            metadata={},
            scheme=scheme,
            hessians=calibration.hessians if scheme.calibrated else None,
            sensitivities=calibration.sensitivities if scheme.scheme == "mixed" else None,
        )
        written = time.monotonic()
        stored = load_artifact(path).state_dict
    return stored, {
        "bytes": path.stat().st_size,
        "export_seconds": written - started,
        "load_seconds": time.monotonic() - written,
    }


def run_study(
    net: Hymba,
    data: HymbaDataModule,
    calibration: Calibration,
    out: Path,
    device: torch.device,
    only: list[str] | None = None,
    coders: bool = True,
) -> str:
    """Runs the recipes that have no result yet. Returns the tables (Markdown), also in out/table.md; with plot.png.

    net: the float weights, on `device`. calibration: Hessians and sensitivities, on the CPU. only: series to run,
    besides the reference's file. coders: also compress every payload by other coders, which takes
    a minute for a large net. The files stay in `out`.
    """
    path = out / "results.json"
    weights = {name: tensor.detach().float().cpu() for name, tensor in net.state_dict().items()}
    subject = {"weights": weights_sha256(weights), "validation text": data.data_digest("val"), "seq_len": data.seq_len}
    check_subject(out, subject | {"tokens": data.val_tokens_limit, "compute_dtype": net.runtime.compute_dtype})
    results: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    other = Hymba(net.config, net.runtime).to(device).eval()
    for index, recipe in enumerate(recipes()):
        if recipe.name in results or (only is not None and recipe.series not in (*only, "reference")):
            continue
        file = out / f"{index:02d}.{'ptz' if recipe.scheme is None else 'hymba'}"
        base = int(results[REFERENCE]["bytes"]) if REFERENCE in results else 0
        stored, result = write(recipe, weights, net, calibration, file, base)
        other.load_state_dict(stored)
        result |= compare(net, other, data.val_dataloader(), device)
        others = {"coders": coder_bytes(file)} if coders and recipe.scheme is not None else {}
        results[recipe.name] = {"series": recipe.series, "file": file.name, **result, **others}
        write_atomic(path, json.dumps(results, indent=1) + "\n")
        print(
            f"{recipe.name}: {result['bytes']:,.0f} bytes, {1000 * result['gap']:+.2f} thousandths of a bit a byte, "
            f"written in {result['export_seconds']:.1f} s",
            flush=True,
        )
    return report(results, out)


def coder_bytes(path: Path) -> dict[str, int]:
    """The payload of an artifact as other coders would make it, in bytes."""
    parts = read_parts(path)
    content, cuts = parts.content, boundaries(parts.counts, parts.table)
    coders: dict[str, Callable[[], int]] = {
        "entropy, order 0": lambda: entropy_bytes(content, cuts),
        "zstd-22 as here": lambda: len(compress(content, 22, cuts)),
        "zstd-22 plain": lambda: len(zstandard.ZstdCompressor(level=22).compress(content)),
        "lzma-9e": lambda: len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
        "bzip2-9": lambda: len(bz2.compress(content, 9)),
    }
    if find_spec("brotli") is not None:
        coders["brotli-11"] = lambda: brotli_bytes(content)
    return {name: count() for name, count in coders.items()}


def brotli_bytes(content: bytes) -> int:
    """Length under brotli's best setting, where that package is installed."""
    import brotli

    return len(brotli.compress(content, quality=11, lgwin=24))


def entropy_bytes(content: bytes, cuts: list[int]) -> int:
    """Entropy bound in bytes: the least that a coder with one fixed table for each stretch between cuts can reach,
    without the tables."""
    flat, bits = np.frombuffer(content, np.uint8), 0.0
    for start, end in itertools.pairwise([0, *cuts, len(content)]):
        counts = np.bincount(flat[start:end], minlength=256)
        share = counts[counts > 0] / max(end - start, 1)
        bits -= (end - start) * float((share * np.log2(share)).sum())
    return math.ceil(bits / 8)


def report(results: dict[str, dict[str, Any]], out: Path) -> str:
    """The tables and the plot."""
    base = results[REFERENCE]
    rows = [
        f"Float weights: {base['float_bpb']:.4f} bits per byte on {base['tokens']:,.0f} tokens.",
        "",
        "| stored as | bytes | to the reference's file | gap, thousandths of a bit a byte | "
        "KL, thousandths of a nat a token | export, s | load, s |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {result['bytes']:,.0f} | {result['bytes'] / base['bytes'] - 1:+.1%} | "
        f"{1000 * result['gap']:+.2f} | {1000 * result['kl']:.3f} | {result['export_seconds']:.1f} | "
        f"{result['load_seconds']:.2f} |"
        for name, result in results.items()
    ]
    with_coders = {name: result["coders"] for name, result in results.items() if "coders" in result}
    if with_coders:
        names = list(dict.fromkeys(itertools.chain(*with_coders.values())))
        rows += [
            "",
            "The same payloads under other coders, bytes:",
            "",
            f"| stored as | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        rows += [
            f"| {name} | " + " | ".join(f"{coders[coder]:,}" if coder in coders else "–" for coder in names) + " |"
            for name, coders in with_coders.items()
        ]
    table = "\n".join(rows) + "\n"
    write_atomic(out / "table.md", table)
    plot(results, out / "plot.png")
    return table


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """KL against bytes, one line a series; further down and to the left is better."""
    figure, (axis,) = panels(8.0, 4.6)
    for series, color in COLORS.items():
        points = sorted(
            (result["bytes"] / 1e6, 1000 * result["kl"]) for result in results.values() if result["series"] == series
        )
        if points:
            style = {"linestyle": "none", "marker": "s", "zorder": 3} if series == "reference" else {"marker": "o"}
            label = "reference's quantizer and file" if series == "reference" else series
            axis.plot(*zip(*points, strict=True), color=color, label=label, markersize=5, **style)
    axis.set_yscale("log")
    axis.grid(True, which="both", color="#e4e7ea", linewidth=0.7)
    axis.set_xlabel("bytes of the file, millions")
    axis.set_ylabel("KL from the float weights,\nthousandths of a nat a token")
    axis.legend(frameon=False)
    save_figure(figure, path)


def main(args: list[str]) -> None:
    """`hymba study quantization`."""
    parser = StudyParser(
        "quantization",
        "Writes the files, results.json, table.md and plot.png. A recipe that has a result is not run again.",
    )
    parser.add_argument("--ckpt", type=str, required=True, help="Checkpoint of `hymba fit`; its averaged weights count")
    parser.add_argument("--data_dir", type=str, required=True, help="Folder of the training and validation shards")
    parser.add_argument("--out", type=str, required=True, help="Folder of the results")
    parser.add_argument(
        "--tokenizer", type=str, help="SentencePiece model (default: tokenizer.model beside the shards)"
    )
    parser.add_argument("--seq_len", type=int, help="Tokens of a sequence (default: as in training)")
    parser.add_argument("--tokens", type=int, default=131_072, help="Validation tokens to score")
    parser.add_argument("--calibration_batches", type=int, default=16, help="Training sequences to calibrate on")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--compute_dtype", type=str, default="float32", help="float32 or bfloat16")
    parser.add_argument("--only", nargs="+", choices=list(COLORS), help="These series (and the reference's file) only")
    parser.add_argument("--coders", type=bool, default=True, help="Compress every payload by other coders too")
    options = parser.read(args)
    device = torch.device(options.device)
    runtime = RuntimeConfig(compute_dtype=options.compute_dtype)
    source = read_source(Path(options.ckpt), options.tokenizer, runtime, device)
    seq_len = options.seq_len or source.metadata.get("seq_len") or 32768
    data = HymbaDataModule(
        options.data_dir, options.tokenizer, seq_len=seq_len, micro_batch_size=1, val_tokens_limit=options.tokens
    )
    check_data(source, data)
    started = time.monotonic()
    batches = [batch.inputs.to(device) for batch in data.calibration_batches(options.calibration_batches)]
    calibration = calibrate(source.net, QuantizationConfig(scheme="mixed", gptq=True), batches).cpu()
    print(
        f"calibrated on {len(batches)} sequences of {seq_len} tokens in {time.monotonic() - started:.1f} s", flush=True
    )
    print(run_study(source.net, data, calibration, Path(options.out), device, options.only, options.coders))
