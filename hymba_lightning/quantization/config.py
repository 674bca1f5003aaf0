"""What the export does with each tensor: the settings and the rules by name and size. No numbers are made here."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hymba_lightning.model.roles import Role

SCHEMES = ("int6", "gptq", "mixed", "reference")
# Roles, by their values, of what stays float.
FLOAT32_ROLES, FLOAT16_ROLES = ("control", "dynamics"), ("embedding",)


@dataclass(frozen=True)
class QuantizationConfig:
    """How a network becomes an artifact."""

    scheme: str = "int6"
    """'int6': per output row, the clip searched per row for least squared error, the stored float16 scale used
    throughout. 'gptq': rounded column by column so that the layers' outputs on training batches change least.
    'mixed': every tensor's precision, the rows' steps included, solved for so that the file just fits limit_bytes at
    least predicted loss; of the settings below only gptq, name_bits, zstd_level and limit_bytes matter to it.
    'reference': the reference's quantizer bit for bit, with its defect 4 (scale floor of 1/q_max whatever the row's
    size, one clip quantile per tensor, float16 scales stored but float32 ones rounded with)."""
    gptq: bool = False
    """Round by GPTQ, which needs training batches; the scheme 'gptq' is 'int6' with this. 'mixed' then also measures on
    them what each weight matters to the loss, and otherwise on random tokens."""
    bits: int = 6
    """Bits per quantized weight, 2 to 8: q runs from -(2^(bits-1) - 1) to 2^(bits-1) - 1."""
    clip_quantile: float = 0.999
    """Lowest quantile of a row's magnitudes tried as the clip; 1 tries the largest magnitude only. 6 bits want 0.998 to
    0.999, 4 or 5 bits about 0.99."""
    clip_steps: int = 17
    """Quantiles tried, evenly spaced from clip_quantile to 1."""
    keep_float_numel: int = 65_536
    """Tensors with at most this many entries stay float16."""
    float32_names: list[str] | None = None
    """Tensors whose name contains one of these stay float32; null for the network's control vectors and what sets the
    decay of its states. The reference keeps only the control vectors so."""
    float16_names: list[str] | None = None
    """Tensors whose name contains one of these stay float16 whatever their size; null for the token table."""
    name_bits: dict[str, int] = field(default_factory=dict)
    """Bits for tensors whose name contains the key, whatever the other rules say; the first key that fits wins.
    {tok_emb: 8} quantizes the token table to 8 bits."""
    coarsen: float = 1.0
    """Factor >= 1 on every row scale after the clip search: fewer levels in use, fewer bytes, more error. Fractions of
    a bit per weight, since the coder spends only the levels' entropy."""
    fit_limit: bool = True
    """Raise `coarsen` as far as the limit needs; it stays where it is for an artifact that fits. False leaves it to
    check_limit to refuse the artifact. Does not touch the scheme 'reference'."""
    zstd_level: int = 22
    """Compression level, 1 to 22."""
    limit_bytes: int = 16_000_000
    """Most bytes that the artifact and the code for its evaluation may have together; decimal."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme={self.scheme!r} is unknown: choose from {', '.join(SCHEMES)}")
        if self.gptq and self.scheme == "reference":
            raise ValueError("gptq goes with every scheme but 'reference', which is the reference's quantizer as it is")
        named = [(f"name_bits[{key!r}]", bits) for key, bits in self.name_bits.items()]
        for what, bits in [("bits", self.bits), *named]:
            if not 2 <= bits <= 8:
                raise ValueError(f"{what}={bits} is outside 2 to 8")
        if not 0.5 <= self.clip_quantile <= 1:
            raise ValueError(f"clip_quantile={self.clip_quantile} is outside 0.5 to 1")
        if self.clip_steps < 1:
            raise ValueError(f"clip_steps={self.clip_steps} must be at least 1")
        if not 1 <= self.coarsen <= 64 or (self.coarsen > 1 and self.scheme == "reference"):
            raise ValueError(f"coarsen={self.coarsen} must be 1 to 64, and 1 for the scheme 'reference'")
        if not 1 <= self.zstd_level <= 22:
            raise ValueError(f"zstd_level={self.zstd_level} is outside 1 to 22")
        if self.keep_float_numel < 0 or self.limit_bytes < 1:
            raise ValueError(
                f"keep_float_numel={self.keep_float_numel} must not be negative and "
                f"limit_bytes={self.limit_bytes} must be positive"
            )

    @property
    def calibrated(self) -> bool:
        """Whether it needs what calibration on training batches gives."""
        return self.gptq or self.scheme == "gptq"

    def storage_of(self, name: str, numel: int, role: "Role") -> tuple[str, int]:
        """How a tensor of `numel` entries is kept: ('float32', 32), ('float16', 16) or ('int', bits)."""
        for pattern, bits in self.name_bits.items():
            if pattern in name:
                return "int", bits
        if _chosen(self.float32_names, name, FLOAT32_ROLES, role):
            return "float32", 32
        if _chosen(self.float16_names, name, FLOAT16_ROLES, role) or numel <= self.keep_float_numel:
            return "float16", 16
        return "int", self.bits


def _chosen(patterns: list[str] | None, name: str, values: tuple[str, ...], role: "Role") -> bool:
    return role.value in values if patterns is None else any(pattern in name for pattern in patterns)
