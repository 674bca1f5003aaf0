"""manifest.json: what `prepare` wrote into a folder. A folder without one holds shards from elsewhere, or none yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_lightning.data.tokenizer import file_sha256

MANIFEST_FILE = "manifest.json"
FORMAT = "hymba-tokens"
VERSION = 1


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
    used = {path.name for path in shards if path.parent == folder and path.name in listed}
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
