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


# By which torch's pruning, weight_norm and spectral_norm call what they make of a parameter.
PARTS = ("_orig", "_g", "_v")


class RoleError(ValueError):
    """A parameter without a role."""


class Module(nn.Module):
    """A module whose parameters have roles: `self.gain = parameter(tensor, Role.CONTROL)`."""

    part = ""
    """Of the network, for maps of it; "" is that of the module around it."""
    is_always_called = True
    """Whether nothing of it is computed but by a call, which runs the hooks on it."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            # load_state_dict(assign=True) puts plain parameters in the place of ours.
            roles = self.__dict__.get("roles", {})
            role = getattr(param, "role", None) or roles.get(name)
            whole = next((name.removesuffix(end) for end in PARTS if name.endswith(end)), None)
            if whole in roles and not self.is_always_called:
                raise RoleError(
                    f"{type(self).__name__}.{whole} cannot be pruned or normalised by a hook, which would not always "
                    "be called: use torch.nn.utils.parametrize"
                )
            declare(self, **{name: role or roles.get(whole)})
        super().register_parameter(name, param)


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
                raise RoleError(
                    f"the parameter {name} has no role: say what it is where it is made, or, where a parametrization "
                    "or an adapter brought it, remove or merge that first"
                )
            roles[name] = role
    return roles
