"""What programs cost, how long values live and what a target makes of it."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir import dialect
from graphwright.ir.analyses.cost import Cost, cost_of_node, cost_of_program
from graphwright.ir.analyses.liveness import live_intervals, peak_bytes
from graphwright.ir.target import Target

aten = torch.ops.aten

SIZES = {"batch": 3, "tokens": 5}


def cost(b, node):
    """Return flops and bytes of a node at `SIZES`."""
    found = cost_of_node(b.built, node).at(SIZES)
    return found.flops, found.moved_bytes


def test_linear(builder) -> None:
    """Two operations for a weight and row, one more for a bias; operands and result are moved once."""
    b = builder()
    x = b.input("x", "batch", "tokens", 8)
    w, bias = b.weight("w", torch.ones(4, 8)), b.weight("b", torch.ones(4))
    assert cost(b, b.call(aten.linear.default, x, w)) == (15 * 4 * 16, 4 * (15 * 8 + 32 + 15 * 4))
    assert cost(b, b.call(aten.linear.default, x, w, bias))[0] == 15 * 4 * 17


def test_matmul_and_convolution(builder) -> None:
    """Products cost two operations per inner element."""
    b = builder()
    x, image = b.input("x", "batch", 6, 8), b.input("image", "batch", 3, 10, 10)
    y = b.call(aten.matmul.default, x, b.call(aten.permute.default, x, [0, 2, 1]))
    assert cost(b, y)[0] == 3 * 6 * 6 * 2 * 8
    kernel = b.weight("k", torch.ones(4, 3, 5, 5))
    assert cost(b, b.call(aten.conv2d.default, image, kernel))[0] == 3 * 4 * 6 * 6 * 2 * 75


def test_attention(builder) -> None:
    """The two products and the softmax, as an expression that grows with the square of the tokens."""
    b = builder()
    q = b.input("q", "batch", 4, "tokens", 8)
    node = b.call(dialect.attention, q, q, q, [], None, scale=1.0)
    tokens = b.built.dimensions["tokens"].symbol
    assert cost_of_node(b.built, node).flops.as_poly(tokens).degree() == 2
    assert cost(b, node)[0] == 3 * 4 * 25 * (16 + 16 + 8)
    assert cost(b, b.call(aten.scaled_dot_product_attention.default, q, q, q)) == cost(b, node)


def test_views_sizes_and_integers_compute_nothing(builder) -> None:
    """Looking at memory in another way is free; integers are no floating point operations."""
    b = builder()
    x = b.input("x", "batch", 8)
    assert cost(b, b.call(aten.reshape.default, x, [b.size(x, 0), 2, 4])) == (0, 0)
    assert cost(b, b.size(x, 0)) == (0, 0)
    assert cost(b, b.call(aten.arange.default, 5, device="cpu")) == (0, 40)


def test_embedding_reads_what_it_looks_up(builder) -> None:
    """The table's other rows are not read."""
    b = builder()
    ids = b.input("ids", "batch", dtype=torch.int64)
    node = b.call(aten.embedding.default, b.weight("table", torch.ones(1000, 4)), ids)
    assert cost(b, node) == (0, 3 * 8 + 2 * 3 * 4 * 4)


def test_program_and_target(builder) -> None:
    """Costs add up; a roofline takes the longer of computing and moving."""
    b = builder()
    x = b.input("x", "batch", 8)
    program = b.program(b.call(aten.relu.default, b.call(aten.exp.default, x)))
    total = cost_of_program(program).at(SIZES)
    assert total == Cost(24 * 9, 4 * 24 * 4)
    assert total.time_us(Target("cpu", 216e6, 1e12, 0.5)) == pytest.approx(1.5)
    assert total.time_us(Target("cpu", 1e12, 384e6)) == pytest.approx(1.0)


def test_liveness(builder) -> None:
    """A value lives to its last use, a result to the end; the peak is the most that is held at once."""
    b = builder()
    x = b.input("x", "batch", 8)
    first = b.call(aten.exp.default, x)
    second = b.call(aten.exp.default, first)
    third = b.call(aten.add.Tensor, first, second)
    last = b.call(aten.neg.default, third)
    program = b.program(last)
    intervals = live_intervals(program)
    position = {node: at for at, node in enumerate(program.graph.nodes)}
    assert set(intervals) == {first, second, third, last}
    assert (intervals[first].start, intervals[first].end) == (position[first], position[third])
    assert intervals[last].end == position[program.output]
    assert peak_bytes(program, SIZES) == 3 * (3 * 8 * 4)
