"""Programs as text."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.printer import location, print_program

aten = torch.ops.aten

TRACE = '  File "/home/someone/project/models/encoder.py", line 42, in forward\n    return self.act(x)\n'


def block(b):
    """Return a small block."""
    x, mask = b.input("x", "batch", "tokens", 32), b.input("mask", "batch", "tokens", dtype=torch.int64)
    normed = b.call(dialect.rms_norm, x, b.weight("norm.weight", torch.ones(32)), 1e-6)
    y = b.call(aten.linear.default, normed, b.weight("proj.weight", torch.ones(32, 32)))
    heads = b.call(aten.reshape.default, y, [b.size(x, 0), b.size(x, 1), 4, 8])
    q = b.call(aten.permute.default, heads, [0, 2, 1, 3])
    predicate = "q - k >= 0 & not (in0[b, k] == 0)"
    z = b.call(dialect.attention, q, q, q, [mask], None, predicate=predicate, scale=0.5)
    act = b.call(aten.gelu.default, z, approximate="tanh")
    act.meta["stack_trace"] = TRACE
    act.meta["nn_module_stack"] = {"a": ("", "Model"), "b": ("encoder.layer.0.act", "GELU")}
    wide = b.call(torch.ops.prims.convert_element_type.default, act, torch.float64)
    best = b.call(aten.topk.default, wide, 2)
    values = b.call(operator.getitem, best, 0)
    return b.program(values, b.call(aten.linear.default, normed, b.weight("proj2.weight", torch.ones(3, 32))), 7, None)


def test_text(builder, golden) -> None:
    """The header, one line for a node, sizes as dimensions, expressions as text, the results."""
    golden(print_program(block(builder())))


def test_renaming_changes_nothing(builder) -> None:
    """The text does not depend on the nodes' names."""
    program = block(builder())
    before = print_program(program)
    for at, node in enumerate(program.graph.nodes):
        if node.op == "call_function":
            node.name = f"anything_{at * 7 % 11}_{at}"
    assert print_program(program) == before


def test_two_programs_print_equally(builder) -> None:
    """Programs that were built the same way have the same text, byte by byte."""
    assert print_program(block(builder())) == print_program(block(builder()))
    assert print_program(block(builder())) == print_program(block(builder()).copy())


def test_an_input_named_like_a_node_stays_apart(builder) -> None:
    """Numbering skips names that inputs have."""
    b = builder()
    x = b.input("relu_1", 2)
    text = print_program(b.program(b.call(aten.relu.default, x)))
    assert "%relu_2: f32[2] = relu(%relu_1)" in text


def test_locations_can_be_left_out(builder) -> None:
    """Without locations a text of two checkouts is the same."""
    text = print_program(block(builder()), locations=False)
    assert "encoder.py" not in text


def test_location(builder) -> None:
    """The last two parts of the file, the line and the module; nothing where nothing is known."""
    node = fx.Graph().placeholder("x")
    assert location(node) == ""
    node.meta["stack_trace"] = TRACE
    assert location(node) == "models/encoder.py:42"
