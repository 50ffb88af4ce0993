"""The rules of the normal form for operations that only move values: views, parts, and copies of these."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphwright.ir.diagnostics import user_line
from graphwright.ir.errors import CaptureError

from .normal_form import Rewriter, argument, aten, rule
from .normal_sizes import shape_key, size_key

END = 2**63 - 1
"""What slices without an end have as end."""


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
@rule(aten.view_as.default)
def _reshape(rewriter: Rewriter, node: fx.Node) -> Any:
    if shape_key(node) == shape_key(node.args[0]):
        return node.args[0]
    sizes = rewriter.sizes.shape(node)
    if sizes is None:
        return None
    return rewriter.call(node, aten.reshape.default, node.args[0], sizes)


@rule(aten.transpose.int, aten.t.default, aten.permute.default, aten.swapaxes.default, aten.numpy_T.default, aten.mT.default)
@rule(aten.movedim.int, aten.movedim.intlist)
def _permute(rewriter: Rewriter, node: fx.Node) -> Any:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    order = _order(node, rank)
    if order == list(range(rank)):
        return node.args[0]
    return rewriter.call(node, aten.permute.default, node.args[0], order)


def _order(node: fx.Node, rank: int) -> list[int]:
    """Return which dimension of the argument each dimension of the result is."""
    order: list[int] = list(range(rank))
    target, args = node.target, node.args
    if target is aten.permute.default:
        return [int(d) % rank for d in args[1]]  # type: ignore[union-attr, arg-type]
    if target is aten.numpy_T.default:
        return order[::-1]
    if target in (aten.movedim.int, aten.movedim.intlist):
        given = [args[1]] if isinstance(args[1], int) else list(args[1])  # type: ignore[arg-type]
        wanted = [args[2]] if isinstance(args[2], int) else list(args[2])  # type: ignore[arg-type]
        places = {int(w) % rank: int(g) % rank for g, w in zip(given, wanted, strict=True)}
        rest = iter(d for d in order if d not in places.values())
        return [places[d] if d in places else next(rest) for d in order]
    if rank < 2:
        return order
    first, second = (-2, -1) if target in (aten.t.default, aten.mT.default) else (int(args[1]), int(args[2]))  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return order


@rule(aten.unsqueeze.default)
def _unsqueeze(rewriter: Rewriter, node: fx.Node) -> Any:
    dim = int(node.args[1])  # type: ignore[arg-type]
    rank = node.meta["val"].dim()
    return rewriter.call(node, aten.unsqueeze.default, node.args[0], dim + rank) if dim < 0 else None


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(rewriter: Rewriter, node: fx.Node) -> Any:
    shape = shape_key(node.args[0])
    dims: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    wanted = {int(d) % max(len(shape), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    gone = [d for d in range(len(shape)) if d in wanted and shape[d] == 1]
    return rewriter.call(node, aten.squeeze.dims, node.args[0], gone) if gone else node.args[0]


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(rewriter: Rewriter, node: fx.Node) -> Any:
    if shape_key(node) == shape_key(node.args[0]):
        return node.args[0]
    if node.target is aten.expand.default and not node.kwargs:
        return None
    sizes = rewriter.sizes.shape(node)
    return None if sizes is None else rewriter.call(node, aten.expand.default, node.args[0], sizes)


@rule(aten.slice.Tensor)
def _slice(rewriter: Rewriter, node: fx.Node) -> Any:
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    dim = argument(node, 1, "dim", 0) % value.dim()
    step = argument(node, 4, "step", 1)
    if step == 1 and shape_key(node) == shape_key(node.args[0]):
        return node.args[0]
    size = size_key(value.shape[dim])
    start = _from_front(argument(node, 2, "start"), size, 0)
    end = _from_front(argument(node, 3, "end"), size, END)
    args = (node.args[0], dim, start, end, *(() if step == 1 else (step,)))
    return rewriter.call(node, aten.slice.Tensor, *args) if args != node.args or node.kwargs else None


def _from_front(index: Any, size: Any, default: int) -> Any:
    if index is None:
        return default
    if isinstance(index, int) and isinstance(size, int):
        index = max(index + size, 0) if index < 0 else index
        return END if index >= size and default == END else index
    return index


@rule(aten.narrow.default)
def _narrow(rewriter: Rewriter, node: fx.Node) -> Any:
    x, dim, start, _ = node.args
    if not isinstance(start, int) or start < 0:
        return None
    dim = int(dim) % node.meta["val"].dim()  # type: ignore[arg-type]
    end = rewriter.sizes.of(start + node.meta["val"].shape[dim])
    return None if end is None else rewriter.call(node, aten.slice.Tensor, x, dim, start, end)


@rule(aten.select.int)
def _select(rewriter: Rewriter, node: fx.Node) -> Any:
    x, dim, index = node.args
    value = x.meta["val"]  # type: ignore[union-attr]
    place = int(dim) % value.dim()  # type: ignore[arg-type]
    size = size_key(value.shape[place])
    if isinstance(index, int) and isinstance(size, int):
        index %= size
    return rewriter.call(node, aten.select.int, x, place, index) if (place, index) != (dim, node.args[2]) else None


@rule(aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.tensor_split.sections)
@rule(aten.tensor_split.indices)
def _parts(rewriter: Rewriter, node: fx.Node) -> Any:
    x: Any = node.args[0]
    value = x.meta["val"]
    dim = argument(node, 2, "dim", 0) % value.dim()
    starts: list[Any] = [0]
    for part in node.meta["val"]:
        starts.append(starts[-1] + part.shape[dim])
    for user in _picks(node):
        index = int(user.args[1])  # type: ignore[arg-type]
        with rewriter.program.graph.inserting_before(user):
            start, end = rewriter.sizes.of(starts[index]), rewriter.sizes.of(starts[index + 1])
            if start is None or end is None:
                continue
            is_last = index % len(node.meta["val"]) == len(node.meta["val"]) - 1
            if start == 0 and is_last:
                user.replace_all_uses_with(x)
                continue
            part = rewriter.call(user, aten.slice.Tensor, x, dim, start, END if is_last else end)
        user.replace_all_uses_with(part)
    return None


@rule(aten.unbind.int)
def _unbind(rewriter: Rewriter, node: fx.Node) -> Any:
    x: Any = node.args[0]
    dim = argument(node, 1, "dim", 0) % x.meta["val"].dim()
    count = len(node.meta["val"])
    for user in _picks(node):
        with rewriter.program.graph.inserting_before(user):
            part = rewriter.call(user, aten.select.int, x, dim, int(user.args[1]) % count)  # type: ignore[arg-type]
        user.replace_all_uses_with(part)
    return None


def _picks(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem]


@rule(aten.view_as_complex.default, aten.as_strided.default, aten.view.dtype)
def _needs_layout(rewriter: Rewriter, node: fx.Node) -> Any:
    x: Any = node.args[0]
    if node.target is aten.as_strided.default and not x.meta["val"].is_contiguous():
        raise CaptureError(
            f"as_strided of a tensor that is not contiguous, at {user_line(node) or 'an unknown line'}: its result depends on "
            "how the tensor lies in memory; call contiguous() before it"
        )
    if x.op == "call_function" and x.target is torch.ops.aten.contiguous.default:
        return None
    made = rewriter.program.graph.call_function(aten.contiguous.default, (x,))
    made.meta = dict(x.meta)
    return rewriter.call(node, node.target, made, *node.args[1:], **node.kwargs)
