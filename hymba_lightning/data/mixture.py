"""Training on several folders of shards at once, each with its share of the sequences.

Which folder a span comes from is a function of its number alone: share p of every stretch of spans belongs to a folder
as evenly as whole numbers allow (span s does where ⌊(s+1)p⌋ > ⌊sp⌋), and a folder's own spans come in the order in
which they would come without the others. So nothing has to be remembered to go on, or to have another number of ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hymba_lightning.data.manifest import read_manifest
from hymba_lightning.data.sequences import Batch, TrainSpans
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256, load_tokenizer

log = logging.getLogger("hymba_lightning")


class Source(NamedTuple):
    """A folder, and its share of the training sequences."""

    folder: Path
    share: Fraction


def sources_of(data_dir: Path, mixture: Mapping[str, float]) -> list[Source]:
    """`data_dir` with what the others leave, then the others.

    Raises:
        ValueError: No mapping, a share that is none, nothing left for data_dir, a folder named twice.
    """
    if not isinstance(mixture, Mapping):
        raise ValueError(f"data.mixture is {mixture!r}; name folders with their shares, as in {{'data/code': 0.3}}")
    others = [Source(Path(folder).expanduser(), _share(folder, share)) for folder, share in mixture.items()]
    left = 1 - sum((source.share for source in others), Fraction(0))
    if left <= 0:
        raise ValueError(
            f"data.mixture gives {', '.join(mixture)} {float(1 - left):g} of the sequences together; the rest, which "
            "must be more than 0, is data.data_dir's"
        )
    sources = [Source(data_dir, left), *others]
    places = [source.folder.resolve() for source in sources]
    twice = [str(place) for place in places if places.count(place) > 1]
    if twice:
        raise ValueError(f"data.mixture and data.data_dir name {twice[0]} twice; name each folder once")
    return sources


def _share(folder: str, share: float) -> Fraction:
    if not (isinstance(share, int | float) and math.isfinite(share) and 0 < share < 1):
        raise ValueError(f"data.mixture gives {folder} a share of {share}; a share lies between 0 and 1")
    return Fraction(str(share))


def check_sources(sources: Sequence[Source], tokenizer: Path) -> None:
    """Warns of folders whose training text may hold what is for validation in the first one.

    Raises:
        ValueError: A folder was prepared with another tokenizer than `tokenizer`, or does not say with which.
        FileNotFoundError: There is no such folder, or no tokenizer.
    """
    if len(sources) == 1:
        return
    load_tokenizer(tokenizer)
    own = file_sha256(tokenizer)
    for folder, _ in sources[1:]:
        if not folder.is_dir():
            raise FileNotFoundError(f"data.mixture names {folder}, which is no folder")
        manifest, beside = read_manifest(folder), folder / TOKENIZER_FILE
        found = manifest["tokenizer"]["sha256"] if manifest else file_sha256(beside) if beside.is_file() else None
        if found != own:
            what = f"is of another tokenizer (sha256 {found})" if found else "does not say of which tokenizer it is"
            raise ValueError(
                f"{folder} of data.mixture {what}; all folders must be of {tokenizer} (sha256 {own}): prepare it again "
                f"with `hymba prepare --tokenizer {tokenizer}`"
            )
    for note in splits_apart(sources):
        log.warning("%s", note)


def splits_apart(sources: Sequence[Source]) -> list[str]:
    """Sentences on folders whose training text may hold what is for validation in the first one: those that were split
    in another way, where both were split by their documents' content."""
    own = _split_of(sources[0].folder)
    found = []
    for folder, _ in sources[1:]:
        other = _split_of(folder)
        if own and other and (other[0] != own[0] or other[1] < own[1]):
            found.append(
                f"{folder} was prepared with seed {other[0]} and val_fraction {other[1]}, {sources[0].folder} with "
                f"{own[0]} and {own[1]}: a text in both may be trained on and scored. Prepare both with one seed and "
                "val_fraction"
            )
    return found


def _split_of(folder: Path) -> tuple[int, float] | None:
    """Seed and share of the split of a folder's documents, None where it is not known, or was made another way."""
    arguments = (read_manifest(folder) or {}).get("arguments", {})
    seed, share = arguments.get("seed"), arguments.get("val_fraction")
    known = isinstance(seed, int) and isinstance(share, float) and not arguments.get("val_inputs")
    return (seed, share) if known else None


class MixedSpans:
    """The spans of several streams, numbered from 0 without end; otherwise as `TrainSpans`.

    Args:
        parts: Each folder's own spans, all of one length.
        shares: Of the spans, one for each part; their sum is 1.
    """

    def __init__(self, parts: Sequence[TrainSpans], shares: Sequence[Fraction]) -> None:
        self.parts = list(parts)
        self.spans_per_pass = sum(part.spans_per_pass for part in parts)
        """Whole spans of all folders together."""
        self.n_tokens = sum(part.n_tokens for part in parts)
        # Of what the parts behind it leave, from the last one to the first, which gets the rest.
        left = Fraction(1)
        self._steps: list[tuple[int, Fraction]] = []
        for index in range(len(parts) - 1, 0, -1):
            self._steps.append((index, shares[index] / left))
            left -= shares[index]

    def place(self, span: int) -> tuple[int, int]:
        """Index of the part that a span belongs to, and its number there."""
        for index, share in self._steps:
            before = math.floor(span * share)
            if math.floor((span + 1) * share) > before:
                return index, before
            span -= before
        return 0, span

    def tokens(self, span: int) -> np.ndarray:
        """The span's seq_len + 1 tokens, int64."""
        part, own = self.place(span)
        return self.parts[part].tokens(own)

    def locate(self, span: int) -> tuple[Path, int]:
        """Shard file, and offset in it, of the span's first token."""
        part, own = self.place(span)
        return self.parts[part].locate(own)

    def batch(self, first_span: int, micro_batch_size: int) -> Batch:
        """Spans first_span … first_span + micro_batch_size - 1 as a training batch."""
        tokens = torch.from_numpy(np.stack([self.tokens(first_span + row) for row in range(micro_batch_size)]))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.empty(0, dtype=torch.int16))
