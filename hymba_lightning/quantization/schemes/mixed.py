"""Mixed precision: every tensor gets the number of bits at which the file's predicted loss is least for its size.

How the loss is predicted and the bytes are shared out is in precision.py.
"""

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.format import Encoded
from hymba_lightning.quantization.precision import encode_mixed
from hymba_lightning.quantization.schemes import Weights
from hymba_lightning.quantization.schemes.rows import Rows
from hymba_lightning.quantization.tensors import encode_tensor

DEFAULTS = QuantizationConfig()
# Settings that would be taken for more than they do here, and those that matter to the tensors of name_bits alone.
DECIDED = ("bits", "float32_names", "float16_names", "fit_limit")
OF_NAMED = ("clip_quantile", "clip_steps", "coarsen")


class Mixed(Rows):
    """Solves for the precision of all tensors at once, so that the file just fits; what config.name_bits names is left
    out of that and rounded by 'rows'."""

    summary = (
        "every tensor's precision, its rows' and columns' steps included, solved for so that the file just fits "
        "limit_bytes at least predicted loss; of the settings below only gptq, name_bits, zstd_level and limit_bytes "
        "matter to it"
    )
    measures_sensitivities = True

    def check(self, config: QuantizationConfig) -> None:
        """
        Raises:
            ValueError: a setting is given that this scheme decides by itself.
        """
        super().check(config)
        unused = DECIDED if config.name_bits else (*DECIDED, *OF_NAMED)
        given = [name for name in unused if getattr(config, name) != getattr(DEFAULTS, name)]
        if given:
            raise ValueError(
                f"the scheme 'mixed' decides {', '.join(given)} by itself: leave that out, give single tensors their "
                "widths by name_bits, or take the scheme 'rows'"
            )

    def encode(self, weights: Weights, config: QuantizationConfig) -> tuple[list[Encoded], QuantizationConfig]:
        named = {
            name: self.rounded(name, tensor, weights.roles[name], config)
            for name, tensor in weights.tensors.items()
            if any(pattern in name for pattern in config.name_bits)
        }
        fixed = {
            name: encode_tensor(name, weights.tensors[name], "int", rounded)
            for name, rounded in (named | weights.quantized).items()
        }
        encoded = encode_mixed(
            weights.tensors,
            weights.sensitivities,
            weights.hessians or {},
            fixed,
            weights.measure,
            weights.budget,
            weights.roles,
        )
        return encoded, config


SCHEME = Mixed()
