"""Which dimension of a tensor runs along the lanes, decided from how the tensor is read and written."""

from __future__ import annotations

from .ttir import Op, Value

Stride = int | str
"""Elements between neighbours along a dimension: a number, RUNTIME (affine, known when the kernel runs) or IRREGULAR."""

RUNTIME = "runtime"
IRREGULAR = "irregular"

_BUFFER, _LOAD = 100, 10
"""Votes for a lane dimension: values in buffers have a fixed one, a load prefers its contiguous one."""

_SAME_COORDS = frozenset({"arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast", "arith.remsi", "arith.remui"})
_DEPTH = 60


def for_argument(value: Value) -> Op | None:
    """The scf.for whose loop-carried argument `value` is, or None."""
    block = value.block
    if value.op is None and block is not None and block.parent is not None and block.parent.name == "scf.for":
        return block.parent if value.index >= 1 else None
    return None


class Layout:
    """Static strides of index and pointer tensors, and the lane dimension of every tensor.

    `decided` holds the dimensions that the code generator has fixed; it asks `lane` for all others.
    """

    def __init__(self) -> None:
        self.decided: dict[Value, int] = {}
        self._lanes: dict[Value, int] = {}
        self._votes: dict[Value, int] = {}
        self._strides: dict[Value, tuple[Stride, ...]] = {}

    def decide(self, value: Value, lane: int) -> None:
        """Fix the lane dimension of a value."""
        self.decided[value] = lane
        self._lanes.clear()
        self._votes.clear()

    def strides(self, value: Value, depth: int = 0) -> tuple[Stride, ...]:
        """Strides of an integer or pointer tensor, per dimension."""
        if not value.shape:
            return ()
        found = self._strides.get(value)
        if found is None:
            found = self._strides_of(value, depth) if depth <= _DEPTH else (IRREGULAR,) * len(value.shape)
            self._strides[value] = found
        return found

    def _strides_of(self, value: Value, depth: int) -> tuple[Stride, ...]:
        op, rank = value.op, len(value.shape)
        if op is None:
            loop = for_argument(value)
            return self.strides(loop.operands[2 + value.index], depth + 1) if loop else (IRREGULAR,) * rank

        def of(v: Value) -> tuple[Stride, ...]:
            return self.strides(v, depth + 1) if v.shape else (0,) * rank

        name = op.name
        if name == "tt.splat" or (name == "arith.constant" and not isinstance(op.attrs["value"], list)):
            return (0,) * rank
        if name == "tt.make_range":
            return (1,)
        if name == "tt.expand_dims":
            inner = list(of(op.operands[0]))
            inner.insert(op.attrs["axis"], 0)
            return tuple(inner)
        if name == "tt.broadcast":
            source = op.operands[0]
            return tuple(0 if source.shape[d] == 1 else s for d, s in enumerate(of(source)))
        if name == "tt.trans":
            inner_strides = of(op.operands[0])
            return tuple(inner_strides[i] for i in op.attrs["order"])
        if name in ("arith.addi", "arith.subi", "tt.addptr"):
            a, b = of(op.operands[0]), of(op.operands[1])
            return tuple(_sum(x, y, -1 if name == "arith.subi" else 1) for x, y in zip(a, b, strict=True))
        if name in _SAME_COORDS:
            return of(op.operands[0])
        if name == "arith.muli":
            for x, y in (op.operands, op.operands[::-1]):
                if y.op is not None and y.op.name == "arith.constant" and isinstance(y.op.attrs["value"], int):
                    factor = y.op.attrs["value"]
                    return tuple(s if isinstance(s, str) else s * factor for s in of(x))
            a, b = of(op.operands[0]), of(op.operands[1])
            return tuple(_product(x, y) for x, y in zip(a, b, strict=True))
        inputs = [of(v) for v in op.operands if v.shape == value.shape]
        if not inputs or name == "tt.load":
            return (IRREGULAR,) * rank
        return tuple(0 if all(s[d] == 0 for s in inputs) else IRREGULAR for d in range(rank))

    def lane(self, value: Value, depth: int = 0) -> int:
        """The dimension of `value` to run along the lanes."""
        if len(value.shape) < 2:
            return 0
        if value in self.decided:
            return self.decided[value]
        return self.natural(value, depth)

    def natural(self, value: Value, depth: int = 0) -> int:
        """The dimension along which `value` is best computed, whatever was decided for where it is kept."""
        if len(value.shape) < 2:
            return 0
        found = self._lanes.get(value)
        if found is None:
            found = self._lanes[value] = self._lane_of(value, depth)
        return found

    def _lane_of(self, value: Value, depth: int) -> int:
        shape, op = value.shape, value.op
        last = max((d for d in range(len(shape)) if shape[d] > 1), default=len(shape) - 1)
        if depth > _DEPTH:
            return last
        if op is None:
            loop = for_argument(value)
            if loop is not None:
                assert value.block is not None
                produced = value.block.terminator.operands[value.index - 1]
                if produced.op is not None and produced.op.name == "tt.dot":
                    return self.lane(produced, depth + 1)
            return last
        if op.name == "tt.load":
            return self.contiguous(op.operands[0], last)
        if op.name == "scf.for":
            return self.lane(op.body.args[value.index + 1], depth + 1)
        if op.name == "tt.trans":
            return int(op.attrs["order"].index(self.lane(op.operands[0], depth + 1)))
        best = (0, last)
        for operand in op.operands:
            if operand.shape == shape:
                vote = self._vote(operand, depth + 1)
                if vote > best[0]:
                    best = (vote, self.lane(operand, depth + 1))
        return best[1]

    def contiguous(self, pointer: Value, otherwise: int) -> int:
        """The dimension along which a pointer tensor steps element by element."""
        for d, stride in enumerate(self.strides(pointer)):
            if stride == 1 and pointer.shape[d] > 1:
                return d
        return otherwise

    def _vote(self, value: Value, depth: int) -> int:
        if value in self.decided or value.op is None or value.op.name in ("tt.dot", "scf.for"):
            return _BUFFER
        if value.op.name == "tt.load":
            return _LOAD
        if depth > _DEPTH or value.op.name in ("tt.broadcast", "tt.splat", "arith.constant"):
            return 0
        if value not in self._votes:
            inputs = [v for v in value.op.operands if v.shape == value.shape]
            self._votes[value] = max((self._vote(v, depth + 1) for v in inputs), default=0)
        return self._votes[value]


def _sum(x: Stride, y: Stride, sign: int) -> Stride:
    if IRREGULAR in (x, y):
        return IRREGULAR
    if isinstance(x, int) and isinstance(y, int):
        return x + sign * y
    return RUNTIME


def _product(x: Stride, y: Stride) -> Stride:
    """Stride of a product whose factors step by x and y; the value of a factor that does not step is not known here."""
    if x != 0 and y != 0:
        return IRREGULAR
    moving = x if x != 0 else y
    return moving if moving in (0, IRREGULAR) else RUNTIME
