"""Which way of evaluating and adapting gives most per second: one artifact, one stream, a list of recipes.

Every recipe starts from the artifact's dequantized weights. A recipe whose result is in results.json is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hymba_lightning.checkpoints import check_tokenizer
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.token_stream import Chunk, chunk_at, n_chunks
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.errors import UserError
from hymba_lightning.evaluation import Score, ScoreFirstTTT, TTTConfig
from hymba_lightning.files import write_atomic
from hymba_lightning.model import Hymba, RuntimeConfig
from hymba_lightning.options import read_settings
from hymba_lightning.plots import panels, save_figure
from hymba_lightning.quantization import load_artifact
from hymba_lightning.studies.arguments import StudyParser
from hymba_lightning.studies.runs import check_subject, read_json
from hymba_lightning.studies.variants import SHIPPED

EXAMPLE = "recipes: {cold: {epochs: 0}}"


@dataclass(frozen=True)
class TTTStudy:
    """Recipes by name: fields of TTTConfig, and chunk_tokens. `common` holds for all of them."""

    baseline: str
    recipes: dict[str, dict[str, Any]]
    common: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_yaml(cls, path: Path) -> TTTStudy:
        """Reads a study. Raises ValueError naming the file and what is wrong with it."""
        try:
            study = cls(**read_settings(str(path), "", SHIPPED, EXAMPLE)[1])
            for name, values in [("common", study.common), ("recipes", study.recipes), *study.recipes.items()]:
                if not isinstance(values, dict):
                    raise ValueError(f"{name} is {values!r}; names with values are needed, or {{}}")
            for name in study.recipes:
                study.settings(name)
        except UserError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no study of recipes: {error}") from error
        if study.baseline not in study.recipes:
            raise ValueError(f"{path}: baseline {study.baseline!r} is not among the recipes {sorted(study.recipes)}")
        return study

    def settings(self, name: str) -> tuple[TTTConfig, int | None]:
        """A recipe's config and its chunk_tokens (None: the data's)."""
        values = self.common | self.recipes[name]
        chunk_tokens = values.pop("chunk_tokens", None)
        if chunk_tokens is not None and (type(chunk_tokens) is not int or chunk_tokens < 1):
            raise ValueError(f"chunk_tokens of {name} is {chunk_tokens!r}; a whole number of at least 1 is needed")
        return TTTConfig(**values), chunk_tokens


def run_recipe(net: Hymba, data: HymbaDataModule, config: TTTConfig, chunk_tokens: int) -> dict[str, Any]:
    """Scores the whole validation stream; `net` is changed. Returns bpb, seconds, epochs and the chunks' bpb."""
    stream, token_bytes = data.val_stream(), data.token_bytes
    start = time.monotonic()
    ttt = ScoreFirstTTT(net, data.seq_len, config, stream=stream)
    scores: list[Score] = []
    for index in range(n_chunks(stream, chunk_tokens)):
        chunk = chunk_at(stream, token_bytes, chunk_tokens, index)
        scores.append(ttt.score_chunk(chunk).score)
        ttt.adapt_chunk(chunk)
    total = scores[0]
    for score in scores[1:]:
        total = total + score
    return {
        "bpb": total.bpb,
        "loss": total.loss,
        "tokens": total.n_tokens,
        "seconds": time.monotonic() - start,
        "epochs_done": ttt.epochs_done,
        "chunk_bpb": [score.bpb for score in scores if score.n_tokens],
    }


def warm_up(net: Hymba, data: HymbaDataModule, config: TTTConfig, chunk_tokens: int) -> None:
    """One update and one scoring pass of the recipe's shapes, so that compiling kernels counts in no recipe."""
    n = min(chunk_tokens, max(config.batch_seqs, config.score_batch_seqs) * data.seq_len, len(data.val_stream()) - 1)
    tokens = data.val_stream()[: n + 1]
    no_bytes = torch.zeros(n, dtype=torch.int16)
    ttt = ScoreFirstTTT(net, data.seq_len, dataclasses.replace(config, epochs=min(config.epochs, 1)))
    for index in (0, 1):
        chunk = Chunk(index, 3, tokens, no_bytes)
        tokens = torch.cat([tokens[-1:], tokens[1:]])
        ttt.score_chunk(chunk)
        ttt.adapt_chunk(chunk)


def run_study(
    study: TTTStudy,
    artifact: Path,
    data: HymbaDataModule,
    out: Path,
    *,
    device: str = "cpu",
    runtime: RuntimeConfig | None = None,
    only: list[str] | None = None,
) -> str:
    """Runs the recipes that have no result yet. Returns the table (Markdown), also in out/table.md, with plot.png.

    Raises ValueError where the artifact is of another tokenizer, or a result in `out` of another artifact, text, length
    of sequence or device, or of a recipe that was another then."""
    unknown = [name for name in only or () if name not in study.recipes]
    if unknown:
        raise ValueError(f"no such recipes: {unknown}; choose from {list(study.recipes)}")
    where = torch.device(device)
    recorded = load_artifact(artifact).tokenizer.get("sha256")
    if recorded:
        own, option = data.tokenizer_fingerprint(), "--tokenizer or --data_dir"
        check_tokenizer(artifact, recorded, own, data.tokenizer, option)
    data.setup("validate")
    subject: dict[str, Any] = {"artifact": file_sha256(artifact), "validation text": data.data_digest("val")}
    subject |= {"seq_len": data.seq_len, "limit_tokens": data.val_tokens_limit, "device": device}
    check_subject(out, subject | {"compute_dtype": (runtime or RuntimeConfig()).compute_dtype})
    path = out / "results.json"
    results: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    for name in study.recipes:
        _check_settings(name, results.get(name, {}).get("settings", {}), _settings(study, name, data), path)
    for name in study.recipes:
        if name in results or (only is not None and name not in (*only, study.baseline)):
            continue
        config, own_chunk = study.settings(name)
        chunk_tokens = own_chunk or data.ttt_chunk_tokens
        warm_up(load_artifact(artifact).network(runtime).to(where), data, config, chunk_tokens)
        result = run_recipe(load_artifact(artifact).network(runtime).to(where), data, config, chunk_tokens)
        results[name] = result | {"settings": _settings(study, name, data)}
        write_atomic(path, json.dumps(results, indent=1) + "\n")
        print(f"{name}: {result['bpb']:.5f} bpb in {result['seconds']:.1f} s", flush=True)
    return report(study, results, out)


def _settings(study: TTTStudy, name: str, data: HymbaDataModule) -> dict[str, Any]:
    config, own_chunk = study.settings(name)
    return dataclasses.asdict(config) | {"chunk_tokens": own_chunk or data.ttt_chunk_tokens}


def _check_settings(name: str, before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    other = [f"{key} {before[key]}, now {now[key]}" for key in now if key in before and before[key] != now[key]]
    if other:
        raise ValueError(
            f"{path} holds a result of {name} with other settings ({'; '.join(other)}): give the recipe another name, "
            "or another folder"
        )


def report(study: TTTStudy, results: dict[str, dict[str, Any]], out: Path) -> str:
    """The table, best first, and the plot of bits per byte against seconds."""
    base = results[study.baseline]["bpb"]
    rows = [f"| recipe | bpb | to {study.baseline}, thousandths | seconds | settings |", "|---|---|---|---|---|"]
    ordered = sorted((name for name in study.recipes if name in results), key=lambda name: results[name]["bpb"])
    for name in ordered:
        result = results[name]
        settings = ", ".join(f"{key} {value}" for key, value in study.recipes[name].items()) or "defaults"
        change = 1000 * (result["bpb"] - base)
        rows.append(f"| {name} | {result['bpb']:.4f} | {change:+.1f} | {result['seconds']:.1f} | {settings} |")
    table = "\n".join(rows) + "\n"
    write_atomic(out / "table.md", table)
    figure, (axis,) = panels(8.5, 5.0)
    for name in ordered:
        point = results[name]["seconds"], results[name]["bpb"]
        axis.plot(*point, "o", color="#c8641e" if name == study.baseline else "#2563a8")
        axis.annotate(name, point, xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.grid(True, color="#e4e7ea", linewidth=0.8)
    axis.set_xlabel("seconds for the whole stream")
    axis.set_ylabel("bits per byte")
    save_figure(figure, out / "plot.png")
    return table


def main(args: list[str]) -> None:
    """`hymba study ttt`."""
    parser = StudyParser(
        "ttt",
        "A YAML file names the recipes. One that has a result is not run again. Writes table.md, plot.png and "
        "results.json.",
    )
    parser.add_argument(
        "study", type=str, help="YAML file with baseline, recipes, common; or the shipped one: ttt_recipes"
    )
    parser.add_argument("--artifact", type=str, required=True, help="The network")
    parser.add_argument("--data_dir", type=str, required=True, help="Folder of the shards")
    parser.add_argument("--out", type=str, required=True, help="Folder of the results")
    parser.add_argument(
        "--tokenizer", type=str, help="SentencePiece model (default: tokenizer.model beside the shards)"
    )
    parser.add_argument("--val_files", type=str, default="*_val_*.bin", help="Text to choose a recipe on")
    parser.add_argument("--seq_len", type=int, default=32768, help="Tokens of a sequence")
    parser.add_argument("--chunk_tokens", type=int, default=524288, help="Tokens that are scored before an update")
    parser.add_argument("--limit_tokens", type=int, help="Only the first tokens of the stream")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--compute_dtype", type=str, default="float32", help="float32 or bfloat16")
    parser.add_argument("--only", type=str, nargs="+", help="These recipes (and the baseline) only")
    options = parser.read(args)
    path, _ = read_settings(options.study, "", SHIPPED, EXAMPLE)
    data = HymbaDataModule(
        options.data_dir,
        options.tokenizer,
        val_files=options.val_files,
        seq_len=options.seq_len,
        ttt_chunk_tokens=options.chunk_tokens,
        val_tokens_limit=options.limit_tokens,
    )
    print(
        run_study(
            TTTStudy.from_yaml(path),
            Path(options.artifact),
            data,
            Path(options.out),
            device=options.device,
            runtime=RuntimeConfig(compute_dtype=options.compute_dtype),
            only=options.only,
        )
    )
