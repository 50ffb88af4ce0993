"""What differs between two programs, whatever their nodes are called."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.diff import diff_programs, unified
from graphwright.ir.printer import print_program
from graphwright.ir.program import calls, replace
from graphwright.pipeline import run_passes

aten = torch.ops.aten


def changes(before, after):
    """Return the differences that are none of "same", as (change, old node, new node)."""
    return [(d.change, d.old, d.new) for d in diff_programs(before, after) if d.change != "same"]


@pytest.mark.parametrize("name", ["bert", "llama", "convnet"])
def test_a_program_and_itself(captured, name) -> None:
    """There is no difference, and no text of one; every node is there once."""
    program = captured(name)
    found = diff_programs(program, program.copy())
    assert {d.change for d in found} == {"same"}
    assert unified(found) == ""
    assert len(found) == len(print_program(program).splitlines()) - len(program.dimensions) - 2


def test_names_are_no_difference(captured) -> None:
    """Another name of every node, and nodes that are numbered otherwise, change nothing."""
    program = captured("llama")
    other = program.copy()
    for k, node in enumerate(list(other.graph.nodes)):
        if node.op == "call_function":
            node.name = f"other_{1000 - k}"
    assert changes(program, other) == []


def test_one_node_replaced(captured) -> None:
    """Another operation in the place of one is that node, removed and added: what reads it is no difference."""
    program = captured("bert")
    other = program.copy()
    gelu = next(iter(calls(other.graph, aten.gelu.default)))
    old = gelu.name
    with other.graph.inserting_before(gelu):
        new = other.call(aten.silu.default, gelu.args[0], like=gelu)
    replace(gelu, new)
    assert sorted(changes(program, other)) == [("added", "", new.name), ("removed", old, "")]
    text = unified(diff_programs(program, other), context=1)
    assert sum(line.startswith("- ") for line in text.splitlines()) == 1
    assert sum(line.startswith("+ ") for line in text.splitlines()) == 1
    assert "silu" in text
    assert "modeling_bert.py" in text
    assert text.splitlines()[0].startswith("@@ ")


def test_another_argument_is_a_change(builder) -> None:
    """A number, a shape or a weight's name in a node are part of it."""
    programs = []
    for slope in (0.1, 0.2):
        b = builder()
        x = b.input("x", "batch", 8)
        programs.append(b.program(b.call(aten.exp.default, b.call(aten.leaky_relu.default, x, slope))))
    assert sorted(change for change, _, _ in changes(*programs)) == ["added", "removed"]


def test_other_operands_are_a_change(builder) -> None:
    """A node that computes the same of other nodes, and a result that is another node, are changed."""

    def made(swap, last):
        b = builder()
        x = b.input("x", "batch", 8)
        first, second = b.call(aten.exp.default, x), b.call(aten.sin.default, x)
        operands = (second, first) if swap else (first, second)
        return b.program(b.call(aten.sub.Tensor, *operands), first if last else second)

    assert [change for change, _, _ in changes(made(False, False), made(True, False))] == ["changed"]
    found = [d for d in diff_programs(made(False, False), made(False, True)) if d.change != "same"]
    assert [d.change for d in found] == ["changed"]
    assert found[0].before.startswith("return")
    text = unified(found)
    assert text.splitlines()[0].startswith("- return")
    assert text.splitlines()[1].startswith("+ return")


def test_one_removed_of_equal_layers(captured) -> None:
    """Without one of two equal layers, its nodes are removed, nothing is added, and what read it reads what came before."""
    program = run_passes(captured("bert"))
    from graphwright.passes.base import Context

    ids = torch.randint(3, 50, (2, 9))
    context = Context(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},))
    other = run_passes(program, ["drop-layers:drop=1,minimum_tokens=1"], context)
    found = changes(program, other)
    kinds = {change for change, _, _ in found}
    assert "removed" in kinds
    assert "added" not in kinds
    removed = [old for change, old, _ in found if change == "removed"]
    assert len(removed) == sum(1 for _ in calls(program.graph)) - sum(1 for _ in calls(other.graph))
    layers = {d.where.split("encoder.layer.")[-1][0] for d in diff_programs(program, other) if d.change == "removed"}
    assert len(layers) == 1


def test_reversing_swaps_sides(captured) -> None:
    """What one direction removes the other adds, node for node."""
    program = captured("llama")
    other = run_passes(program, ["raise-norms", "raise-rotary"])
    one, two = changes(program, other), changes(other, program)
    assert {old for c, old, _ in one if c == "removed"} == {new for c, _, new in two if c == "added"}
    assert {new for c, _, new in one if c == "added"} == {old for c, old, _ in two if c == "removed"}
    assert any("rms_norm" in new for _, _, new in one)
