"""The LightningDataModule: shards in, batches out, each a pure function of the position in the data and the rank.

B is the micro-batch of one rank, T = seq_len, W the number of ranks.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import count, cycle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sentencepiece
import torch

from hymba_lightning.data.agreement import agree
from hymba_lightning.data.digests import file_digests
from hymba_lightning.data.inputs import first_common
from hymba_lightning.data.loader import Loader, ResumableLoader, read_ahead
from hymba_lightning.data.manifest import SPLITS, check_manifest, read_manifest
from hymba_lightning.data.mixture import MixedSpans, check_sources, sources_of
from hymba_lightning.data.position import ReadPosition
from hymba_lightning.data.sequences import Batch, TrainSpans, ValSequences, first_span
from hymba_lightning.data.shards import find_shards
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.token_stream import Chunk, TokenStream, check_scorable, chunk_at
from hymba_lightning.data.token_stream import n_chunks as count_chunks
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256, load_tokenizer
from hymba_lightning.data.unigram import token_frequencies, unigram_bits_per_byte
from hymba_lightning.field_types import settled
from hymba_lightning.trainer_internals import rewind_to_accumulation_window

log = logging.getLogger("hymba_lightning")

# Training ends by clock or step limit, never by running out of batches; the length only has to be out of reach.
ENDLESS = 1 << 40
OPTIONAL = ("val_tokens_limit", "shuffle_seed")
# What is made of the files and kept until they are opened again.
OPENED = ("processor", "token_bytes", "train_spans", "_val_stream", "unigram_bpb", "val_sequences", "_train_digest")
POSITIVE = ("seq_len", "micro_batch_size", "val_micro_batch_size", "ttt_chunk_tokens", "prefetch_batches")


class HymbaDataModule(pl.LightningDataModule):
    """Token shards as training batches, validation sequences and test-time training chunks.

    Args:
        data_dir: Folder of the shards, as `hymba prepare` writes it. Relative file patterns are looked up in it.
        tokenizer: SentencePiece model; by default tokenizer.model in data_dir.
        train_files: Glob pattern of the training shards, relative to data_dir or absolute.
        val_files: Glob pattern of the validation shards, relative to data_dir or absolute.
        seq_len: Tokens of context T in training and validation sequences.
        micro_batch_size: Training sequences per rank and micro-step.
        val_micro_batch_size: Validation sequences per rank and batch; by default micro_batch_size.
        ttt_chunk_tokens: Target tokens of one score-first test-time training chunk.
        val_tokens_limit: Score only the first so many tokens of the validation stream, in validation and test alike.
            By default all.
        shuffle_seed: Read the training spans in an order drawn anew for every pass over the data. By default they are
            read in the order of the shards.
        mixture: Further folders to train on, each with its share of the training sequences; the rest are data_dir's,
            as is all validation. All of one tokenizer; in each one train_files is looked up.
        prefetch_batches: Batches that a background thread reads ahead (into pinned memory where a GPU is used).

    Raises:
        ValueError: A number that cannot be.
    """

    @settled("data.")
    def __init__(
        self,
        data_dir: str = "data",
        tokenizer: str | None = None,
        train_files: str = "*_train_*.bin",
        val_files: str = "*_val_*.bin",
        seq_len: int = 32768,
        micro_batch_size: int = 2,
        val_micro_batch_size: int | None = None,
        ttt_chunk_tokens: int = 524288,
        val_tokens_limit: int | None = None,
        shuffle_seed: int | None = None,
        mixture: dict[str, float] | None = None,
        prefetch_batches: int = 4,
    ) -> None:
        super().__init__()
        self.data_dir = Path(data_dir).expanduser()
        self.tokenizer = Path(tokenizer).expanduser() if tokenizer else self.data_dir / TOKENIZER_FILE
        self.train_files = train_files
        self.val_files = val_files
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.val_micro_batch_size = micro_batch_size if val_micro_batch_size is None else val_micro_batch_size
        self.ttt_chunk_tokens = ttt_chunk_tokens
        self.val_tokens_limit = val_tokens_limit
        self.shuffle_seed = shuffle_seed
        self.mixture = dict(mixture) if isinstance(mixture, Mapping) else mixture or {}
        self.prefetch_batches = prefetch_batches
        self._check_settings()
        # Lightning would refuse a rank without batches; here every rank has as many as the others.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._position = ReadPosition()
        self._delivered_span: int | None = None
        self._resuming = False
        self.opened_in = 0.0
        """Seconds that the last `setup` took."""

    def _check_settings(self) -> None:
        self.sources = sources_of(self.data_dir, self.mixture)
        if self.mixture and Path(self.train_files).is_absolute():
            raise ValueError(
                f"data.train_files={self.train_files!r} is one place, and data.mixture needs one in each folder"
            )
        for field in (*POSITIVE, *(["val_tokens_limit"] if self.val_tokens_limit is not None else [])):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field} is {getattr(self, field)}; it must be at least 1")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 1 << 32:
            raise ValueError(f"data.shuffle_seed is {self.shuffle_seed}; it must lie in 0 … 2^32 - 1")

    # What the tokenizer says --------------------------------------------------------------------------------------

    @cached_property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """The loaded tokenizer. Raises FileNotFoundError or ValueError, with the remedy, where there is none."""
        return load_tokenizer(self.tokenizer)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """UTF-8 bytes of each target token."""
        return TokenBytes.from_processor(self.processor)

    @property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer."""
        return self.processor.get_piece_size()

    @property
    def bos_id(self) -> int:
        """Id that begins every document."""
        return self.processor.bos_id()

    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the tokenizer file, in hexadecimal."""
        load_tokenizer(self.tokenizer)
        return file_sha256(self.tokenizer)

    def data_digest(self, split: str) -> str:
        """SHA-256, in hexadecimal, of what a split's tokens are: the shards' SHA-256 in order, and the tokenizer's.

        Equal for equal data wherever they lie. Shards are read as a whole the first time only (see `file_digests`).

        Args:
            split: "train" or "val".

        Raises:
            FileNotFoundError: No tokenizer, or no shard matches the split's pattern.
            ValueError: Another split, or a tokenizer that is none.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        lines = [self.tokenizer_fingerprint()]
        for folder, share in self.sources if split == "train" else self.sources[:1]:
            paths = find_shards(self.train_files if split == "train" else self.val_files, folder)
            lines += [] if share == 1 or split == "val" else [str(share)]
            lines += file_digests(paths, sample=False)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    # Opening ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Open and check everything that the stage reads, before any work.

        Raises:
            FileNotFoundError: No tokenizer, or no shard matches a pattern.
            ValueError: A damaged shard, ids beyond the tokenizer's vocabulary, data shorter than seq_len, a tokenizer
                other than the one that made the shards, a file for both training and validation, other data on
                another rank.
        """
        started = time.monotonic()
        agree(lambda: self._alike(stage), check=lambda: self._open(stage))
        self.opened_in = time.monotonic() - started

    def _open(self, stage: str) -> None:
        self._check_settings()  # which may have changed since the last time, as may files
        for name in OPENED:
            self.__dict__.pop(name, None)
        manifest = read_manifest(self.data_dir)
        val_paths = find_shards(self.val_files, self.data_dir)
        if stage == "fit":
            check_sources(self.sources, self.tokenizer)
        trained = [find_shards(self.train_files, folder) for folder, _ in self.sources] if stage == "fit" else []
        train_paths = [path for paths in trained for path in paths]
        both = first_common(train_paths, val_paths)
        if both:
            same = f" and is the same as {both[1]}, which matches" if both[0] != both[1] else " and"
            raise ValueError(
                f"{both[0]} matches data.train_files={self.train_files!r}{same} data.val_files={self.val_files!r}; "
                "training on validation text makes its score worthless: narrow the patterns"
            )
        # One process of a node reads samples of the shards again; whole ones are read once.
        sample = self.trainer is None or self.trainer.local_rank == 0
        check_manifest(self.data_dir, [*train_paths, *val_paths], self.tokenizer, sample=sample)
        self.val_stream()
        if stage == "fit":
            self._check_training_size()
        if read_manifest(self.data_dir) != manifest:
            raise ValueError(f"the data in {self.data_dir} were replaced while they were opened; start again")

    def _alike(self, stage: str) -> dict[str, object]:
        """What is to be the same on all ranks."""
        alike: dict[str, object] = {f"data ({split})": self.data_digest(split) for split in SPLITS[stage != "fit" :]}
        return alike | {f"data.{name}": getattr(self, name) for name in (*POSITIVE[:-1], *OPTIONAL)}

    def _check_training_size(self) -> None:
        n_tokens, rank_spans = self.train_spans.n_tokens, self._rank_and_world()[1] * self.micro_batch_size
        if self.train_spans.spans_per_pass < rank_spans:
            log.warning(
                "one micro-step of all ranks reads %s tokens, more than the %s there are: sequences repeat in it",
                f"{rank_spans * (self.seq_len + 1):,}",
                f"{n_tokens:,}",
            )

    @cached_property
    def train_spans(self) -> TrainSpans | MixedSpans:
        """The training stream, or a mixture of several, cut into spans."""
        parts = [self._spans_of(folder) for folder, _ in self.sources]
        return parts[0] if len(parts) == 1 else MixedSpans(parts, [share for _, share in self.sources])

    def _spans_of(self, folder: Path) -> TrainSpans:
        stream = TokenStream(find_shards(self.train_files, folder), self.vocab_size)
        if stream.n_tokens <= self.seq_len:
            raise ValueError(
                f"data.seq_len={self.seq_len} needs at least {self.seq_len + 1:,} training tokens, but the shards of "
                f"{folder} that match {self.train_files!r} hold {stream.n_tokens:,}; lower data.seq_len or prepare "
                "more text"
            )
        return TrainSpans(stream, self.seq_len, self.shuffle_seed)

    @cached_property
    def _val_stream(self) -> TokenStream:
        # The first token is context only, hence one more than the tokens to score.
        limit = None if self.val_tokens_limit is None else self.val_tokens_limit + 1
        stream = TokenStream(find_shards(self.val_files, self.data_dir), self.vocab_size, limit)
        check_scorable(stream, self.token_bytes, self.val_files)
        if limit is not None:
            log.info("validation and test score the first %s tokens only", f"{stream.n_tokens - 1:,}")
        return stream

    def val_stream(self) -> TokenStream:
        """The validation tokens (the first val_tokens_limit + 1 of them), as one stream."""
        return self._val_stream

    @cached_property
    def unigram_bpb(self) -> float | None:
        """Bits per byte of the scored validation tokens under training frequencies (add-one smoothed).

        What a model reaches that knows how frequent each token is and nothing else. None where no manifest counts the
        tokens of the training shards.
        """
        frequencies = token_frequencies(self.sources, self.train_files, self.vocab_size)
        if frequencies is None:
            return None
        stream = self.val_stream()
        chunks = (self._load_chunk(index) for index in range(count_chunks(stream, self.ttt_chunk_tokens)))
        return unigram_bits_per_byte(frequencies, chunks)

    # Training -----------------------------------------------------------------------------------------------------

    def train_batch(self, i: int) -> Batch:
        """This rank's batch of the global micro-step i of a run from the start of the data. Moves nothing on."""
        rank, world_size = self._rank_and_world()
        return self.train_spans.batch(first_span(i, self.micro_batch_size, rank, world_size), self.micro_batch_size)

    def locate_delivered_batch(self) -> list[tuple[Path, int]]:
        """Shard and offset of the first token of each sequence of the training batch that the loader has just given."""
        if self._delivered_span is None:
            return []
        return [self.train_spans.locate(self._delivered_span + row) for row in range(self.micro_batch_size)]

    def calibration_batches(self, n: int) -> Iterator[Batch]:
        """n batches of this rank from all over the training stream, the same ones every time."""
        _, world_size = self._rank_and_world()
        steps_per_pass = max(self.train_spans.spans_per_pass // (self.micro_batch_size * world_size), 1)
        for index in range(n):
            yield self.train_batch(index * steps_per_pass // n if steps_per_pass > n else index)

    def train_dataloader(self) -> ResumableLoader:
        """Endless training batches, from the first span that no finished optimizer step has used."""
        if self.trainer is not None:
            self._resuming = self.trainer.fit_loop.restarting
            if not self._resuming and self.trainer.global_step == 0:
                self._position.restart(0)
        return ResumableLoader(ENDLESS, self._training_batches)

    def _training_batches(self) -> Iterator[Batch]:
        if self._resuming and self.trainer is not None:
            self._resuming = False
            rewind_to_accumulation_window(self.trainer)
        rank, world_size = self._rank_and_world()
        per_step = self.micro_batch_size * world_size
        start = self._position.spans(self._global_step())
        if self._overfit_batches():
            start = 0
        self._position.restart(start)
        firsts = self._firsts(start + rank * self.micro_batch_size, per_step)
        batches = read_ahead(self._load_training, firsts, self.prefetch_batches, self._device())
        for first, batch in zip(self._firsts(start + rank * self.micro_batch_size, per_step), batches, strict=False):
            self._delivered_span = first
            self._position.deliver(per_step, self._global_step())
            yield batch

    def _firsts(self, start: int, per_step: int) -> Iterator[int]:
        """First spans of this rank's batches; under trainer.overfit_batches the same few over and over."""
        n_batches = self._overfit_batches()
        return cycle(range(start, start + n_batches * per_step, per_step)) if n_batches else count(start, per_step)

    def _overfit_batches(self) -> int:
        """trainer.overfit_batches as a number of batches; a share of the data is one of a pass over it."""
        asked: float = getattr(self.trainer, "overfit_batches", 0)
        if isinstance(asked, int):
            return asked
        per_step = self.micro_batch_size * self._rank_and_world()[1]
        return max(int(asked * self.train_spans.spans_per_pass / per_step), 1) if asked else 0

    def _load_training(self, span: int) -> Batch:
        return self.train_spans.batch(span, self.micro_batch_size)

    # Validation and test ------------------------------------------------------------------------------------------

    @cached_property
    def val_sequences(self) -> ValSequences:
        """The validation stream, cut into sequences and batches."""
        return ValSequences(self.val_stream(), self.token_bytes, self.seq_len, self.val_micro_batch_size)

    def val_dataloader(self) -> Loader:
        """This rank's share of the validation sequences; a batch with B = 0 ends a share that is one short."""
        rank, world_size = self._rank_and_world()
        n_batches = self.val_sequences.batches_per_rank(world_size)
        indices = range(rank, n_batches * world_size, world_size)
        return Loader(n_batches, lambda: read_ahead(self.val_sequences.batch, indices, self._ahead(), self._device()))

    def test_dataloader(self) -> Loader:
        """All chunks of the validation stream, in order, on every rank."""
        n_chunks = count_chunks(self.val_stream(), self.ttt_chunk_tokens)
        return Loader(n_chunks, lambda: read_ahead(self._load_chunk, range(n_chunks), self._ahead(), self._device()))

    def _load_chunk(self, index: int) -> Chunk:
        return chunk_at(self.val_stream(), self.token_bytes, self.ttt_chunk_tokens, index)

    def predict_dataloader(self) -> Loader:
        """The loader of `val_dataloader`."""
        return self.val_dataloader()

    # Checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position in the data that the finished optimizer steps have reached, over all ranks."""
        return {
            "spans": self._position.spans(self._global_step()),
            "seq_len": self.seq_len,
            "data": self._train_digest,
            "shuffle_seed": self.shuffle_seed,
        }

    @cached_property
    def _train_digest(self) -> str:
        return self.data_digest("train")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` says, with whatever number of ranks and sequences per rank there are now."""
        spans = state_dict["spans"]
        for what, own in (("data", self._train_digest), ("shuffle_seed", self.shuffle_seed)):
            if state_dict.get(what, own) != own and self.trainer is not None and self.trainer.is_global_zero:
                log.warning(
                    "going on with other training %s than the checkpoint was trained with",
                    "text" if what == "data" else "order (data.shuffle_seed)",
                )
        if state_dict["seq_len"] != self.seq_len:
            spans = -(-spans * (state_dict["seq_len"] + 1) // (self.seq_len + 1))
            log.info(
                "the checkpoint was trained with seq_len %s; reading goes on with span %s of seq_len %s",
                state_dict["seq_len"],
                f"{spans:,}",
                self.seq_len,
            )
        self._position.restart(spans)

    # Who asks -----------------------------------------------------------------------------------------------------

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _global_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    def _device(self) -> torch.device | None:
        return None if self.trainer is None else self.trainer.strategy.root_device

    def _ahead(self) -> int:
        return min(self.prefetch_batches, 2)  # batches and chunks are few and big: two in flight hide the reading
