"""Whether a network is still what something was made of: weights put together beforehand, or addresses in a graph."""

from __future__ import annotations

from torch import Tensor, nn


def has_hooks(net: nn.Module) -> bool:
    """Whether somebody looks on at a module's calls."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Watch:
    """Remembers a network's modules and weights. What is written through `parameter.data` leaves no trace."""

    def __init__(self, net: nn.Module) -> None:
        owners = list(net.modules())
        self._modules = [(m._modules, name, child) for m in owners for name, child in m._modules.items()]
        self._hooks = [hooks for m in owners for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        own = [(m._parameters, name, weight) for m in owners for name, weight in m._parameters.items()]
        self._weights: list[tuple[dict, str, Tensor]] = [
            (owner, name, weight) for owner, name, weight in own if weight is not None
        ]
        self._addresses = [weight.data_ptr() for _, _, weight in self._weights]
        self._counting = [weight for _, _, weight in self._weights if not weight.is_inference()]
        self._version = self._versions()

    @property
    def is_replaced(self) -> bool:
        """Whether a module or a weight is another one, or lies elsewhere (adapters, `to`, a load that assigns), or a
        hook wants to be called."""
        if any(self._hooks):
            return True
        # Loops, not `any`: this is asked for every token.
        for owner, name, module in self._modules:
            if owner.get(name) is not module:
                return True
        for owner, name, weight in self._weights:
            if owner.get(name) is not weight:
                return True
        return [weight.data_ptr() for _, _, weight in self._weights] != self._addresses

    @property
    def is_written(self) -> bool:
        """Whether a weight was changed where it is: an optimizer's step, a load that copies."""
        return self._versions() != self._version

    def _versions(self) -> int:
        return sum([weight._version for weight in self._counting])
