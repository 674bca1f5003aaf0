"""A text that a person and a network write in turns. The network's state is kept between turns, so that no token is
read twice."""

from __future__ import annotations

from collections.abc import Iterator

import sentencepiece
import torch

from hymba_lightning.data.text_encoder import TextEncoder, TextPiece
from hymba_lightning.generation.reply import Reply
from hymba_lightning.generation.sampler import SamplingConfig, draw
from hymba_lightning.generation.steps import Steps
from hymba_lightning.model import Hymba


class Session:
    """Turns of one document.

    Args:
        net: The network.
        processor: Its tokenizer.
        sampling: How tokens are drawn, in each turn; its stop_ids end a turn and are not read.
        stops: Texts that end a turn.
    """

    def __init__(
        self,
        net: Hymba,
        processor: sentencepiece.SentencePieceProcessor,
        sampling: SamplingConfig,
        stops: tuple[str, ...] = (),
    ) -> None:
        self.net, self.processor, self.sampling, self.stops = net.eval(), processor, sampling, stops
        self.last: Reply | None = None
        """The reply of the latest turn."""
        self._encoder = TextEncoder(processor)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._steps = Steps(self.net)
        # Read with the next turn.
        self._waiting: list[int] = []
        self._begun = False

    def say(self, text: str) -> Iterator[str]:
        """Adds `text` to the document and yields the continuation as it is drawn."""
        pieces = [TextPiece(not self._begun, text)] if text or not self._begun else []
        self._waiting += self._encoder.encode_pieces(pieces).tolist()
        reply = Reply(
            self.processor, self.sampling.stop_ids, self.sampling.max_new_tokens, self.stops, not (text or self._begun)
        )
        self.last, self._begun = reply, True
        device = self.net.tok_emb.weight.device
        if not self._waiting:
            # An empty turn right after the end of a document: another one begins.
            self._waiting = [self.processor.bos_id()]
        while reply.ended_by is None:
            fed_1T = torch.tensor([self._waiting], device=device)
            logits_1V = self._steps.read(fed_1T, self.sampling.prefill_tokens)
            token = draw(logits_1V[0], self.sampling, self._generator)
            shown = reply.push(token)
            self._waiting = [] if token in self.sampling.stop_ids else [token]
            if shown:
                yield shown
