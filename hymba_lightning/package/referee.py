"""Scores the artifact of a submission's folder: what the folder's evaluate.py runs. Needs neither Lightning nor this
package's training code; copied into the folder with everything that it imports."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hymba_lightning.data.shards import find_shards
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.token_stream import TokenStream, chunk_at, n_chunks
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.evaluation.score import Score, world
from hymba_lightning.evaluation.ttt import ScoreFirstTTT
from hymba_lightning.model import RuntimeConfig
from hymba_lightning.package.digests import ARTIFACT, RESULT, SETTINGS, verify_count, verify_data, verify_score
from hymba_lightning.quantization.artifact import load_artifact


def evaluate(folder: Path, data_dir: Path, tokenizer: Path, device: torch.device) -> dict[str, Any]:
    """Scores the validation shards in `data_dir` chunk by chunk, with test-time training in between.

    Raises:
        ValueError: the tokenizer is not the one the artifact was made for, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    started = time.monotonic()
    settings = json.loads((folder / SETTINGS).read_bytes())
    artifact = load_artifact(folder / ARTIFACT)
    token_bytes = TokenBytes.from_model(tokenizer)
    if file_sha256(tokenizer) != artifact.tokenizer["sha256"]:
        raise ValueError(f"{tokenizer} is not the tokenizer this artifact was made for")
    net = artifact.network(RuntimeConfig(**settings["runtime"]))
    limit = settings["val_tokens_limit"]
    stream = TokenStream(
        find_shards(settings["val_files"], data_dir), token_bytes.vocab_size, None if limit is None else limit + 1
    )
    ttt = ScoreFirstTTT(net.to(device), settings["seq_len"], TTTConfig(**settings["ttt"]), stream=stream)
    total, nats = Score(0.0, 0, 0), []
    count = n_chunks(stream, settings["chunk_tokens"])
    for index in range(count):
        chunk = chunk_at(stream, token_bytes, settings["chunk_tokens"], index)
        scored = ttt.score_chunk(chunk)
        total += scored.score
        nats.append(scored.nats.cpu())
        ttt.adapt_chunk(chunk)
        if world()[0] == 0:
            print(f"chunk {index + 1} of {count}: val_bpb {total.bpb:.6f}", flush=True)
    return {
        "val_bpb": total.bpb,
        "val_loss": total.loss,
        "tokens": total.n_tokens,
        "bytes": total.n_bytes,
        "nats": torch.cat(nats),
        "seconds": time.monotonic() - started,
        "world_size": world()[1],
        "device": str(device),
        "modules": sorted(
            str(module.__file__) for name, module in sys.modules.items() if name.partition(".")[0] == "hymba_lightning"
        ),
    }


def main(folder: Path, digests: dict[str, Any]) -> None:
    """The command line of evaluate.py; under torchrun one process per device. `digests`: see package/digests.py.

    Raises:
        DigestError: the data are not those of the recorded score, or the score is not the one that is claimed.
        What `evaluate` raises.
    """
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Score the artifact of this folder.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the validation shards")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: tokenizer.model with the data)")
    parser.add_argument("--out", type=Path, default=Path(RESULT), help="where the result is written, as JSON")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="most bits per byte by which the score may differ from the claim"
    )
    args = parser.parse_args()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    tokenizer = args.tokenizer or args.data / "tokenizer.model"
    val_files = json.loads((folder / SETTINGS).read_bytes())["val_files"]
    verify_data(digests, tokenizer, find_shards(val_files, args.data))
    result = evaluate(folder, args.data, tokenizer, device)
    del result["nats"]  # one for each token, which is for `hymba audit`
    verify_count(digests, result["tokens"], result["bytes"])
    if world()[0] == 0:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result))
        verify_score(folder, result["val_bpb"], args.tolerance)
    if distributed:
        dist.destroy_process_group()
