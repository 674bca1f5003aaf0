"""Our tokenizer for `transformers`: a fast one where that is exact, SentencePiece itself everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hymba_lightning.data.tokenizer import TOKENIZER_FILE
from hymba_lightning.files import write_atomic
from hymba_lightning.interop.tokenizer import (
    exact_fast_tokenizer,
    load_for_transformers,
    load_sentencepiece,
    special_tokens,
)


class HymbaTokenizer(PreTrainedTokenizer):
    """SentencePiece's own ids, with BOS in front of a text.

    Args:
        vocab_file: The SentencePiece model.
        kwargs: Those of every tokenizer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none is given, it is no SentencePiece model, or has no BOS.
    """

    vocab_files_names = {"vocab_file": TOKENIZER_FILE}  # noqa: RUF012 - transformers reads the class's
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        if vocab_file is None:
            # No OSError, of which transformers would make another sentence.
            raise ValueError(f"the folder holds no {TOKENIZER_FILE}: put there the SentencePiece model of the network")
        self.vocab_file = vocab_file
        self.processor = load_sentencepiece(vocab_file)
        kwargs = special_tokens(self.processor) | kwargs
        # "<s>" within a text is three characters of it.
        kwargs["split_special_tokens"] = True
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Pieces."""
        return self.processor.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Piece → id."""
        return {self.processor.id_to_piece(token): token for token in range(self.vocab_size)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not UTF-8 at its character {error.start + 1}; give it as UTF-8") from error
        return self.processor.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"{index} is no id of the tokenizer, which has {self.vocab_size} pieces")
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces; control pieces are written as they are called."""
        text, ids = "", []
        for token in [*tokens, None]:
            index = None if token is None else self.processor.piece_to_id(token)
            if index is not None and not self.processor.is_control(index):
                ids.append(index)
                continue
            text += self.processor.decode(ids) + (token or "")
            ids = []
        return text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """BOS in front of each text."""
        second = [] if token_ids_1 is None else [self.bos_token_id, *token_ids_1]
        return [self.bos_token_id, *token_ids_0, *second]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each special token of what `build_inputs_with_special_tokens` makes, or of a text that has them."""
        if already_has_special_tokens:
            return [int(token in self.all_special_ids) for token in token_ids_0]
        second = [] if token_ids_1 is None else [1, *(0 for _ in token_ids_1)]
        return [1, *(0 for _ in token_ids_0), *second]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """All 0."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Writes the SentencePiece model; returns its path."""
        name = TOKENIZER_FILE if filename_prefix is None else f"{filename_prefix}-{TOKENIZER_FILE}"
        path = Path(save_directory) / name
        write_atomic(path, self.processor.serialized_model_proto())
        return (str(path),)


def tokenizer_of(model_file: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a SentencePiece model or a tokenizer.json. Raises as `load_for_transformers` does."""
    fast = exact_fast_tokenizer(model_file)
    if fast is None:
        return HymbaTokenizer(str(model_file))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        **special_tokens(load_for_transformers(model_file)),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
