"""Text → token ids that decode to exactly that text, and the processes that do it in parallel.

A long text is encoded in pieces of a few kilobytes: SentencePiece takes half the time on them, and a fraction of the
memory. The ids are those of the whole, because a text is cut only between two characters that stand side by side in no
piece of the vocabulary: no merge of a byte-pair encoding, and no piece of a unigram model, reaches across. (A unigram
model chooses among equally probable segmentations by rounding errors; there the ids may be the other ones of a tie.)
"""

from __future__ import annotations

import contextlib
import pickle
import re
import subprocess
import sys
import threading
import unicodedata
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, cast

import numpy as np
import sentencepiece

from hymba_lightning.data.processes import isolated_python
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.tokenizer import SPACE, ByteTokenizer, load_tokenizer
from hymba_lightning.text import SURROGATES

PIECE_CHARS = 2000
SPACE_BYTES = SPACE.encode()

# Encoded in front of a piece that goes on with a text, so that neither a dummy prefix nor stripping changes it. With
# byte pieces the stand-in serves, which nothing merges with.
ANCHOR = "."
# What stands for a "▁" of the text; the vocabulary decides, never the text.
STAND_IN = 0x10FFFD

# Hangul vowels and finals, which a normalisation joins to the character before them, as it does marks.
JOINING = re.compile("[\u1160-\u11ff\ud7b0-\ud7ff]")


class TextPiece(NamedTuple):
    """A part of a document that is encoded by itself, as `TextEncoder.cut` makes it."""

    first: bool
    """The document's first part; gets the BOS."""
    text: str


class ByteAudit(NamedTuple):
    """Whether bits per byte of a text divide by its true length: bytes counted token by token, and the text's own."""

    counted_bytes: int
    text_bytes: int

    @property
    def exact(self) -> bool:
        """Both counts are the same."""
        return self.counted_bytes == self.text_bytes


class TextEncoder:
    """Turns documents into token ids whose text is the document's, to the byte.

    SentencePiece writes a space as "▁" (U+2581), and so takes a "▁" in the text for a space. Where the vocabulary has
    pieces for single bytes such a character is encoded as its three bytes, which decode to itself.

    Args:
        processor: The loaded tokenizer.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self.processor = processor
        self._byte_ids: dict[int, int] = {}
        self._can_cut, self._anchor, self._n_anchor = False, "", 0
        if isinstance(processor, ByteTokenizer):
            # Its own rules decide what is a word: texts stay whole.
            return
        vocab_size = processor.get_piece_size()
        self._byte_ids = {
            int(processor.id_to_piece(token)[3:5], 16): token for token in range(vocab_size) if processor.is_byte(token)
        }
        pieces = [
            processor.id_to_piece(token).replace(SPACE, " ")
            for token in range(vocab_size)
            if not (processor.is_byte(token) or processor.is_control(token) or processor.is_unknown(token))
        ]
        self._characters = set("".join(pieces))
        self._pairs = {piece[start : start + 2] for piece in pieces for start in range(len(piece) - 1)}
        self._stand_in = next(chr(code) for code in range(STAND_IN, 0, -1) if chr(code) not in self._characters)
        self._anchor = self._stand_in if self._byte_ids else ANCHOR
        self._n_anchor = len(processor.encode(self._anchor))
        # Where a space is put at the end of every text, it would come to the end of every piece.
        self._can_cut = not "".join(processor.encode("a", out_type=str)).endswith(SPACE)
        self._kept: dict[str, bool] = {" ": True, SPACE: False}

    def cut(self, text: str) -> list[TextPiece]:
        """Cuts a text into pieces of about PIECE_CHARS characters, whose ids in a row are those of the whole text.

        A cut falls only between two characters that no piece of the vocabulary holds side by side; a text that offers
        none, such as an endless word, stays whole.
        """
        pieces = []
        start = 0
        while self._can_cut and len(text) - start > PIECE_CHARS:
            places = range(start + PIECE_CHARS, len(text) - 1)
            end = next((place for place in places if self._may_cut(text, place)), None)
            if end is None:
                break
            pieces.append(TextPiece(start == 0, text[start:end]))
            start = end
        pieces.append(TextPiece(start == 0, text[start:]))
        return pieces

    def _may_cut(self, text: str, place: int) -> bool:
        """Whether the ids on both sides of `place` are those that each side has alone."""
        before, after = text[place - 1], text[place]
        if before == " " or before + after in self._pairs or self._anchor + after in self._pairs:
            return False
        # A normalisation may join what follows to `after`, or drop all but one of several spaces.
        follows = text[place + 1]
        if not self._keeps(follows) or after == follows == " ":
            return False
        # Without byte pieces, unknown characters in a row are one token.
        if not self._byte_ids and after != " " and after not in self._characters:
            return False
        return self._keeps(before) and self._keeps(after)

    def _keeps(self, char: str) -> bool:
        """Whether the tokenizer's normalisation leaves a character as it is, whatever stands beside it."""
        kept = self._kept.get(char)
        if kept is None:
            joins = JOINING.match(char) is not None or unicodedata.category(char)[0] in "MZ"
            kept = not joins and self.processor.normalize(f"a{char}a").strip(SPACE) == f"a{char}a"
            self._kept[char] = kept
        return kept

    def encode_pieces(self, pieces: list[TextPiece]) -> np.ndarray:
        """Token ids (n,) uint16 of consecutive pieces, with a BOS before the first piece of each document.

        Raises:
            ValueError: A piece holds half of a surrogate pair, which has no UTF-8.
        """
        try:
            rows = self.processor.encode([piece.text if piece.first else self._anchor + piece.text for piece in pieces])
        except (TypeError, UnicodeEncodeError) as error:
            # Python's stand-ins for bytes of an argument or of stdin that are no UTF-8 are such halves.
            found = SURROGATES.search("".join(piece.text for piece in pieces))
            if found is None:
                raise
            raise ValueError(
                f"the text is not UTF-8 at its character {found.start() + 1:,}; give it as UTF-8"
            ) from error
        bos = [self.processor.bos_id()]
        for index, piece in enumerate(pieces):
            if SPACE in piece.text and self._byte_ids:
                rows[index] = self._encode_with_spaces_of_text(piece.text if piece.first else self._anchor + piece.text)
            rows[index] = bos + rows[index] if piece.first else rows[index][self._n_anchor :]
        return np.fromiter(chain.from_iterable(rows), dtype=np.uint16)

    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,) uint16 of a document, without BOS."""
        return self.encode_pieces(self.cut(text))[1:]

    def audit(self, text: str) -> ByteAudit:
        """Counts the bytes that bits per byte of `text` would divide by, and the bytes that it has.

        They differ where the tokenizer rewrites the text (normalised letters, collapsed spaces), or meets a character
        that it neither knows nor can spell in bytes, as with the challenge's vocabulary of 1,024 pieces.
        """
        ids = self.encode_pieces(self.cut(text)).astype(np.int64)
        counted = TokenBytes.from_processor(self.processor).count(ids[:-1], ids[1:])
        return ByteAudit(int(counted.sum()), len(text.encode()))

    def _encode_with_spaces_of_text(self, text: str) -> list[int]:
        """Ids of a text that contains "▁" (U+2581): encoded with another character, the stand-in, in its place, whose
        byte tokens are then replaced by those of "▁"."""
        characters = iter([char for char in text if char in (SPACE, self._stand_in)])
        stand_in_ids = [self._byte_ids[byte] for byte in self._stand_in.encode()]
        space_ids = [self._byte_ids[byte] for byte in SPACE_BYTES]
        encoded = self.processor.encode(text.replace(SPACE, self._stand_in))
        ids: list[int] = []
        position = 0
        while position < len(encoded):
            if encoded[position : position + len(stand_in_ids)] == stand_in_ids:
                ids += space_ids if next(characters) == SPACE else stand_in_ids
                position += len(stand_in_ids)
            else:
                ids.append(encoded[position])
                position += 1
        return ids


class EncoderPool:
    """Encodes lists of pieces in several processes, or in this one where one is enough.

    A process is a Python that imports numpy and the tokenizer's library, and nothing else. It is not multiprocessing's,
    which would copy this process's threads or import its main module: so it also works in a notebook, and in a script
    without `if __name__ == "__main__"`.

    Args:
        model: The tokenizer's file.
        workers: Processes; 1 for none but this one.
    """

    def __init__(self, model: Path, workers: int) -> None:
        self._model = model
        self._encoder = TextEncoder(load_tokenizer(model)) if workers == 1 else None
        self._threads = ThreadPoolExecutor(workers, "hymba-encode")
        self._local = threading.local()
        self._workers: list[_Worker] = []

    def submit(self, pieces: list[TextPiece]) -> Future[np.ndarray]:
        """Starts to encode `pieces`; the future gives their ids (n,) uint16, as `TextEncoder.encode_pieces` does."""
        if self._encoder is not None:
            return self._threads.submit(self._encoder.encode_pieces, pieces)
        return self._threads.submit(self._encode_in_process, pieces)

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            # A process that has died already leaves a broken pipe, reported where its answer was awaited.
            with contextlib.suppress(BrokenPipeError):
                worker.requests.close()
            worker.process.wait()
            worker.answers.close()

    def _encode_in_process(self, pieces: list[TextPiece]) -> np.ndarray:
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = self._start()
        try:
            pickle.dump([tuple(piece) for piece in pieces], worker.requests, pickle.HIGHEST_PROTOCOL)
            worker.requests.flush()
            return pickle.load(worker.answers)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError) as error:
            status = worker.process.wait()
            raise RuntimeError(
                f"an encoder process ended with status {status}; if it was killed for memory, use fewer workers"
            ) from error

    def _start(self) -> _Worker:
        process = subprocess.Popen(
            isolated_python(__name__, str(self._model)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for the parent; this process ends with its input.
            start_new_session=True,
        )
        worker = _Worker(process, cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout))
        self._workers.append(worker)
        return worker


class _Worker(NamedTuple):
    """An encoder process and the pipes to and from it."""

    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    answers: IO[bytes]


def main(arguments: list[str]) -> None:
    """A process of the pool: reads pickled lists of pieces from standard input, which the parent alone writes to, and
    answers each with its ids, until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    encoder = TextEncoder(load_tokenizer(arguments[0]))
    while True:
        try:
            pieces = pickle.load(requests)
        except EOFError:
            return
        ids = encoder.encode_pieces([TextPiece(*piece) for piece in pieces])
        pickle.dump(ids, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
