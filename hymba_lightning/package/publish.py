"""`hymba publish`: a run's network as a folder that Hugging Face's libraries know, and onto the hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hymba_lightning.claim import LOCK, OWNER, FolderClaim
from hymba_lightning.data.tokenizer import TOKENIZER_FILE
from hymba_lightning.generation.loading import find_tokenizer, load_network
from hymba_lightning.interop.pretrained import (
    CONFIG,
    WEIGHTS,
    PretrainedError,
    push_to_hub,
    read_config,
    save_pretrained,
)
from hymba_lightning.interop.tokenizer import FAST_FILE, TOKENIZER_CONFIG
from hymba_lightning.quantization import is_artifact
from hymba_lightning.report.card import model_card
from hymba_lightning.run.folder import ARTIFACT, RunFolder
from hymba_lightning.run.record import RunRecord

# Where the files are written, inside the folder, until all are there.
BUILDING = ".publishing"
NO_TOKENIZER = "none"


def publish(
    path: str,
    out: str,
    weights: str = "safetensors",
    tokenizer: str | None = None,
    name: str | None = None,
    push_to: str | None = None,
    private: bool = False,
) -> str:
    """Writes config.json, weights, tokenizer and model card; returns where they are.

    Args:
        path: Folder of a run, an artifact, or a checkpoint. Of a run the last checkpoint's averaged weights are taken,
            the artifact's where there is no checkpoint.
        out: Folder to write: a new or empty one, or one that was published before.
        weights: safetensors (float32), artifact (about 6 bits a weight), or both. The artifact is the run's own where
            it has one.
        tokenizer: SentencePiece model or tokenizer.json; by default the one that the run's config.yaml names. none
            leaves it out.
        name: What the model card calls it; by default the folder's name.
        push_to: owner/name on the hub, where the folder is uploaded too; log in with `hf auth login`, or set HF_TOKEN.
        private: Make a new repository of the hub private.

    Raises:
        FileNotFoundError: there is no such run, no weights in it, or no tokenizer.
        ValueError: a file is damaged, or does not fit the others.
        FileExistsError: `out` holds something else.
        FolderInUseError: another process writes to it.
    """
    folder, target = Path(path).expanduser(), Path(out).expanduser()
    _check_target(target)
    artifact = None
    source = folder
    if folder.is_dir():
        run = RunFolder(folder)
        artifact = run / ARTIFACT if (run / ARTIFACT).is_file() else None
        source = run.checkpoint if run.checkpoint.is_file() else run / ARTIFACT
        if not source.is_file():
            raise FileNotFoundError(
                f"{folder} holds no checkpoint and no artifact: give the folder of a run, or a file"
            )
    elif folder.is_file():
        artifact = folder if is_artifact(folder) else None
        folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    net, fingerprint = load_network(source)
    model_file = None if tokenizer == NO_TOKENIZER else find_tokenizer(source, tokenizer, fingerprint)
    card = model_card(name or target.resolve().name, net.config, RunRecord.load(folder), folder)
    with FolderClaim(target, "hymba publish"):
        _check_target(target)
        building = target / BUILDING
        shutil.rmtree(building, ignore_errors=True)
        try:
            save_pretrained(net, building, tokenizer=model_file, weights=weights, artifact=artifact, card=card)
            _install(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        if push_to is None:
            return str(target)
        return push_to_hub(target, push_to, private=private or None)


def _install(building: Path, folder: Path) -> None:
    """Moves what is finished into place, the config last: a folder with one is of one publish."""
    names = {path.name for path in building.iterdir()}
    (folder / CONFIG).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == CONFIG):
        os.replace(building / name, folder / name)
    for name in {WEIGHTS, ARTIFACT, TOKENIZER_FILE, FAST_FILE, TOKENIZER_CONFIG} - names:
        # The weights and the tokenizer of an earlier publish are not these.
        (folder / name).unlink(missing_ok=True)


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--out {folder} is a file: name a folder")
    # A publish that was killed while it moved its files into place left its own folder behind.
    if not folder.is_dir() or (folder / BUILDING).is_dir() or {path.name for path in folder.iterdir()} <= {LOCK, OWNER}:
        return
    try:
        read_config(folder)
    except (FileNotFoundError, PretrainedError):
        raise FileExistsError(
            f"--out {folder} holds something, and no {CONFIG} of an earlier publish: name another folder"
        ) from None
