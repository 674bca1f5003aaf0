"""A SentencePiece model as the `tokenizers` library's tokenizer, where that gives the same ids for every text.

It does for byte-pair encodings that normalise nothing, which is what `hymba prepare` trains. SentencePiece's table of
normalisations (nmt_nfkc) replaces the longest match anywhere; the library's counterpart looks at one grapheme at a
time, and gives other ids where a mark follows a replaced character. Such models, and unigram models, whose ties
SentencePiece decides by rounding, stay with SentencePiece: `hymba_lightning.hf.HymbaTokenizer`. A tokenizer.json is the
library's own.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import sentencepiece

from hymba_lightning.data.tokenizer import SPACE, ByteTokenizer, load_tokenizer
from hymba_lightning.data.tokenizer_huggingface import HuggingFaceTokenizer
from hymba_lightning.files import write_atomic

TOKENIZER_CONFIG, FAST_FILE = "tokenizer_config.json", "tokenizer.json"
# Types of pieces and models in a SentencePiece file.
NORMAL, USER_DEFINED, UNUSED, BPE = 1, 4, 5, 2


def load_sentencepiece(model_file: str | Path) -> sentencepiece.SentencePieceProcessor:
    """The loaded tokenizer. Raises what `load_tokenizer` raises, and ValueError where it is another library's."""
    processor = load_tokenizer(model_file)
    if isinstance(processor, ByteTokenizer):
        raise ValueError(f"{model_file} is no SentencePiece model")
    return processor


def load_for_transformers(model_file: str | Path) -> Any:
    """The loaded tokenizer, of SentencePiece or a tokenizer.json.

    Raises what `load_tokenizer` raises, and ValueError where transformers would give other ids.
    """
    processor = load_tokenizer(model_file)
    if isinstance(processor, ByteTokenizer) and not isinstance(processor, HuggingFaceTokenizer):
        raise ValueError(
            f"{model_file} is neither a SentencePiece model nor a tokenizer.json, and transformers, which cuts words "
            "by other regular expressions than tiktoken, may give other ids: publish the network alone with "
            "--tokenizer none (in Python save_pretrained without a tokenizer)"
        )
    return processor


def special_tokens(processor: Any) -> dict[str, str]:
    """The special pieces by transformers' names; where there is none for padding, BOS serves."""
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
        "pad_token": processor.pad_id(),
    }
    named = {name: processor.id_to_piece(token) for name, token in ids.items() if token >= 0}
    return {"pad_token": named["bos_token"]} | named


def exact_fast_tokenizer(model_file: str | Path) -> Any:
    """The `tokenizers.Tokenizer` with the file's ids, BOS in front; None where only SentencePiece gives them.

    Raises what `load_for_transformers` raises, ImportError without `tokenizers`.
    """
    processor = load_for_transformers(model_file)
    if isinstance(processor, HuggingFaceTokenizer):
        return _with_bos(processor)
    return fast_tokenizer(model_file) if why_not_fast(model_file) is None else None


def _with_bos(processor: HuggingFaceTokenizer) -> Any:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(processor.to_json())
    bos = processor.id_to_piece(processor.bos_id())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, processor.bos_id())]
    )
    return tokenizer


def why_not_fast(model_file: str | Path) -> str | None:
    """What keeps a SentencePiece model from being converted without another result; None where nothing does."""
    model = _read(model_file)
    if model.trainer_spec.model_type != BPE:
        return "it is no byte-pair encoding"
    if model.normalizer_spec.precompiled_charsmap:
        return f"it normalises texts ({model.normalizer_spec.name})"
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        return "it writes spaces in another way"
    if any(piece.type in (USER_DEFINED, UNUSED) for piece in model.pieces):
        return "it has user-defined or unused pieces"
    return None


def fast_tokenizer(model_file: str | Path) -> Any:
    """The `tokenizers.Tokenizer` with the model's ids, which puts BOS in front of a text.

    Raises ValueError where the conversion would give other ids (`why_not_fast`), ImportError without `tokenizers`.
    """
    reason = why_not_fast(model_file)
    if reason is not None:
        raise ValueError(f"{model_file} cannot be converted exactly: {reason}")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    model = _read(model_file)
    pieces = [piece.piece for piece in model.pieces]
    ids = {piece: token for token, piece in enumerate(pieces)}
    unknown, bos = pieces[model.trainer_spec.unk_id], pieces[model.trainer_spec.bos_id]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(model, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    decode: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decode)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
    )
    control = [piece.piece for piece in model.pieces if piece.type not in (NORMAL, 6)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return tokenizer


def write_tokenizer(model_file: str | Path, folder: Path) -> None:
    """tokenizer_config.json and, where it is exact, tokenizer.json: what `transformers.AutoTokenizer` reads."""
    fast = exact_fast_tokenizer(model_file)
    config: dict[str, Any] = special_tokens(load_for_transformers(model_file)) | {
        "tokenizer_class": "HymbaTokenizer" if fast is None else "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # "<s>" within a text is three characters of it, never a token.
        "split_special_tokens": True,
    }
    if fast is not None:
        write_atomic(folder / FAST_FILE, fast.to_str())
    else:
        (folder / FAST_FILE).unlink(missing_ok=True)
    write_atomic(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2) + "\n")


def _read(model_file: str | Path) -> Any:
    # Raises what is wrong with the file.
    load_sentencepiece(model_file)
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(Path(model_file).read_bytes())
    return model


def _merges(model: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best pieces first: SentencePiece merges by the result."""
    score = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    ranked = [
        (-rank, ids[piece], cut)
        for piece, rank in score.items()
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    pieces = {token: piece for piece, token in ids.items()}
    return [(pieces[token][:cut], pieces[token][cut:]) for _, token, cut in sorted(ranked)]
