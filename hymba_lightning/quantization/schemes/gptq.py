"""Rows rounded column by column so that the layers' outputs on training batches change least."""

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.schemes.rows import Rows


class GPTQ(Rows):
    """See `quantize_gptq`; what has no Hessian is rounded as by 'rows'."""

    summary = "'rows' with the option gptq: the layers' outputs on training batches change least"

    def needs_hessians(self, config: QuantizationConfig) -> bool:
        return True


SCHEME = GPTQ()
