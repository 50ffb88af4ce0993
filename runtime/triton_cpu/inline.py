"""Replacement of calls by the code of what they call."""

from __future__ import annotations

from .errors import UnsupportedError
from .structure import relink, structure
from .ttir import Block, Function, Op, Value


def inline_calls(functions: dict[str, Function], entry: str) -> Function:
    """Return a function without tt.call, and without branches between blocks.

    Functions are changed in place: `entry` is the one that is returned, and those it calls become free of calls too.

    Args:
        functions: the functions of a module, as `parse` returns them.
        entry: name of the one to return.

    Raises:
        UnsupportedError: a function calls itself, calls one that the module does not have, or branches backwards.
    """
    return _Inliner(functions).flatten(entry)


def clone_blocks(blocks: list[Block], mapping: dict[Value, Value]) -> list[Block]:
    """Return a copy of the blocks with new values.

    Args:
        blocks: the blocks of a region.
        mapping: what to use in place of values from outside; every copied value is added to it.

    Returns:
        The copies; their parents, uses and positions are for `structure.relink` to set.
    """
    copies = [Block([_clone_value(arg, mapping) for arg in block.args]) for block in blocks]
    targets = dict(zip(blocks, copies, strict=True))
    for block, copy in targets.items():
        copy.ops = [_clone_op(op, mapping) for op in block.ops]
        for op in copy.ops:
            op.successors = [(targets[to], [mapping.get(v, v) for v in passed]) for to, passed in op.successors]
    return copies


def _clone_value(value: Value, mapping: dict[Value, Value]) -> Value:
    copy = mapping[value] = Value(value.name, value.type)
    return copy


def _clone_op(op: Op, mapping: dict[Value, Value]) -> Op:
    copy = Op(op.name, [mapping.get(v, v) for v in op.operands], dict(op.attrs), line=op.line)
    copy.successors = list(op.successors)
    copy.regions = [clone_blocks(region, mapping) for region in op.regions]
    copy.results = [_clone_value(value, mapping) for value in op.results]
    return copy


class _Inliner:
    def __init__(self, functions: dict[str, Function]) -> None:
        self._functions = functions
        self._flat: set[str] = set()
        self._open: list[str] = []

    def flatten(self, name: str, line: str = "") -> Function:
        """Return the function `name` after the calls and branches in it are gone; `line` is where it is called."""
        function = self._functions.get(name)
        if function is None:
            raise UnsupportedError(f"a call of {name}, which is not defined", line)
        if name in self._open:
            raise UnsupportedError(f"recursive function {name}", line)
        if name not in self._flat:
            self._open.append(name)
            structure(function)
            mapping: dict[Value, Value] = {}
            if any(op.name == "tt.call" for op in function.walk()):
                self._rewrite(function.blocks[0], mapping)
                relink(function)
            self._open.pop()
            self._flat.add(name)
        return function

    def _rewrite(self, block: Block, mapping: dict[Value, Value]) -> None:
        """Inline the calls in a block; `mapping` holds the results of those before."""
        ops: list[Op] = []
        for op in block.ops:
            op.operands = [mapping.get(value, value) for value in op.operands]
            for region in op.regions:
                for inner in region:
                    self._rewrite(inner, mapping)
            if op.name != "tt.call":
                ops.append(op)
                continue
            callee = self.flatten(op.attrs["callee"], op.line).blocks[0]
            copied = dict(zip(callee.args, op.operands, strict=True))
            ops += [_clone_op(inner, copied) for inner in callee.ops[:-1]]
            returned = callee.terminator.operands
            mapping.update(zip(op.results, [copied.get(value, value) for value in returned], strict=True))
        block.ops = ops
