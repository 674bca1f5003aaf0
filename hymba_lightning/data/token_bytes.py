"""How many UTF-8 bytes of text each target token stands for, given the token before it."""

from __future__ import annotations

import os

import numpy as np
import sentencepiece

from hymba_lightning.data.tokenizer import SPACE, ByteTokenizer, load_tokenizer


class TokenBytes:
    """Byte tables of one tokenizer.

    A normal piece counts its UTF-8 length without the leading "▁", each "▁" inside it being a one-byte space; a byte
    piece counts 1; control, unknown and unused pieces 0. A leading "▁" adds 1 unless the token before is a control,
    unknown or unused one: after a document's BOS it is SentencePiece's dummy prefix, which is not in the text.

    Over a document the counts sum to the text's UTF-8 length when the tokenizer has byte fallback, a dummy prefix and
    neither rewrites characters nor drops whitespace; `prepare` trains such tokenizers. The challenge's 1,024-piece one
    has no byte fallback and collapses runs of spaces: what it drops counts 0. `TextEncoder.audit`
    measures it on a text.

    Args:
        base_bytes: (V,) int16, bytes of each piece without its leading space.
        has_leading_space: (V,) bool, the piece starts with "▁".
        is_boundary: (V,) bool, control, unknown and unused pieces.
    """

    def __init__(self, base_bytes: np.ndarray, has_leading_space: np.ndarray, is_boundary: np.ndarray) -> None:
        self.base_bytes = np.asarray(base_bytes, dtype=np.int16)
        self.has_leading_space = np.asarray(has_leading_space, dtype=bool)
        self.is_boundary = np.asarray(is_boundary, dtype=bool)

    @classmethod
    def from_processor(cls, processor: sentencepiece.SentencePieceProcessor) -> TokenBytes:
        """Tables of a loaded tokenizer."""
        vocab_size = processor.get_piece_size()
        if isinstance(processor, ByteTokenizer):
            lengths = np.array([len(processor.raw(token)) for token in range(vocab_size)], dtype=np.int16)
            controls = np.array([processor.is_control(token) for token in range(vocab_size)])
            return cls(lengths, np.zeros(vocab_size, dtype=bool), controls)
        base_bytes = np.zeros(vocab_size, dtype=np.int16)
        has_leading_space = np.zeros(vocab_size, dtype=bool)
        is_boundary = np.zeros(vocab_size, dtype=bool)
        for token in range(vocab_size):
            if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
                is_boundary[token] = True
            elif processor.is_byte(token):
                base_bytes[token] = 1
            else:
                piece = processor.id_to_piece(token)
                has_leading_space[token] = piece.startswith(SPACE)
                base_bytes[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        return cls(base_bytes, has_leading_space, is_boundary)

    @classmethod
    def from_model(cls, path: str | os.PathLike[str]) -> TokenBytes:
        """Tables of a tokenizer's file. Raises what `load_tokenizer` raises."""
        return cls.from_processor(load_tokenizer(path))

    @property
    def vocab_size(self) -> int:
        return len(self.base_bytes)

    def count(self, previous_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """Bytes of each target given the token before it: integer arrays or CPU tensors of one shape in, an int16
        array of that shape out."""
        # Indexing numpy by a one-element tensor would drop its shape.
        previous_ids, target_ids = np.asarray(previous_ids), np.asarray(target_ids)
        space = self.has_leading_space[target_ids] & ~self.is_boundary[previous_ids]
        return self.base_bytes[target_ids] + space.astype(np.int16)
