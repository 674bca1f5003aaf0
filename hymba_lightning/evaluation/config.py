"""How a stream is scored and how the network adapts on the way. No `from __future__`: the command line reads it."""

import math
from dataclasses import dataclass

from hymba_lightning.field_types import settle

MODES = ("cold", "sliding", "carried")
PARAMETERS = ("all", "mlp", "scalars", "low_rank")
OPTIMIZERS = ("sgd", "muon")
LR_DECAYS = ("cosine", "linear", "constant")
AFTER_UPDATE = ("keep", "rewarm")


@dataclass(frozen=True)
class TTTConfig:
    """How the validation stream is scored, and how the network adapts between its chunks. The defaults are the
    reference's recipe; configs/ttt.yaml holds a better one."""

    mode: str = "cold"
    """What a token sees of the text before it. 'cold': sequences of seq_len, each from an empty state (the
    reference's). 'sliding': windows of seq_len that advance by `stride`. 'carried': the stream is one sequence, whose
    state goes from piece to piece and from chunk to chunk."""
    stride: int = 0
    """Tokens scored per window in mode 'sliding', each with at least seq_len - stride tokens of context."""
    warm_tokens: int = 4096
    """Mode 'carried': tokens in front of a span that make its state where there is none to carry, which is so for
    every rank's span under several ranks, and after an update with state_after_update 'rewarm'."""
    state_after_update: str = "keep"
    """Mode 'carried' on one rank, after the weights moved. 'keep': go on with the state that the older weights made.
    'rewarm': make it anew with the new weights from the last warm_tokens tokens. Both are legal: either state depends
    on earlier tokens only."""
    score_batch_seqs: int = 4
    """Sequences per rank in one scoring pass (modes 'cold' and 'sliding')."""
    drop_partial: bool = False
    """Leave out the tokens after a chunk's last full sequence: the reference's defect 5, for comparison only. The score
    then misses a part of the text."""
    limit_seconds: float | None = 600.0
    """Most seconds the evaluation may take, scoring and adaptation together: epochs are left out rather than overrun.
    null sets no limit."""
    epochs: int = 3
    """Passes of training over a chunk after it was scored; 0 only scores."""
    parameters: str = "all"
    """What adapts: 'all', 'mlp' (the MLPs' matrices), 'scalars' (gates, scales, time-step bias, convolutions, A_log and
    D: everything that is no matrix), or 'low_rank' (a product of two thin factors, added to each matrix of a block)."""
    rank: int = 8
    """Columns of the factors under parameters 'low_rank'."""
    freeze_blocks: int = 2
    """The first blocks, left as they are."""
    optimizer: str = "sgd"
    """'sgd' with momentum, or 'muon': orthogonalised momentum, for the blocks' matrices alone."""
    lr: float = 0.002
    """Learning rate of the first chunk."""
    rest_lr: float = 0.0
    """Under optimizer 'muon': learning rate of SGD, with the same momentum and decay, for everything that Muon does not
    move (the token table, gates, scales, convolutions); 0 leaves that as it is."""
    lr_decay: str = "cosine"
    """Learning rate over the chunks: 'cosine' (half a cosine down to zero at the last, the reference's), 'linear' (down
    to zero) or 'constant'."""
    momentum: float = 0.9
    """Momentum. One optimizer, with its momentum, goes through the whole stream."""
    batch_seqs: int = 4
    """Sequences per rank in one update."""
    update_seqs: int = 0
    """Sequences in one update over all ranks, so that a recipe is the same on any number of them; 0 takes batch_seqs
    for each rank."""
    train_seq_len: int = 0
    """Length of the sequences trained on; 0 takes seq_len. Shorter ones make more updates of a chunk."""
    grad_clip: float = 1.0
    """Largest norm of an update's gradient; 0 does not clip."""
    anchor: float = 0.0
    """After each update, the share of their distance that the weights go back toward the artifact's."""
    reset_at_bos: bool = False
    """Documents adapt for themselves: where a chunk starts a new document, the weights go back to the artifact's and
    training takes the chunk's tokens from its last document start on."""

    def __post_init__(self) -> None:
        settle(self, "ttt.")
        for name in (
            "epochs",
            "lr",
            "momentum",
            "freeze_blocks",
            "stride",
            "warm_tokens",
            "train_seq_len",
            "anchor",
            "rest_lr",
            "update_seqs",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"ttt.{name} must be finite and not negative, got {getattr(self, name)}")
        if not self.grad_clip >= 0:
            raise ValueError(f"ttt.grad_clip must not be negative, got {self.grad_clip}")
        if max(self.lr, self.rest_lr) > 1e6:
            raise ValueError(f"ttt.lr={self.lr} and ttt.rest_lr={self.rest_lr} must be at most 1e6")
        for name in ("batch_seqs", "score_batch_seqs", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"ttt.{name} must be at least 1, got {getattr(self, name)}")
        for name, allowed in (
            ("mode", MODES),
            ("parameters", PARAMETERS),
            ("optimizer", OPTIMIZERS),
            ("lr_decay", LR_DECAYS),
            ("state_after_update", AFTER_UPDATE),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"ttt.{name}={getattr(self, name)!r} is unknown: choose from {', '.join(allowed)}")
        if (self.mode == "sliding") != (self.stride > 0):
            raise ValueError(
                f"ttt.stride={self.stride} with ttt.mode={self.mode!r}: a stride of at least 1 and mode "
                "'sliding' belong together"
            )
        if self.mode != "cold" and self.drop_partial:
            raise ValueError(
                f"ttt.drop_partial leaves gaps, and ttt.mode={self.mode!r} takes context across them: set "
                "drop_partial to false"
            )
        if self.optimizer == "muon" and self.parameters in ("scalars", "low_rank"):
            raise ValueError(
                f"ttt.optimizer 'muon' moves whole matrices, ttt.parameters={self.parameters!r} none: use "
                "'sgd', or parameters 'all' or 'mlp'"
            )
        if self.rest_lr and (self.optimizer != "muon" or self.parameters != "all" or not self.lr):
            raise ValueError(
                f"ttt.rest_lr={self.rest_lr} is for what Muon leaves of all parameters: use optimizer "
                "'muon' with an lr, and parameters 'all'; or set it to 0"
            )
        if self.anchor > 1:
            raise ValueError(f"ttt.anchor is a share of a distance and at most 1, got {self.anchor}")
        if self.limit_seconds is not None and not self.limit_seconds > 0:
            raise ValueError(f"ttt.limit_seconds must be positive, or null for none; got {self.limit_seconds}")

    def lr_at(self, chunk: int, n_chunks: int) -> float:
        """Learning rate for training on chunk `chunk` of `n_chunks`."""
        done = chunk / max(n_chunks - 1, 1)
        scale = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.lr_decay]
        return self.lr * scale
