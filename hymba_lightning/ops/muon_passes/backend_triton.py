"""The entry of the Triton kernels: see triton_launches.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import triton_backend


def _load() -> Callable:
    from hymba_lightning.ops.muon_passes.triton_launches import TritonPasses

    return TritonPasses


BACKEND = triton_backend(
    _load,
    refuses=(
        (
            lambda call: not call.plain,
            "it moves contiguous float32 parameters; make them so, or use backend 'torch'",
        ),
        (
            lambda call: call.neurons,
            "it keeps no second moments of neurons; set muon_neuron_beta to 0, or use backend 'torch'",
        ),
    ),
)
