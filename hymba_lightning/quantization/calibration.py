"""What a scheme has to know about a network before it rounds: from training batches, or from the network alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hymba_lightning.model.hymba import Hymba
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.gptq import collect_hessians
from hymba_lightning.quantization.sensitivity import collect_sensitivities, random_batches


class Calibration(NamedTuple):
    """Keyword arguments of `save_artifact`."""

    hessians: dict[str, Tensor] | None
    sensitivities: dict[str, Tensor] | None

    def tensors(self) -> list[Tensor]:
        """Each tensor once, whatever number of names it has."""
        known = [*(self.hessians or {}).values(), *(self.sensitivities or {}).values()]
        return list({id(tensor): tensor for tensor in known}.values())

    def cpu(self) -> Calibration:
        """A copy in main memory, in which one tensor of several names is one again."""
        moved = {id(tensor): tensor.cpu() for tensor in self.tensors()}
        return Calibration(*(known and {name: moved[id(tensor)] for name, tensor in known.items()} for known in self))


def calibrate(net: Hymba, config: QuantizationConfig, batches: list[Tensor]) -> Calibration:
    """What `config` needs, from `batches` of token ids (B, T) on the net's device.

    Without batches there are no Hessians, and sensitivities come from random ids: no data is used then.
    """
    sensitivities = None
    if config.scheme == "mixed":
        device = net.tok_emb.weight.device
        sensitivities = collect_sensitivities(net, batches or (ids.to(device) for ids in random_batches(net.config)))
    return Calibration(collect_hessians(net, batches) if config.calibrated and batches else None, sensitivities)
