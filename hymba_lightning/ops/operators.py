"""Makes a pair of plain functions, forward and backward, one operator: differentiable, and a node in a compiled graph.

This is the only place where ops meet autograd. Tensors and numbers are named once, in the op's contract, and a backend
gives two functions that know neither autograd nor torch.library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Writer(NamedTuple):
    """A backward operator that writes one of its gradients where it is told, behind its other arguments."""

    operator: Any
    place: int
    """Of that gradient among its results, where there is an empty tensor instead."""
    adds: bool
    """Whether a further argument may be added to the first, the gradient of its operator's first result."""


WRITERS: dict[Any, Writer] = {}
"""Backward operators (torch.ops.hymba.….default) → the same with a place for one of their gradients."""


class Contract(NamedTuple):
    """The operands of an operator and what its backward is given, as words: `Tensor u, Tensor? z, float cap`."""

    operands: str
    """With their types; a `Tensor?` may be None, and one that is `=None` may be left out."""
    results: str
    """Names of the outputs. The first `n_differentiable` of them have gradients; through the others there is none."""
    n_differentiable: int
    kept: str
    """Operands and results that backward gets, in this order, behind the gradients of the results."""
    gradients: str
    """Operands that have a gradient, in the order in which backward returns them; `initial_state=final` says that it is
    shaped like the gradient of the result `final` instead of like the operand."""


def make_operator(
    name: str,
    contract: Contract,
    forward: Callable,
    backward: Callable,
    shapes: Callable[..., Any],
    into: str | None = None,
    adds: bool = False,
) -> Callable:
    """Registers hymba::`name` and hymba::`name`_backward and returns the differentiable operator.

    forward(*operands) -> the results, a tuple of tensors, or a tensor if there is one. backward(*gradients of the
    differentiable results, *kept) -> the gradients; that of an absent operand is empty. `shapes` (*operands) gives
    results without values. Gradients are contiguous, in the shape and dtype of what the contract says.

    `into` is an operand whose gradient backward writes into a tensor that it is given as `into=`, if it is: with any
    strides over the first two dimensions, the others contiguous. hymba::`name`_backward_into gives it one, and if
    backward `adds`, it may be given `more=`, another part of the first result's gradient.
    """
    types = {word.split()[1].partition("=")[0]: word.split()[0] for word in contract.operands.split(", ")}
    results, kept = contract.results.split(), contract.kept.split()
    g_results = [f"g_{result}" for result in results[: contract.n_differentiable]]
    likes = {word.partition("=")[0]: word for word in contract.gradients.split()}
    given = [*g_results, *kept]
    # Where in backward's arguments the tensor stands that a gradient is shaped like.
    like = [
        given.index(f"g_{word.partition('=')[2]}") if "=" in word else given.index(operand)
        for operand, word in likes.items()
    ]
    places = list(types)
    several = len(results) > 1

    operator = torch.library.custom_op(
        f"hymba::{name}",
        lambda *operands: forward(*operands),
        mutates_args=(),
        schema=f"({contract.operands}) -> {_tensors(len(results))}",
    )
    operator.register_fake(lambda *operands: shapes(*operands))
    words = [f"Tensor {g}" for g in g_results] + [f"{types.get(word, 'Tensor')} {word}" for word in kept]
    gradient = torch.library.custom_op(
        f"hymba::{name}_backward",
        lambda *given: backward(*given),
        mutates_args=(),
        schema=f"({', '.join(words)}) -> {_tensors(len(likes))}",
    )

    def gradient_shapes(*given: Any) -> Any:
        empties = tuple(_empty_like(given[place], given[0]) for place in like)
        return empties if len(empties) > 1 else empties[0]

    gradient.register_fake(gradient_shapes)

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"hymba::{name} has no second derivative: take it by torch.func, e.g. jvp of grad, where backend 'auto' "
            "takes operators that have one, or name such backends"
        )

    gradient.register_autograd(refuse)
    if into is not None:
        _add_writer(gradient, f"{name}_backward_into", words, backward, gradient_shapes, list(likes).index(into), adds)

    def setup_context(ctx, inputs, output):
        outputs = output if several else (output,)
        known = dict(zip(places, inputs, strict=True)) | dict(zip(results, outputs, strict=True))
        ctx.numbers = {word: known[word] for word in kept if not types.get(word, "Tensor").startswith("Tensor")}
        ctx.save_for_backward(*(known[word] for word in kept if word not in ctx.numbers))
        ctx.like = [(out.shape, out.dtype, out.device) for out in outputs[: len(g_results)]]
        ctx.mark_non_differentiable(*outputs[len(g_results) :])
        # A result that has no part in the loss gets zeros below, but only where it has a gradient at all.
        ctx.set_materialize_grads(False)

    def differentiate(ctx, *g_outputs):
        gradients = [
            torch.zeros(like[0], dtype=like[1], device=like[2]) if g is None else g
            for g, like in zip(g_outputs, ctx.like, strict=False)
        ]
        saved = iter(ctx.saved_tensors)
        values = {word: ctx.numbers[word] if word in ctx.numbers else next(saved) for word in kept}
        found = gradient(*gradients, *values.values())
        found = dict(zip(likes, found if len(likes) > 1 else (found,), strict=True))
        return tuple(
            None if operand in values and values[operand] is None else found.get(operand) for operand in places
        )

    operator.register_autograd(differentiate, setup_context=setup_context)
    return operator


def _add_writer(
    gradient: Any, name: str, words: list[str], backward: Callable, gradient_shapes: Callable, place: int, adds: bool
) -> None:
    """Registers hymba::`name`: `gradient`, but that the result at `place` is written into an argument more."""
    count, results = len(words), _tensors(len(gradient._opoverload._schema.returns))

    def without(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # An operator must not return what it was given.
        return *found[:place], found[place].new_empty(0), *found[place + 1 :]

    writer = torch.library.custom_op(
        f"hymba::{name}",
        lambda *given: without(backward(*given[:count], **dict(zip(("into", "more"), given[count:], strict=False)))),
        mutates_args=("into",),
        schema=f"({', '.join(words)}, Tensor(a!) into{', Tensor? more=None' * adds}) -> {results}",
    )
    writer.register_fake(lambda *given: without(gradient_shapes(*given[:count])))
    WRITERS[gradient._opoverload] = Writer(writer._opoverload, place, adds)


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _empty_like(tensor: Tensor | None, any_tensor: Tensor) -> Tensor:
    if tensor is None:
        return any_tensor.new_empty(0)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class FunctionContext:
    """Stands in for autograd's context: another package's autograd.Function can then be called in an operator."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps the tensors for the Function's backward."""
        self.saved_tensors = tensors
