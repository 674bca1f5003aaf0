"""manifest.json: what `prepare` wrote into a folder, and its installation in one step.

A folder without a manifest holds shards from elsewhere, or none yet. One with a journal is between two data sets: it is
not read until the journal is worked off, by whoever prepares there next.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba_lightning.data.digests import FileDigest, file_digests, remember
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, check_is_there, file_sha256
from hymba_lightning.files import write_atomic

MANIFEST_FILE = "manifest.json"
JOURNAL_FILE = ".install.json"
FORMAT = "hymba-tokens"
VERSION = 1
SPLITS = ("train", "val")
# Where a data set is made, inside its folder: by `prepare`, and by the tasks of a cluster.
WORK_FOLDER, PARTS_FOLDER = ".partial", ".parts"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, None where there is none.

    Raises:
        ValueError: The file is damaged or of an unknown version, or the folder is between two data sets.
    """
    if (folder / JOURNAL_FILE).exists():
        raise ValueError(
            f"the data in {folder} are being replaced, or were when `hymba prepare` ended; wait for it, "
            "or call it again, which finishes that"
        )
    return installed_manifest(folder)


def installed_manifest(folder: Path) -> dict[str, Any] | None:
    """The same, whatever is being installed."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
        if known:
            _check_form(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no manifest of prepared data ({type(error).__name__}: {error}); prepare the data "
            "again, with overwrite"
        ) from error
    if not known:
        raise ValueError(f"{path} has an unknown format or version; prepare the data again with this version")
    return manifest


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it is read back, with the digest that shows a later change of it."""
    plain = json.loads(json.dumps(manifest))
    return {**plain, "sha256": _own_digest(plain)}


def check_manifest(folder: Path, shards: Sequence[Path], tokenizer: Path, *, sample: bool = True) -> None:
    """Check the files in use against the manifests of the folders that they lie in, or are linked into.

    Args:
        folder: The data's.
        shards: Files in use.
        tokenizer: File in use.
        sample: As in `file_digests`.

    Raises:
        ValueError: A shard is not what the manifest says, a listed shard of the same split is missing, or the tokenizer
            is not the one that made the shards.
    """
    places: dict[Path, dict[str, Path]] = {Path(os.path.realpath(folder)): {}}
    for path in shards:
        for place in (Path(os.path.realpath(path.parent), path.name), Path(os.path.realpath(path))):
            places.setdefault(place.parent, {})[place.name] = path
    for place, used in places.items():
        manifest = read_manifest(place)
        if manifest is not None:
            _check_used(place, manifest, used, tokenizer, sample)


def _check_used(folder: Path, manifest: dict[str, Any], used: dict[str, Path], tokenizer: Path, sample: bool) -> None:
    listed = _listed_shards(manifest)
    checked = {name: path for name, path in used.items() if name in listed}
    for name, path in checked.items():
        if path.stat().st_size != listed[name]["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {listed[name]['bytes']}; "
                "prepare the data again, with overwrite, or copy it again"
            )
    for split, content in manifest["splits"].items():
        names = {shard["file"] for shard in content["shards"]}
        missing = sorted(name for name in names - set(checked) if not (folder / name).is_file())
        if names & set(checked) and missing:
            raise ValueError(f"{folder / missing[0]} is missing from the {split} data; prepare the data again")
    for (name, path), digest in zip(checked.items(), file_digests(list(checked.values()), sample=sample), strict=True):
        if digest != listed[name]["sha256"]:
            raise ValueError(
                f"{path} is damaged: its SHA-256 is {digest}, its manifest says {listed[name]['sha256']}; "
                "copy it again, or prepare the data again, with overwrite"
            )
    check_is_there(tokenizer)
    if checked and file_sha256(tokenizer) != manifest["tokenizer"]["sha256"]:
        raise ValueError(
            f"{tokenizer} is not the tokenizer that made the shards in {folder}; "
            f"use {folder / manifest['tokenizer']['file']}, or prepare the data again with this one"
        )


def first_damage(folder: Path, manifest: dict[str, Any]) -> str | None:
    """Says what is wrong with the first file that differs from the manifest; None where all agree with it."""
    listed = _listed_shards(manifest)
    model = manifest["tokenizer"]
    for name in [*listed, model["file"]]:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for name, shard in listed.items():
        if (folder / name).stat().st_size != shard["bytes"]:
            return f"{name} has another size"
    if file_sha256(folder / model["file"]) != model["sha256"]:
        return f"{model['file']} is damaged"
    digests = file_digests([folder / name for name in listed])
    return next(
        (
            f"{name} is damaged"
            for name, digest in zip(listed, digests, strict=True)
            if digest != listed[name]["sha256"]
        ),
        None,
    )


def check_may_write(
    folder: Path, name: str, existing: dict[str, Any] | None, arguments: dict[str, Any], overwrite: bool
) -> None:
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
        changed = sorted(
            key
            for key in existing["arguments"].keys() | arguments.keys()
            if existing["arguments"].get(key) != arguments.get(key)
        )
        what = f"made with another {', '.join(changed)}" if changed else f"of which {first_damage(folder, existing)}"
        raise FileExistsError(f"out={folder} holds data {what}; choose another folder, or pass overwrite to replace it")
    if any(folder.glob(f"{glob.escape(name)}_*.bin")) or (folder / TOKENIZER_FILE).exists():
        raise FileExistsError(
            f"out={folder} holds data without a manifest; choose another folder, or pass overwrite to replace it"
        )


def install(
    work: Path,
    folder: Path,
    name: str,
    manifest: dict[str, Any],
    digests: Mapping[str, FileDigest],
    places: Mapping[str, str] | None = None,
) -> None:
    """Move the finished files into place, as one step to whoever reads or is killed.

    The journal, once written, is the decision: from then on the files are moved, now or by the next `finish_install`.

    Args:
        work: Folder of the files, inside `folder`.
        folder: Where they belong.
        name: Begin of the shards' names; others so named are replaced.
        manifest: As `sealed` makes it.
        digests: Of the shards, by name, to be remembered.
        places: Where files lie in `work` that do not lie in it under their own name.
    """
    journal = {"work": work.name, "name": name, "manifest": manifest, "places": places or {}}
    write_atomic(folder / JOURNAL_FILE, json.dumps(journal))
    finish_install(folder)
    remember(folder, digests)


def finish_install(folder: Path) -> None:
    """Complete what a killed process had decided; nothing happens where none had.

    Raises:
        ValueError: The journal is damaged.
    """
    path = folder / JOURNAL_FILE
    if not path.is_file():
        return
    try:
        journal = json.loads(path.read_bytes())
        work, name, manifest = journal["work"], journal["name"], journal["manifest"]
        places = {file: journal["places"].get(file, file) for file in _listed_files(manifest)}
        _check_form(manifest)
        if any(not re.fullmatch(r"([0-9]+/)?(?!\.)[^/\\\0]+", place) for place in places.values()):
            raise ValueError("no place of ours")
        if work not in (WORK_FOLDER, PARTS_FOLDER) or not re.fullmatch(r"(?!\.)[^/\\\0]+", name):
            raise ValueError("no folder of ours")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, and prepare the data again, with overwrite"
        ) from error
    try:
        old = _listed_files(installed_manifest(folder))
    except ValueError:
        old = set()
    new = _listed_files(manifest)
    for file in sorted(new):
        # What is not there any more has been moved before.
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / work / places[file], folder / file)
    stale = old | {found.name for split in SPLITS for found in folder.glob(f"{glob.escape(name)}_{split}_*.bin")}
    for file in sorted(stale - new):
        (folder / file).unlink(missing_ok=True)
    write_atomic(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    path.unlink()
    shutil.rmtree(folder / work, ignore_errors=True)


def _listed_shards(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {shard["file"]: shard for split in SPLITS for shard in manifest["splits"][split]["shards"]}


def _listed_files(manifest: dict[str, Any] | None) -> set[str]:
    return set() if manifest is None else {*_listed_shards(manifest), manifest["tokenizer"]["file"]}


def _own_digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_form(manifest: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError where a value that is used later is not what it should be."""

    def need(holds: object, what: str) -> None:
        if not holds:
            raise ValueError(f"wrong {what}")

    def is_count(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    def check_file(entry: dict[str, Any]) -> None:
        # A name with a folder in it would let a manifest reach outside its own.
        need(re.fullmatch(r"(?!\.)[^/\\\0]+", entry["file"]), "name of a file")
        need(re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), f"SHA-256 of {entry['file']}")

    need(isinstance(manifest["arguments"], dict), "arguments")
    need(set(manifest["splits"]) == set(SPLITS), "splits")
    for split in manifest["splits"].values():
        need(all(is_count(split[key]) for key in ("documents", "text_bytes", "tokens")) and split["tokens"], "counts")
        for shard in split["shards"]:
            check_file(shard)
            need(is_count(shard["bytes"]), f"bytes of {shard['file']}")
    need(is_count(manifest["splits"]["val"]["counted_bytes"]), "counts")
    tokenizer = manifest["tokenizer"]
    check_file(tokenizer)
    need(is_count(tokenizer["vocab_size"]) and isinstance(tokenizer["origin"], str), "tokenizer")
    need(all(is_count(count) for count in manifest["train_token_counts"]), "counts of tokens")
    bpb = manifest["unigram_bpb"]
    need(bpb is None or (type(bpb) in (float, int) and 0 <= bpb < 1e6), "unigram_bpb")
    skipped = manifest["skipped"]
    kinds = [entry for part in ("kinds", "notes") for entry in skipped.get(part, {}).values()]
    for entry in [skipped, *kinds]:
        need(is_count(entry["count"]) and isinstance(entry["first"], list), "skipped")
        need(all(isinstance(first, str) for first in entry["first"]), "skipped")
    if "sha256" in manifest:
        need(manifest["sha256"] == _own_digest(manifest), "SHA-256 of the manifest itself: it was changed")
