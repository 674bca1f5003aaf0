"""manifest.json: what `prepare` wrote into a folder. A folder without one holds shards from elsewhere, or none yet."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256
from hymba_lightning.files import write_atomic

MANIFEST_FILE = "manifest.json"
FORMAT = "hymba-tokens"
VERSION = 1
SPLITS = ("train", "val")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, None where there is none.

    Raises:
        ValueError: The file is damaged or of an unknown version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no manifest of prepared data ({error}); prepare the data again") from error
    if not known:
        raise ValueError(f"{path} has an unknown format or version; prepare the data again with this version")
    return manifest


def check_manifest(folder: Path, shards: Sequence[Path], tokenizer: Path) -> None:
    """Check the files in use against the folder's manifest, if it has one and they belong to it.

    Raises:
        ValueError: A shard's size is not the manifest's, a listed shard of the same split is missing, or the tokenizer
            is not the one that made the shards.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    listed = {shard["file"]: shard for split in manifest["splits"].values() for shard in split["shards"]}
    used = {path.name for path in shards if path.resolve().parent == folder.resolve() and path.name in listed}
    for path in shards:
        if path.name in used and path.stat().st_size != listed[path.name]["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {listed[path.name]['bytes']}; "
                "prepare the data again"
            )
    for split, content in manifest["splits"].items():
        names = {shard["file"] for shard in content["shards"]}
        missing = sorted(name for name in names - used if not (folder / name).is_file())
        if names & used and missing:
            raise ValueError(f"{folder / missing[0]} is missing from the {split} data; prepare the data again")
    if used and file_sha256(tokenizer) != manifest["tokenizer"]["sha256"]:
        raise ValueError(
            f"{tokenizer} is not the tokenizer that made the shards in {folder}; "
            f"use {folder / manifest['tokenizer']['file']}, or prepare the data again with this one"
        )


def is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether all files that the manifest lists are there, in the right size."""
    sizes = {
        folder / shard["file"]: shard["bytes"] for split in manifest["splits"].values() for shard in split["shards"]
    }
    model = folder / manifest["tokenizer"]["file"]
    whole = all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    return whole and model.is_file() and file_sha256(model) == manifest["tokenizer"]["sha256"]


def check_may_write(
    folder: Path, name: str, existing: dict[str, Any] | None, arguments: dict[str, Any], overwrite: bool
) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out={folder} is a file; name a folder")
    listed = _listed_files(existing)
    foreign = sorted(
        path.name for split in SPLITS for path in folder.glob(f"*_{split}_*.bin")
        if path.name not in listed and not path.name.startswith(tuple(f"{name}_{split}_" for split in SPLITS))
    )  # fmt: skip
    if foreign:
        raise FileExistsError(f"out={folder} holds shards of other data ({foreign[0]}); choose another folder")
    if overwrite:
        return
    if existing is not None:
        changed = sorted(key for key, value in arguments.items() if existing["arguments"].get(key) != value)
        what = f"made with another {', '.join(changed)}" if changed else "of which files are damaged or missing"
        raise FileExistsError(f"out={folder} holds data {what}; choose another folder, or pass overwrite to replace it")
    if any(folder.glob(f"{name}_*.bin")) or (folder / TOKENIZER_FILE).exists():
        raise FileExistsError(
            f"out={folder} holds data without a manifest; choose another folder, or pass overwrite to replace it"
        )


def install(work: Path, folder: Path, name: str, existing: dict[str, Any] | None, manifest: dict[str, Any]) -> None:
    """Move the finished files into place. The old manifest goes first; the new one, last, says that all is there."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    new = _listed_files(manifest)
    stale = _listed_files(existing) | {path.name for split in SPLITS for path in folder.glob(f"{name}_{split}_*.bin")}
    for file in sorted(stale - new):
        (folder / file).unlink(missing_ok=True)
    for file in sorted(new):
        os.replace(work / file, folder / file)
    write_atomic(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")


def _listed_files(manifest: dict[str, Any] | None) -> set[str]:
    if manifest is None:
        return set()
    shards = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    return shards | {manifest["tokenizer"]["file"]}
