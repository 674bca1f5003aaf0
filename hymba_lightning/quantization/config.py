"""How weights are stored in an artifact: the settings, and which tensor is rounded to how many bits.

The rounding itself is in schemes/.
"""

import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_lightning.field_types import settle

if TYPE_CHECKING:
    from hymba_lightning.model.roles import Role

# A scheme is a file of this folder: known by its name without importing torch.
SCHEMES = tuple(sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "schemes")])))
# Roles, by their values, of what stays float.
FLOAT32_ROLES, FLOAT16_ROLES = ("control", "dynamics"), ("embedding",)


@dataclass(frozen=True)
class QuantizationConfig:
    """How a network's weights are rounded and packed into an artifact.

    Raises:
        ValueError: a value is out of range, the scheme does not exist, or it cannot honour a setting.
    """

    scheme: str = "rows"
    """How weights are rounded."""
    gptq: bool = False
    """Round by GPTQ, which needs training batches; the scheme 'gptq' is 'rows' with this. 'mixed' then also measures on
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
    """Compression level, 1 to 22. Levels 1 and 3 are tried too, and of content over 8 MiB this one only where a sample
    says that it gains: the smallest is kept."""
    limit_bytes: int = 16_000_000
    """Most bytes that the artifact and the code for its evaluation may have together; decimal."""

    def __post_init__(self) -> None:
        settle(self)
        if self.scheme == "int6":
            if self.bits != 6:
                raise ValueError(f"the scheme 'int6' rounds to 6 bits, not to bits={self.bits}: give the scheme 'rows'")
            object.__setattr__(self, "scheme", "rows")  # its older name
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme={self.scheme!r} is unknown: choose from {', '.join(SCHEMES)}")
        named = [(f"name_bits[{key!r}]", bits) for key, bits in self.name_bits.items()]
        for what, bits in [("bits", self.bits), *named]:
            if not 2 <= bits <= 8:
                raise ValueError(f"{what}={bits} is outside 2 to 8")
        if not 0.5 <= self.clip_quantile <= 1:
            raise ValueError(f"clip_quantile={self.clip_quantile} is outside 0.5 to 1")
        if self.clip_steps < 1:
            raise ValueError(f"clip_steps={self.clip_steps} must be at least 1")
        if not 1 <= self.coarsen <= 64:
            raise ValueError(f"coarsen={self.coarsen} must be 1 to 64")
        if not 1 <= self.zstd_level <= 22:
            raise ValueError(f"zstd_level={self.zstd_level} is outside 1 to 22")
        if self.keep_float_numel < 0 or self.limit_bytes < 1:
            raise ValueError(
                f"keep_float_numel={self.keep_float_numel} must not be negative and "
                f"limit_bytes={self.limit_bytes} must be positive"
            )
        if self.scheme != "rows":
            from hymba_lightning.quantization.schemes import scheme_of

            scheme_of(self).check(self)

    @property
    def calibrated(self) -> bool:
        """Whether rounding needs training batches to be run through the network first (GPTQ's Hessians)."""
        from hymba_lightning.quantization.schemes import scheme_of

        return scheme_of(self).needs_hessians(self)

    def storage_of(self, name: str, numel: int, role: "Role") -> tuple[str, int]:
        """How a tensor is stored.

        Args:
            name: In the state dict.
            numel: Its number of entries.
            role: What it is in the network.

        Returns:
            ("float32", 32), ("float16", 16), or ("int", bits) for integers of at most `bits` bits with row scales.
        """
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
