"""Gradients that a compiled graph only puts side by side are written there at once, by the operators that find them.

The gradient of one product that was cut into inputs of several operators is a concatenation of theirs. The compiler
lets what it generates itself write into it, and copies what operators return.
"""

from __future__ import annotations

import hashlib
import operator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from hymba_lightning.ops.operators import WRITERS

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default)


class Piece(NamedTuple):
    """One of a concatenation's, whose place there is what the first `call` will be given."""

    piece: Node
    place: Tensor
    """Without memory (device meta), a view of the whole: in the piece's shape, or in that of the operator's result."""
    call: Node | None
    """The operator that can write it; None where it has to be copied."""


class JoinedGradients(CustomGraphPass):
    """Makes of each concatenation that operators can write pieces of an empty tensor, into which they do."""

    def __call__(self, graph: Graph) -> None:
        for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
            whole = cat.meta["val"]
            # A shape that varies is given by nodes of the graph.
            if cat.kwargs or not all(isinstance(size, int) for size in whole.shape) or not whole.is_contiguous():
                continue
            pieces = placed(cat, *cat.args)
            if any(piece.call for piece in pieces):
                join(graph, cat, pieces)
                graph.eliminate_dead_code()

    def uuid(self) -> str:
        """For the keys of the compiler's caches: of this file."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def placed(cat: Node, nodes: Any, dim: int = 0) -> list[Piece]:
    """The pieces of `cat`, each with its place."""
    whole, first = torch.empty(cat.meta["val"].shape, device="meta"), 0
    pieces: list[Piece] = []
    for node in nodes:
        size = node.meta["val"].size(dim)
        place = whole.narrow(dim, first, size)
        alike = node.meta["val"].dtype == cat.meta["val"].dtype and nodes.count(node) == 1
        pieces.append((writable(node, cat, place) if alike else None) or Piece(node, place, None))
        first += size
    return pieces


def writable(node: Any, cat: Node, place: Tensor) -> Piece | None:
    """The piece if it is an operator's result, in any shape, that nothing but `cat` reads and the operator can write to
    its `place`."""
    result, user = node, cat
    while result.target in VIEWS and list(result.users) == [user]:
        result, user = result.args[0], result
    if result.target is not operator.getitem or list(result.users) != [user]:
        return None
    call, number = result.args
    writer = WRITERS.get(call.target)
    if writer is None or writer.place != number or call.kwargs:
        return None
    shape = result.meta["val"].shape
    try:
        place = place.view(shape)
    except RuntimeError:  # Its neighbours are none of the result's.
        return None
    side_by_side = place.stride()[2:] == torch.empty(shape, device="meta").stride()[2:]
    return Piece(node, place, call) if side_by_side else None


def join(graph: Graph, cat: Node, pieces: list[Piece]) -> None:
    """Replaces `cat` of these pieces."""
    whole = cat.meta["val"]

    def add(before: Node, target: torch._ops.OpOverload, *arguments: Any, **named: Any) -> Node:
        with graph.inserting_before(before), whole.fake_mode:
            node = graph.call_function(target, arguments, named)
            values = torch.fx.node.map_arg(arguments, lambda argument: argument.meta["val"])
            node.meta["val"] = target(*values, **named)
        return node

    calls = {piece.call for piece in pieces}
    earliest = next(node for node in graph.nodes if node in calls)
    joint = add(earliest, aten.empty.memory_format, list(whole.shape), dtype=whole.dtype, device=whole.device)
    for piece, place, call in pieces:
        layout = list(place.shape), list(place.stride()), place.storage_offset()
        part = add(call or cat, aten.as_strided.default, joint, *layout)
        if call is None:
            add(cat, aten.copy_.default, part, piece)
        else:
            call.replace_all_uses_with(add(call, WRITERS[call.target].operator, *call.args, part))
    cat.replace_all_uses_with(joint)
