"""Integers with one scale for each row of a matrix, whose clip is searched for the least squared error."""

from torch import Tensor

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.rows import QuantizedTensor, quantize_rows
from hymba_lightning.quantization.schemes import Scheme


class Rows(Scheme):
    """Each tensor by itself: see `quantize_rows` in quantization/rows.py."""

    summary = "per output row, the clip searched for least squared error, the stored float16 scale used throughout"

    def round(self, name: str, tensor: Tensor, bits: int, config: QuantizationConfig) -> QuantizedTensor:
        return quantize_rows(tensor, bits, clip_quantile=config.clip_quantile, clip_steps=config.clip_steps, name=name)


SCHEME = Rows()
