"""Whether a network is still what something was made of: weights put together beforehand, or addresses in a graph."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as calls

# Hooks of all modules there are: profilers and printers of shapes set them.
GLOBAL_HOOKS = (calls._global_forward_hooks, calls._global_forward_pre_hooks)


def has_hooks(net: nn.Module) -> bool:
    """Whether somebody looks on at a module's calls, or has put another `forward` in an object, as accelerate does."""
    for module in net.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        if "forward" in module.__dict__:
            return True
    return any(GLOBAL_HOOKS)


class Watch:
    """Remembers a network's modules and weights. What is written through `parameter.data` leaves no trace."""

    def __init__(self, net: nn.Module) -> None:
        owners = list(net.modules())
        self._modules = [(m._modules, name, child) for m in owners for name, child in m._modules.items()]
        self._hooks = [hooks for m in owners for hooks in (m._forward_hooks, m._forward_pre_hooks)] + [*GLOBAL_HOOKS]
        self._attributes = [vars(module) for module in owners]
        self._net, self._runtime = net, getattr(net, "runtime", None)
        own = [(m._parameters, name, weight) for m in owners for name, weight in m._parameters.items()]
        self._weights: list[tuple[dict, str, Tensor]] = [
            (owner, name, weight) for owner, name, weight in own if weight is not None
        ]
        self._addresses = [weight.data_ptr() for _, _, weight in self._weights]
        self._counting = [weight for _, _, weight in self._weights if not weight.is_inference()]
        self._version = self._versions()

    @property
    def is_replaced(self) -> bool:
        """Whether a module or a weight is another one, or lies elsewhere (adapters, `to`, a load that assigns), a hook
        or another `forward` wants to be called, or the network is to be executed in another way."""
        if any(self._hooks) or getattr(self._net, "runtime", None) is not self._runtime:
            return True
        # Loops, not `any`: this is asked for every token.
        for attributes in self._attributes:
            if "forward" in attributes:
                return True
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
