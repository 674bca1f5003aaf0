"""Evidence for a score: a file with every token's nats, and curves of what context is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hymba_lightning.data.token_stream import Chunk
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.evaluation.curve import ContextCurve, DocumentPosition
from hymba_lightning.evaluation.ttt import ChunkScore
from hymba_lightning.files import naming


def describe_context(config: TTTConfig, seq_len: int, world_size: int) -> str:
    """In words, which tokens before it a target is predicted from."""
    where = "where the stream has them"
    warm, overlap = config.warm_tokens, seq_len - config.stride
    if config.mode == "cold":
        return f"cold sequences of {seq_len}: 1 to {seq_len} tokens, whatever lies before them forgotten"
    if config.mode == "sliding":
        return f"windows of {seq_len}, {config.stride} scored in each: at least {overlap} tokens {where}"
    if world_size > 1:
        return (
            f"carried, each chunk in {world_size} contiguous spans, a span's state made from the {warm} tokens "
            f"before it: at least {warm} tokens {where}; one rank would give every token all tokens before it"
        )
    if config.epochs and config.state_after_update == "rewarm":
        return (
            f"carried, the state made anew from the last {warm} tokens after each update: at least {warm} tokens "
            f"{where}"
        )
    return "carried: all tokens before it, through the state"


class StreamAudit:
    """Checks the scored stream chunk by chunk, in constant memory.

    Args:
        folder: Where nats.npy goes.
        bos_id: Token that starts a document.
        keep_nats: Write every token's nats.
    """

    def __init__(self, folder: Path, bos_id: int, keep_nats: bool) -> None:
        self.by_context, self.by_document = ContextCurve(), ContextCurve()
        self._document = DocumentPosition(bos_id)
        self.nats_path = folder / "nats.npy" if keep_nats else None
        self._raw = folder / ".nats.raw"
        if keep_nats:
            folder.mkdir(parents=True, exist_ok=True)
            self._raw.write_bytes(b"")

    def add(self, chunk: Chunk, scored: ChunkScore) -> None:
        """The next chunk and its final score."""
        n = scored.nats.numel()
        target_bytes = chunk.target_bytes[:n]
        # The whole chunk moves the document position on, also where its last tokens were left out of the score.
        position = self._document.of_targets(chunk.tokens)[:n]
        self.by_context.add(scored.context, scored.nats, target_bytes)
        self.by_document.add(position, scored.nats, target_bytes)
        if self.nats_path is not None:
            with naming(self._raw), open(self._raw, "ab") as file:
                file.write(scored.nats.cpu().numpy().astype("<f4").tobytes())

    def finish(self) -> dict[str, Any]:
        """Writes nats.npy (float32, one value a scored token, in order) and returns what belongs in the summary."""
        if self.nats_path is not None:
            partial = self.nats_path.with_suffix(".partial")
            n_bytes = self._raw.stat().st_size
            with naming(self.nats_path), open(partial, "wb") as file:
                np.save(file, np.memmap(self._raw, dtype="<f4", mode="r") if n_bytes else np.empty(0, "<f4"))
            partial.replace(self.nats_path)
            self._raw.unlink()
        return {
            "nats_file": None if self.nats_path is None else str(self.nats_path),
            "bpb_by_context": [point._asdict() for point in self.by_context.points()],
            "bpb_by_document_position": [point._asdict() for point in self.by_document.points()],
        }
