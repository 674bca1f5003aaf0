"""What a parameter is, said where it is made: optimizer, test-time training, quantizer and plots go by it."""

from __future__ import annotations

from enum import Enum

from torch import Tensor, nn


class Role(Enum):
    """What a parameter is for."""

    EMBEDDING = "embedding"  # the token table, also where it is the head
    HEAD = "head"  # of its own
    TABLE = "table"  # other vectors that are looked up or put in front
    MATRIX = "matrix"  # a projection of activations
    CONVOLUTION = "convolution"
    DYNAMICS = "dynamics"  # what sets how a state decays
    DYNAMICS_MATRIX = "dynamics matrix"  # a projection that makes time steps
    CONTROL = "control"  # scales and gates whose last digits matter: float32 in the artifact
    SCALAR = "scalar"  # other biases and small gates


class RoleError(ValueError):
    """A parameter without a role."""


class Module(nn.Module):
    """A module whose parameters have roles: `self.gain = parameter(tensor, Role.CONTROL)`."""

    part = ""
    """Of the network, for maps of it; "" is that of the module around it."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None:
            # load_state_dict(assign=True) puts plain parameters in the place of ours.
            declare(self, **{name: getattr(param, "role", None) or self.__dict__.get("roles", {}).get(name)})


def parameter(tensor: Tensor, role: Role) -> nn.Parameter:
    """A trained tensor of a `Module`."""
    made = nn.Parameter(tensor)
    made.role = role  # type: ignore[attr-defined] # until a module has it: copies of a parameter lose attributes
    return made


def declare(module: nn.Module, **roles: Role | None) -> None:
    """Gives parameters of a module, e.g. of torch's, their roles. Raises RoleError for None."""
    for name, role in roles.items():
        if role is None:
            raise RoleError(f"{type(module).__name__}.{name} has no role: make it with parameter(tensor, Role.…)")
        module.__dict__.setdefault("roles", {})[name] = role


def roles_of(net: nn.Module) -> dict[str, Role]:
    """Name → role of every parameter, a shared one under each of its names. Raises RoleError naming one without."""
    roles = {}
    for path, module in net.named_modules(remove_duplicate=False):
        for name, _ in module.named_parameters(path, recurse=False):
            role = module.__dict__.get("roles", {}).get(name.rpartition(".")[2])
            if role is None:
                raise RoleError(f"the parameter {name} has no role: say what it is where it is made")
            roles[name] = role
    return roles
