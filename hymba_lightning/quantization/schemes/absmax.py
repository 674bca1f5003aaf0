"""Round to nearest with each row's largest magnitude as its largest code: no search, as most libraries round."""

from torch import Tensor

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.rows import QuantizedTensor, quantize_rows
from hymba_lightning.quantization.schemes import Scheme


class Absmax(Scheme):
    """No search: each row's largest magnitude is its largest integer, and the rest is rounded to the nearest. At 8 bits
    that is as good as a search, and quicker."""

    summary = "per output row, its largest magnitude the clip: no search, good at 8 bits"

    def round(self, name: str, tensor: Tensor, bits: int, config: QuantizationConfig) -> QuantizedTensor:
        return quantize_rows(tensor, bits, clip_quantile=1.0, clip_steps=1, name=name)


SCHEME = Absmax()
