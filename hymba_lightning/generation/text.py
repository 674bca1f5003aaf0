"""Tokens → text as they come, at constant cost per token."""

from __future__ import annotations

import codecs

import sentencepiece

from hymba_lightning.data.tokenizer import SPACE, ByteTokenizer


class TextStream:
    """Turns token ids into text one by one; a character of several byte tokens appears with its last one.

    Args:
        processor: The tokenizer.
        at_start: The next piece begins a document, so that its leading "▁" is SentencePiece's dummy prefix, not a
            space (where the tokenizer adds one).
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, at_start: bool) -> None:
        self._processor = processor
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = (
            at_start
            and not isinstance(processor, ByteTokenizer)
            and processor.id_to_piece(processor.encode("x")[0]).startswith(SPACE)
        )

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        processor = self._processor
        if isinstance(processor, ByteTokenizer):
            return self._decoder.decode(processor.raw(token))
        if processor.is_control(token) or processor.is_unused(token):
            return ""
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            raw = bytes([int(piece[1:-1], 16)])
        elif processor.is_unknown(token):
            raw = "\ufffd".encode()
        else:
            raw = (piece.removeprefix(SPACE) if self._at_start else piece).replace(SPACE, " ").encode()
        self._at_start = False
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """What an unfinished character leaves."""
        return self._decoder.decode(b"", final=True)
