"""What the network is (`HymbaConfig`) and how it is executed (`RuntimeConfig`). No torch here."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hymba_lightning.field_types import settle
from hymba_lightning.model.mixers import MIXERS

# Far beyond any network, and sizes made of a few such numbers still fit into 64 bits for the most part.
MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class HymbaConfig:
    """Architecture of a Hymba language model: everything an artifact needs to rebuild the network."""

    vocab_size: int = 1024
    """Number of token ids V; must equal the tokenizer's vocabulary size."""
    n_layers: int = 7
    """Number of blocks L. The first L//2 push U-Net skips, the later ones pop them."""
    d_model: int = 512
    """Width D of the residual stream."""
    n_heads: int = 8
    """Query heads H; d_model must be a multiple of it, and head_dim = d_model // n_heads must be even (RoPE)."""
    n_kv_heads: int = 4
    """Key/value heads G (grouped-query attention); must divide n_heads."""
    window: int = 512
    """Keys a token sees in sliding-window attention, itself included: 0 <= i - j < window. The released Hymba models
    count without itself."""
    layer_windows: list[int] | None = None
    """A window for each layer instead of the same one for all, e.g. short ones with a few long ones between."""
    global_layers: str | list[int] = "none"
    """Layers with full causal attention instead of the window: 'none', 'auto' (first, middle, last) or a list."""
    mlp_mult: int = 4
    """Hidden width of the MLP as a multiple of d_model."""
    mlp_width: int = 0
    """Hidden width of the MLP where it is no multiple of d_model; 0 takes mlp_mult."""
    mlp_slope: float = 0.9
    """Negative slope of the MLP's leaky ReLU, whose output is squared."""
    mixer: str = "mamba"
    """The recurrent branch beside attention, by the name of its file in model/mixers ('official': the whole network of
    the released Hymba models, whose differences that file tells)."""
    mixer_options: dict[str, int | float] | None = None
    """What a mixer has beyond these fields, by name; its file says what."""
    expand: int = 1
    """Width of the recurrent branch as a multiple of d_model: d_inner = expand * d_model."""
    d_state: int = 8
    """State size N of the recurrence, per channel."""
    d_conv: int = 4
    """Taps of the causal depthwise convolution in front of the recurrence."""
    dt_rank: int = 0
    """Rank of Mamba's time-step projection; 0 means max(d_model // 16, 1)."""
    tie_embeddings: bool = True
    """Use the token table as the output head; otherwise a separate zero-initialised head."""
    tied_embed_std: float = 0.005
    """Standard deviation of the tied token table at the start (an untied table starts at 1)."""
    smear_gate: bool = True
    """Blend each embedding with the previous token's: g*x_t + (1-g)*x_{t-1}, one learned g per channel."""
    bigram_hash: bool = True
    """Add an embedding of the hashed (previous id, id) pair."""
    bigram_buckets: int = 4096
    """Rows of the hashed bigram table."""
    bigram_dim: int = 128
    """Width of the hashed bigram table before its projection to d_model."""
    reset_at_bos: bool = True
    """Let SmearGate and BigramHash see nothing before a document's first token. False keeps the reference's
    defect 10: both reach across document boundaries."""
    bos_id: int = 1
    """Token id that starts a document (used by reset_at_bos and packed_documents)."""
    packed_documents: bool = False
    """Compute each document of a sequence as if it stood alone: scan, convolution and attention see nothing before the
    latest bos_id (intra-document masking, as in Llama 3, arXiv:2407.21783). False lets them read on from the documents
    before."""
    kv_share_every: int = 1
    """Layers in groups of this size share one key/value projection; 1 shares nothing."""
    kv_groups: list[list[int]] | None = None
    """Groups of layers in which the later ones read the first one's keys and values, as they are, and have no
    projection of their own (only mixer 'official')."""
    meta_tokens: int = 0
    """Learned vectors put before the embedded sequence and stripped before the head. Under mixer 'official' every
    token sees them, however far it is; otherwise those that lie within its window."""
    rope_base: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scale: float = 1.0
    """Context wanted over the context trained with: rope_base is multiplied by (2·rope_scale - 1)^(K/(K-2)) at head_dim
    K (NTK-aware scaling, always on)."""
    qk_gain: float = 1.5
    """Starting value of the learned per-head gain on the normalised queries."""
    logit_softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap); 0 leaves them as they are."""
    ortho_init: bool = True
    """Orthogonal start for linears with both sides >= 16 (zero-initialised ones stay zero)."""
    dt_init: str = "linear"
    """Start of the time-step bias: 'mamba' draws dt log-uniformly from [dt_min, dt_max]; 'linear' is a plain linear's
    bias, dt about 0.7, with which the state forgets within a few tokens at first. The reference has 'linear' (counted
    as its defect 3), and at its size that trains better for 600 steps at least (README, results)."""
    dt_min: float = 0.001
    """Smallest starting time step under dt_init 'mamba'."""
    dt_max: float = 0.1
    """Largest starting time step under dt_init 'mamba'."""
    merge: str = "scalar"
    """How the two branches are blended: one learned gate per block ('scalar') or one per channel ('channel'), both
    behind an output projection of the scan's own; or side by side into one projection of both ('concat'), as many
    weights in one matrix product less."""
    branch_norm: bool = False
    """RMS-normalise each branch's output before the merge (Hymba paper, arXiv:2411.13676, section 2)."""
    branch_gate: int = 0
    """Channels of the mixer's input that gates on both branches read: every head_dim channels of a branch's output are
    multiplied by 2·sigmoid of a learned combination of them, which starts at 1. 0 has no gates."""
    value_gate: bool = False
    """Multiply attention's values by their own sigmoid."""
    dynamics_norm: bool = False
    """RMS-normalise what the scan takes from its input: the time step's low-rank vector, B and C (as the released Hymba
    models do, there with learned weights)."""
    norm_eps: float = 1e-6
    """What norms with learned weights add to the mean square (only mixer 'official')."""
    dynamics_dtype: str = "float32"
    """Storage of A_log and of the dt projection's weight. 'bfloat16' keeps the reference's defect 2 (it also stores
    them in bfloat16, about 13 thousandths of a bit per byte in another's measurement)."""

    def __post_init__(self) -> None:
        settle(self)
        for name, value in vars(self).items():
            if isinstance(value, int | float) and abs(value) > MAX_INTEGER:
                raise ValueError(f"{name} is {value}; it must lie within ±{MAX_INTEGER}")
        for name in (
            "vocab_size",
            "n_layers",
            "d_model",
            "n_heads",
            "n_kv_heads",
            "window",
            "mlp_mult",
            "expand",
            "d_state",
            "d_conv",
            "bigram_buckets",
            "bigram_dim",
            "kv_share_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}: change either")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim = d_model/n_heads = {self.head_dim} is odd, and RoPE rotates pairs: change n_heads"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}: change either")
        if self.dt_rank < 0 or self.meta_tokens < 0:
            raise ValueError(f"dt_rank={self.dt_rank} and meta_tokens={self.meta_tokens} must not be negative")
        if not 0 <= self.branch_gate <= self.d_model:
            raise ValueError(f"branch_gate={self.branch_gate} must be 0 (no gates) to d_model={self.d_model}")
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer={self.mixer!r} is unknown: choose from {', '.join(MIXERS)}")
        for name, allowed in (
            ("dt_init", ("mamba", "linear")),
            ("merge", ("scalar", "channel", "concat")),
            ("dynamics_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose from {', '.join(allowed)}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"0 < dt_min <= dt_max is needed, got dt_min={self.dt_min}, dt_max={self.dt_max}")
        for name in ("rope_base", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap must be positive and finite, or 0 for none, got {self.logit_softcap}")
        if not 1 <= self.rope_scale < math.inf:
            raise ValueError(f"rope_scale must be finite and at least 1, got {self.rope_scale}")
        if self.rope_scale != 1 and self.head_dim == 2:
            raise ValueError("rope_scale needs a head_dim over 2: change n_heads or leave rope_scale at 1")
        if self.mlp_width < 0:
            raise ValueError(f"mlp_width={self.mlp_width} must not be negative; 0 takes mlp_mult")
        if not 0 <= self.tied_embed_std < math.inf:
            raise ValueError(f"tied_embed_std must be finite and not negative, got {self.tied_embed_std}")
        if not (math.isfinite(self.mlp_slope) and math.isfinite(self.qk_gain)):
            raise ValueError(f"mlp_slope={self.mlp_slope} and qk_gain={self.qk_gain} must be finite")
        if not 0 <= self.bos_id < self.vocab_size:
            raise ValueError(f"bos_id={self.bos_id} is not a token id below vocab_size={self.vocab_size}")
        if self.packed_documents and not self.reset_at_bos:
            raise ValueError("packed_documents needs reset_at_bos: embeddings must not reach across documents either")
        if self.packed_documents and self.meta_tokens:
            raise ValueError(
                f"packed_documents leaves no way to meta_tokens={self.meta_tokens}, which stand before a sequence and "
                "not before each of its documents: set one of the two to 0 or false"
            )
        if self.n_layers < 2:
            raise ValueError("n_layers must be at least 2: the U-Net skips need a first and a second half")
        if self.layer_windows is not None and (len(self.layer_windows) != self.n_layers or min(self.layer_windows) < 1):
            raise ValueError(
                f"layer_windows={self.layer_windows} must be n_layers={self.n_layers} numbers of at least "
                "1, or null for the same window in all layers"
            )
        self.global_layer_set()
        self._check_kv_groups()
        if self.mixer == "official":
            lacking = {name: off for name, off in NOT_OFFICIAL.items() if getattr(self, name) != off}
            if lacking:
                wanted = ", ".join(f"{name}={off!r}" for name, off in lacking.items())
                raise ValueError(f"mixer 'official' is the released models' network, which has no such part: {wanted}")
        elif self.kv_groups is not None or self.norm_eps != 1e-6:
            raise ValueError(f"kv_groups and norm_eps are of mixer 'official', and this is {self.mixer!r}: leave both")

    def _check_kv_groups(self) -> None:
        """Groups are of rising layers with one window, and no layer is in two."""
        groups = self.kv_groups or []
        layers = [layer for group in groups for layer in group]
        wrong = [
            group
            for group in groups
            if len(group) < 2
            or group != sorted(set(group))
            or not 0 <= group[0] <= group[-1] < self.n_layers
            or len({self.window_of(layer) for layer in group}) > 1
        ]
        if wrong or len(layers) != len(set(layers)):
            raise ValueError(
                f"kv_groups={groups} must be lists of two or more rising layers from 0 to {self.n_layers - 1}, all of "
                f"a list with the same window, and no layer in two of them{f': look at {wrong}' if wrong else ''}"
            )

    @property
    def head_dim(self) -> int:
        """Width K of one attention head."""
        return self.d_model // self.n_heads

    @property
    def d_inner(self) -> int:
        """Channels E of the recurrent branch."""
        return self.expand * self.d_model

    @property
    def value_dim(self) -> int:
        """Width V of a head's values: wider than its keys under mixer 'official', so that attention's output has the
        recurrent branch's width."""
        return self.d_inner // self.n_heads if self.mixer == "official" else self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP after resolving 0."""
        return self.mlp_width or self.mlp_mult * self.d_model

    @property
    def resolved_rope_base(self) -> float:
        """Base of the rotary position embedding after rope_scale."""
        if self.rope_scale == 1:
            return self.rope_base
        return self.rope_base * (2 * self.rope_scale - 1) ** (self.head_dim / (self.head_dim - 2))

    @property
    def kv_owners(self) -> list[int]:
        """For each layer the one whose keys and values it reads, by kv_groups."""
        owner = {layer: group[0] for group in self.kv_groups or [] for layer in group}
        return [owner.get(layer, layer) for layer in range(self.n_layers)]

    @property
    def resolved_dt_rank(self) -> int:
        """Rank R of the time-step projection after resolving 0."""
        return self.dt_rank or max(self.d_model // 16, 1)

    def window_of(self, layer: int) -> int | None:
        """Keys that a token sees in a layer, itself included; None in a global layer."""
        if layer in self.global_layer_set():
            return None
        return self.window if self.layer_windows is None else self.layer_windows[layer]

    def global_layer_set(self) -> set[int]:
        """Indices of the layers with full causal attention. Raises ValueError for an unknown word or a bad index."""
        if isinstance(self.global_layers, str):
            if self.global_layers == "none":
                return set()
            if self.global_layers == "auto":
                return {0, self.n_layers // 2, self.n_layers - 1}
            raise ValueError(f"global_layers={self.global_layers!r} is unknown: use 'none', 'auto' or a list of layers")
        if len(self.global_layers) > self.n_layers:
            raise ValueError(f"global_layers names {len(self.global_layers)} layers, and there are {self.n_layers}")
        wrong = [i for i in self.global_layers if not 0 <= i < self.n_layers]
        if wrong:
            raise ValueError(f"global_layers names {wrong}, but the layers are 0 to {self.n_layers - 1}")
        return set(self.global_layers)

    @property
    def gate_groups(self) -> int:
        """Groups of head_dim channels over both branches, as branch_gate counts them."""
        return self.n_heads + (self.d_inner if self.merge == "concat" else self.d_model) // self.head_dim

    def to_dict(self) -> dict:
        """Plain values, for checkpoints and artifacts; readable by versions before a later field that is not used."""
        return {name: value for name, value in dataclasses.asdict(self).items() if LATER.get(name, self) != value}

    @classmethod
    def from_dict(cls, values: dict) -> "HymbaConfig":
        """Inverse of `to_dict`, for values from a file: nothing is converted.

        Raises ValueError for a field this version does not know, or for a value of another type or out of range.
        """
        if not isinstance(values, dict):
            raise ValueError("the network's config is no dictionary")
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in set(values) - set(kinds))
        if unknown:
            raise ValueError(f"the network's config has fields this version does not know: {', '.join(unknown)}")
        for name, value in values.items():
            fits = LISTS.get(name, lambda value: False)
            if not (_is_of(kinds[name], value) or fits(value)):
                kind = kinds[name]
                within = f" within ±{MAX_INTEGER}" if kind in (int, float) else ""
                raise ValueError(
                    f"{name}={str(value)[:40]!r} is {type(value).__name__}, where {kind.__name__}{within} is needed"
                )
        return cls(**values)


def _is_of(kind: type, value: Any) -> bool:
    """Whether a value from a file is of a field's kind: an integer is a number too, True is none."""
    if kind in (int, float) and type(value) in (int, kind):
        return abs(value) <= MAX_INTEGER
    return type(value) is kind


def _is_list(value: Any) -> bool:
    return type(value) is list and all(_is_of(int, number) for number in value)


def _is_options(value: Any) -> bool:
    return type(value) is dict and all(type(name) is str and _is_of(float, value[name]) for name in value)


def _is_groups(value: Any) -> bool:
    return type(value) is list and all(_is_list(group) for group in value)


# Fields that came later, with what they are in every network of before.
LATER: dict[str, Any] = {
    "packed_documents": False,
    "mixer": "mamba",
    "mixer_options": None,
    "mlp_width": 0,
    "kv_groups": None,
    "rope_scale": 1.0,
    "norm_eps": 1e-6,
}
# Parts of ours that mixer 'official' has no place for, and what is none of them.
NOT_OFFICIAL: dict[str, Any] = {
    "packed_documents": False,
    "smear_gate": False,
    "bigram_hash": False,
    "kv_share_every": 1,
    "branch_norm": False,
    "branch_gate": 0,
    "value_gate": False,
    "dynamics_norm": False,
}

# What fields may be beyond the type of their default.
LISTS = {"global_layers": _is_list, "layer_windows": _is_list, "mixer_options": _is_options, "kv_groups": _is_groups}


def backend_of(op: str) -> Any:
    """A field that names a backend of `op`; the command line's help lists them from the op's table."""
    return dataclasses.field(default="auto", metadata={"op": op})


@dataclass(frozen=True)
class RuntimeConfig:
    """How a network is executed: speed, memory and rounding, never what it computes. Not part of an artifact."""

    compute_dtype: str = "float32"
    """Dtype of activations and matrix products: 'float32' or 'bfloat16'. Weights, the scan's state and the loss stay
    float32 either way."""
    scan_backend: str = backend_of("selective_scan")
    """Selective scan."""
    conv_backend: str = backend_of("causal_conv1d")
    """Causal convolution."""
    attention_backend: str = backend_of("sliding_window_attention")
    """Sliding-window attention."""
    loss_backend: str = backend_of("softcapped_cross_entropy")
    """Cross-entropy of the softcapped logits."""
    mlp_backend: str = backend_of("leaky_square_mlp")
    """MLP with the squared leaky ReLU, where a gradient is wanted."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    step_graphs: bool = True
    """Generation on a GPU replays a token's step from a CUDA graph, so that the host does not launch every kernel."""

    def __post_init__(self) -> None:
        settle(self)
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} is unknown: choose float32 or bfloat16")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RuntimeConfig":
        """From a file's values; fields of other versions are left out, since none changes what is computed."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
