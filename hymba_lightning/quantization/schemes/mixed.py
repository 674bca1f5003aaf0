"""Mixed precision: every tensor gets the number of bits at which the file's predicted loss is least for its size.

How the loss is predicted and the bytes are shared out is in precision.py.
"""

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.format import Encoded
from hymba_lightning.quantization.precision import encode_mixed
from hymba_lightning.quantization.schemes import Weights
from hymba_lightning.quantization.schemes.rows import Rows
from hymba_lightning.quantization.tensors import encode_tensor


class Mixed(Rows):
    """Solves for the precision of all tensors at once, so that the file just fits; what config.name_bits names is left
    out of that and rounded by 'rows'."""

    summary = (
        "every tensor's precision, its rows' and columns' steps included, solved for so that the file just fits "
        "limit_bytes at least predicted loss; of the settings below only gptq, name_bits, zstd_level and limit_bytes "
        "matter to it"
    )
    measures_sensitivities = True

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
