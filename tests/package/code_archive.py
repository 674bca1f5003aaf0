"""Changing the sources that a submission's folder carries."""

import io
import tarfile

from hymba_lightning import closure


def rewrite_code(folder, change):
    """The archive of sources with `change` (name, text) -> text, or None to leave a file out."""
    with tarfile.open(folder / closure.ARCHIVE) as archive:
        sources = {member.name: archive.extractfile(member).read().decode() for member in archive.getmembers()}
    changed = {name: change(name, text) for name, text in sources.items()}
    assert changed != sources
    with tarfile.open(folder / closure.ARCHIVE, "w:xz") as archive:
        for name, text in changed.items():
            if text is not None:
                entry = tarfile.TarInfo(name)
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
