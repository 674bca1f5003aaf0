"""Our tokenizer for `transformers`: a fast one where that is exact, SentencePiece itself everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import cached_file

from hymba_lightning.data.tokenizer import TOKENIZER_FILE
from hymba_lightning.files import write_atomic
from hymba_lightning.hf.configuration import HymbaPretrainedConfig
from hymba_lightning.hf.folders import check_fingerprint, check_same_ids, check_tokenizer, damaged_tokenizer
from hymba_lightning.interop.pretrained import MODEL_TYPE
from hymba_lightning.interop.tokenizer import (
    TOKENIZER_CONFIG,
    exact_fast_tokenizer,
    load_for_transformers,
    load_sentencepiece,
    special_tokens,
)
from hymba_lightning.interop.weight_files import AGAIN, PretrainedError

# Options of from_pretrained that say where files are found.
HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
# Of a file that may be missing.
NO_COMPLAINT = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
# By these a tokenizer_config.json names transformers' own class for a tokenizer.json.
FAST = ("PreTrainedTokenizerFast", "TokenizersBackend")


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
            raise PretrainedError(
                f"the folder holds no {TOKENIZER_FILE}: put there the SentencePiece model of the network"
            )
        self.vocab_file = vocab_file
        try:
            self.processor = load_sentencepiece(vocab_file)
        except ValueError as error:
            raise PretrainedError(str(error)) from error
        kwargs = special_tokens(self.processor) | kwargs
        # "<s>" within a text is three characters of it.
        kwargs["split_special_tokens"] = True
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        """As of every tokenizer. AutoTokenizer asks it for every folder of ours, and gets the class that the folder's
        tokenizer_config.json names; where the folder was saved with its tokenizer, that must be this one.

        Raises ValueError where the folder's files are damaged, or those of another tokenizer than its network's.
        """
        where = {key: kwargs[key] for key in HUB if key in kwargs}
        place = str(Path(name, kwargs.get("subfolder") or ""))
        own_options = any(key not in HUB and not key.startswith("_") for key in kwargs)
        network = _network_beside(name, where)
        fingerprint = None if network is None else getattr(network, "tokenizer_sha256", None)
        named = get_tokenizer_config(name, **where).get("tokenizer_class") if kwargs.get("_from_auto") else None
        load = super().from_pretrained
        if named in FAST:
            load = PreTrainedTokenizerFast.from_pretrained
            if fingerprint is not None:
                # "<s>" within a text is three characters of it.
                kwargs.setdefault("split_special_tokens", True)
        elif named not in (None, cls.__name__) and fingerprint is not None:
            raise PretrainedError(
                f"{place}: {TOKENIZER_CONFIG} names a tokenizer ({named}) that is not the network's. {AGAIN}, or leave "
                f"{TOKENIZER_FILE} there alone"
            )
        elif named not in (None, cls.__name__):
            load = (tokenizer_class_from_name(named) or PreTrainedTokenizerFast).from_pretrained
        try:
            made = load(name, *args, **kwargs)
        except PretrainedError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            if own_options:
                raise
            raise damaged_tokenizer(place, error) from error
        if network is not None and fingerprint is not None:
            if isinstance(made, cls):
                check_fingerprint(Path(made.vocab_file), fingerprint)
            check_tokenizer(made, place, network.vocab_size, network.bos_token_id, own_options)
            if not isinstance(made, cls):
                model_file = cached_file(name, TOKENIZER_FILE, **NO_COMPLAINT, **where)
                if model_file is not None:
                    check_fingerprint(Path(model_file), fingerprint)
                    check_same_ids(made, place, load_for_transformers(model_file), own_options)
        return made

    @property
    def vocab_size(self) -> int:
        """Pieces."""
        return self.processor.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Piece → id, added tokens too."""
        pieces = {self.processor.id_to_piece(token): token for token in range(self.vocab_size)}
        return pieces | self.added_tokens_encoder

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


def _network_beside(name: Any, where: dict[str, Any]) -> HymbaPretrainedConfig | None:
    """Of the config.json that lies beside a tokenizer's files; None where none of ours does. Raises ValueError where it
    is damaged."""
    try:
        content = PretrainedConfig.get_config_dict(name, **where)[0]
    except OSError:
        return None
    return HymbaPretrainedConfig.from_dict(content) if content.get("model_type") == MODEL_TYPE else None


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
