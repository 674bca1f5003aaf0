"""Rows rounded column by column so that the layers' outputs on training batches change least."""

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.schemes.rows import Rows


class GPTQ(Rows):
    """Matrices by `quantize_gptq` (quantization/gptq.py; Frantar et al., arXiv:2210.17323), with the Hessians of their
    inputs on training batches; what has none is rounded by 'rows'."""

    summary = "'rows' with the option gptq: the layers' outputs on training batches change least"

    def needs_hessians(self, config: QuantizationConfig) -> bool:
        return True


SCHEME = GPTQ()
