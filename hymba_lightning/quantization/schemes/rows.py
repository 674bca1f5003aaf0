"""Per output row, the clip searched for least squared error."""

from torch import Tensor

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.rows import QuantizedTensor, quantize_rows
from hymba_lightning.quantization.schemes import Scheme


class Rows(Scheme):
    """See `quantize_rows`."""

    summary = "per output row, the clip searched for least squared error, the stored float16 scale used throughout"

    def round(self, name: str, tensor: Tensor, bits: int, config: QuantizationConfig) -> QuantizedTensor:
        return quantize_rows(tensor, bits, clip_quantile=config.clip_quantile, clip_steps=config.clip_steps, name=name)


SCHEME = Rows()
