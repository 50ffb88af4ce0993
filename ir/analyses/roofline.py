"""How long a program takes on a machine, predicted: each operation by the roof that it meets first, arithmetic or memory.

As in LLM-Viewer: Yuan et al., LLM Inference Unveiled: Survey and Roofline Model Insights, 2024, arXiv 2402.16363. Differs from
it in: chains that fuse are one operation; the rates that kinds of operations reach are measured, and no data sheet's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graphwright.ir.program import Size
from graphwright.ir.records import CostLine, ProgramCost
from graphwright.ir.size_texts import expression_of, names_in, number_of
from graphwright.ir.target import Bound, Target


@dataclass(frozen=True)
class LineTime:
    """Equal operations at given sizes.

    Args:
        kind: "product", "attention" or "rest".
        operation: as it is printed.
        count: how many there are.
        flops: floating point operations of all.
        moved_bytes: bytes that all move.
        time_us: how long all take, in microseconds.
        bound: what limits one.
    """

    kind: str
    operation: str
    count: int
    flops: int
    moved_bytes: int
    time_us: float
    bound: Bound


@dataclass(frozen=True)
class Prediction:
    """A program at given sizes on a machine.

    Args:
        sizes: size by the dimension's name.
        lines: its operations, those that take longest first.
        weight_bytes: bytes of its weights.
        state_bytes: bytes of what is kept from call to call.
    """

    sizes: Mapping[str, int]
    lines: tuple[LineTime, ...]
    weight_bytes: int
    state_bytes: int

    @property
    def time_us(self) -> float:
        """The time of a call, in microseconds."""
        return sum(line.time_us for line in self.lines)

    @property
    def flops(self) -> int:
        """The floating point operations of a call."""
        return sum(line.flops for line in self.lines)

    @property
    def moved_bytes(self) -> int:
        """The bytes that a call reads and writes."""
        return sum(line.moved_bytes for line in self.lines)

    def time_of(self, kind: str) -> float:
        """Return the time of the operations of a kind, in microseconds."""
        return sum(line.time_us for line in self.lines if line.kind == kind)


def dimensions_of(cost: ProgramCost) -> frozenset[str]:
    """Return the names of the dimensions that a cost depends on."""
    texts = [cost.state_bytes, *(text for line in cost.lines for text in _texts(line))]
    return frozenset().union(*(names_in(text) for text in texts))


def predict(cost: ProgramCost, sizes: Mapping[str, int], target: Target) -> Prediction:
    """Return how long a program takes.

    Args:
        cost: of the program.
        sizes: size by the dimension's name, for all that the cost depends on.
        target: the machine.

    Raises:
        OptionError: the size of a dimension is missing.
    """
    lines = [_line(line, sizes, target) for line in cost.lines]
    lines.sort(key=lambda line: -line.time_us)
    return Prediction(dict(sizes), tuple(lines), cost.weight_bytes, number_of(cost.state_bytes, sizes))


def total(lines: Iterable[CostLine]) -> tuple[Size, Size]:
    """Return the floating point operations and the moved bytes of lines, as expressions of the dimensions."""
    flops: Size = 0
    moved: Size = 0
    for line in lines:
        flops = flops + line.count * expression_of(line.flops)
        moved = moved + line.count * sum(expression_of(text) for text in _texts(line)[1:])
    return flops, moved


def _line(line: CostLine, sizes: Mapping[str, int], target: Target) -> LineTime:
    flops, weights, states, values = (number_of(text, sizes) for text in _texts(line))
    work = (flops, weights + states, values, line.kind)
    count = line.count
    moved = count * (weights + states + values)
    return LineTime(line.kind, line.operation, count, count * flops, moved, count * target.time_us(*work), target.bound(*work))


def _texts(line: CostLine) -> tuple[str, str, str, str]:
    return line.flops, line.weight_bytes, line.state_bytes, line.value_bytes
