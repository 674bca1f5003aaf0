"""What becomes of drawn tokens: text as it comes, up to a stop text, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass

import sentencepiece

from hymba_lightning.generation.text import TextStream


class StopText:
    """Lets text through until one of `stops` comes, which is left out with everything after it.

    What may yet become a stop text is held back until that is decided.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None
        """The stop text that came."""

    def push(self, text: str) -> str:
        """What can be shown of the text so far that was not shown yet."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if places:
            place, self.found = min(places)
            shown, self._held = self._held[:place], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and became no stop text."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Reply:
    """The continuation of one text.

    Args:
        processor: The tokenizer.
        ends: Tokens that end a document.
        most: Tokens that may be drawn.
        stops: Texts that end it.
        at_start: The continuation begins its document.
    """

    processor: sentencepiece.SentencePieceProcessor
    ends: tuple[int, ...]
    most: int
    stops: tuple[str, ...] = ()
    at_start: bool = False

    def __post_init__(self) -> None:
        self._stream = TextStream(self.processor, self.at_start)
        self._stop = StopText(self.stops)
        self.text = ""
        self.tokens = 0
        self.ended_by: str | None = None
        """document_end, stop or max_new_tokens; None while it goes on."""

    def push(self, token: int) -> str:
        """What `token` adds to the text that is shown."""
        self.tokens += 1
        ends = token in self.ends
        shown = "" if ends else self._stop.push(self._stream.push(token))
        if self._stop.found is not None:
            self.ended_by = "stop"
        elif ends or self.tokens == self.most:
            self.ended_by = "document_end" if ends else "max_new_tokens"
            shown += self._stop.push(self._stream.finish()) + self._stop.finish()
        self.text += shown
        return shown
