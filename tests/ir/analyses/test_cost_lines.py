"""What a program costs, as a table of operations."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import sympy
import torch

from graphwright.ir import dialect
from graphwright.ir.analyses.cost import cache_ratio, cost_of_program, flops_of_node
from graphwright.ir.analyses.cost_lines import program_cost
from graphwright.ir.analyses.roofline import dimensions_of, predict, total
from graphwright.ir.target import Target
from graphwright.pipeline import run_passes

aten = torch.ops.aten

SIZES = {"batch": 3, "tokens": 5}
SLOW = Target("cpu", flops_per_second=1e6, bytes_per_second=1e6)


def only(program):
    (line,) = program_cost(program).lines
    return line


def number(text):
    return int(eval(text, {}, SIZES))


def test_a_chain_is_one_operation(builder) -> None:
    """What one kernel needs alone is not stored: its flops count, its bytes do not; operands are read once."""
    b = builder()
    x = b.input("x", "batch", 8)
    y = b.call(aten.exp.default, b.call(aten.mul.Tensor, x, x))
    line = only(b.program(b.call(aten.add.Tensor, y, x)))
    assert (line.kind, line.operation, line.count) == ("rest", "add", 1)
    assert number(line.flops) == 24 * (1 + 8 + 1)
    assert number(line.value_bytes) == 2 * 24 * 4
    assert line.weight_bytes == line.state_bytes == "0"


def test_what_two_kernels_need_is_stored(builder) -> None:
    """A value that a product and a sum read is written once and read by both; a product's operands are moved too."""
    b = builder()
    x, w = b.input("x", "batch", 8), b.weight("w", torch.ones(8, 8))
    h = b.call(aten.exp.default, x)
    y = b.call(aten.add.Tensor, h, b.call(aten.linear.default, h, w))
    lines = {line.operation: line for line in program_cost(b.program(y)).lines}
    assert set(lines) == {"exp", "linear", "add"}
    assert number(lines["exp"].value_bytes) == number(lines["linear"].value_bytes) == 2 * 96
    assert number(lines["add"].value_bytes) == 3 * 96
    assert lines["linear"].kind == "product"
    assert number(lines["linear"].weight_bytes) == 256


def test_what_two_chains_need_is_stored(builder) -> None:
    """A stream that is read by a chain before a product, and added to what comes of it, is computed and stored once."""
    b = builder()
    x, w = b.input("x", "batch", 8), b.weight("w", torch.ones(8, 8))
    stream = b.call(aten.exp.default, x)
    branch = b.call(aten.linear.default, b.call(aten.relu.default, stream), w)
    lines = {line.operation: line for line in program_cost(b.program(b.call(aten.add.Tensor, stream, branch))).lines}
    assert set(lines) == {"exp", "relu", "linear", "add"}
    assert number(lines["exp"].flops) == 24 * 8
    assert number(lines["relu"].flops) == number(lines["add"].flops) == 24


def test_views_move_nothing(builder) -> None:
    """A third of a packed projection is read as a third, each third by itself."""
    b = builder()
    x, w = b.input("x", "batch", "tokens", 8), b.weight("w", torch.ones(24, 8))
    packed = b.call(aten.linear.default, x, w)
    parts = [b.call(aten.slice.Tensor, packed, 2, 8 * k, 8 * k + 8) for k in range(3)]
    q, k, v = (b.call(aten.unsqueeze.default, part, 1) for part in parts)
    out = b.call(dialect.attention, q, k, v, [], None, scale=1.0)
    lines = {line.kind: line for line in program_cost(b.program(out)).lines}
    assert number(lines["attention"].value_bytes) == 4 * 15 * 8 * 4
    assert number(lines["product"].value_bytes) == (15 * 8 + 15 * 24) * 4


def test_equal_operations_are_one_line(captured) -> None:
    """Repeated layers do not make the table longer, and no flops are lost."""
    program = run_passes(captured("bert"))
    cost = program_cost(program)
    assert max(line.count for line in cost.lines) >= 2
    flops, moved = total(cost.lines)
    assert flops == cost_of_program(program).flops
    assert moved.subs(SIZES) < cost_of_program(program).moved_bytes.subs(SIZES)
    assert cost.weight_bytes == sum(w.numel() * w.element_size() for w in program.weights.values())
    assert dimensions_of(cost) == {"batch", "tokens"}


def test_a_memo_changes_nothing(captured) -> None:
    """Lines that were learnt of one program are the lines of the next."""
    program, memo = captured("llama"), {}
    for stage in (program, run_passes(program)):
        assert program_cost(stage, memo) == program_cost(stage, memo) == program_cost(stage)


def test_states_are_read_where_they_lie(captured) -> None:
    """Of a program with caches, attention reads the caches, and what is appended is as much as is new."""
    program = run_passes(run_passes(captured("llama")), ["cached-decode"])
    assert program.states
    cost = program_cost(program)
    sizes = {"batch": 2, "tokens": 1, "capacity": 256}
    held = sum(t.meta["val"].numel().node.expr.xreplace(program.named) * 4 for t in program.inputs if t.name in program.states)
    assert predict(cost, sizes, SLOW).state_bytes == int(held.subs({s: sizes[s.name] for s in held.free_symbols}))
    attention = next(line for line in cost.lines if line.kind == "attention")
    append = next(line for line in cost.lines if "append" in line.operation)
    assert "capacity" in attention.state_bytes
    assert "capacity" not in append.state_bytes
    assert append.state_bytes != "0"


def test_states_of_other_formats_are_changed_in_place(captured) -> None:
    """An operation that gives several states at once writes what is new, not the states anew."""
    program = run_passes(run_passes(captured("llama")), ["cached-decode", "quantize-cache"])
    cost = program_cost(program)
    appends = [line for line in cost.lines if "append" in line.operation]
    assert appends
    assert all("capacity" not in line.state_bytes + line.value_bytes for line in appends)
    attention = next(line for line in cost.lines if line.kind == "attention")
    assert "capacity" in attention.state_bytes


def test_a_window_reads_a_part_of_the_cache(builder) -> None:
    """Attention over a cache reads no more of it than its window, and computes no more."""
    b = builder()
    q, past = b.input("q", "batch", 4, 1, 8), b.input("past", "batch", dtype=torch.int64)
    cache = b.input("cache", "batch", 2, "tokens", 8)
    kinds = {}
    for predicate in ("", "q - k >= 0 & 9 - q + k >= 0"):
        node = b.call(dialect.kv_attention, q, cache, cache, past, [], None, predicate=predicate, scale=1.0)
        kinds[predicate] = flops_of_node(b.built, node), cache_ratio(b.built, node)
    tokens = b.built.dimensions["tokens"].symbol
    (flops, ratio), (windowed, part) = kinds.values()
    assert ratio == 1
    assert windowed.subs({tokens: 100}) * 10 == flops.subs({tokens: 100})
    assert windowed.subs({tokens: 5}) == flops.subs({tokens: 5})
    assert part.subs({tokens: 100}) == sympy.Rational(1, 10)
    assert part.subs({tokens: 5}) == 1


def test_passes_record_what_they_save(captured) -> None:
    """Each record of a pass that changed something has the cost before and after, and the next one goes on from there."""
    program = run_passes(captured("llama"))
    assert all((r.cost_before is None) == (not r.plan.decisions) for r in program.records)
    changed = [r for r in program.records if r.plan.decisions]
    assert len(changed) > 3
    for record, later in itertools.pairwise(changed):
        assert record.cost_after == later.cost_before
    assert changed[-1].cost_after == program_cost(program)


def test_prediction(builder) -> None:
    """Each operation takes as long as the slower of arithmetic and memory, and what a call costs; the sum is the program's."""
    b = builder()
    x, w = b.input("x", "batch", 8), b.weight("w", torch.ones(8, 8))
    program = b.program(b.call(aten.exp.default, b.call(aten.linear.default, x, w)))
    cost = program_cost(program)
    target = Target("cpu", 1e6, 1e6, call_us=2.0, cache_bytes=1000, cache_bytes_per_second=1e7, efficiency={"rest": 0.1})
    found = predict(cost, SIZES, target)
    product, rest = (next(line for line in found.lines if line.kind == kind) for kind in ("product", "rest"))
    assert product.flops == 24 * 16
    assert product.time_us == pytest.approx(max(384, 256 + 192 / 10) + 2)
    assert rest.time_us == pytest.approx(24 * 8 / 0.1 + 2)
    assert found.time_us == pytest.approx(product.time_us + rest.time_us)
    assert (product.bound, rest.bound) == ("compute", "compute")
    assert [line.kind for line in found.lines] == ["rest", "product"]
    far = dataclasses.replace(target, cache_bytes=100)
    product = next(line for line in predict(cost, SIZES, far).lines if line.kind == "product")
    assert product.time_us == pytest.approx(256 + 192 + 2)
    slow = predict(cost, SIZES, Target("cpu", 1e9, 1e6))
    assert {line.bound for line in slow.lines} == {"memory"}
    assert {line.bound for line in predict(cost, SIZES, Target("cpu", 1e12, 1e12, call_us=1.0)).lines} == {"call"}


def test_a_large_decoder_is_bound_by_memory() -> None:
    """Llama-7B decoding one token reads about 13.5 GB of half precision weights, and that is what its time is made of."""
    from graphwright.ir.records import CostLine, ProgramCost

    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    parameters = 32 * layer + 32000 * 4096
    line = CostLine("product", "linear", 1, f"2*batch*{parameters}", f"2*{parameters}", "0", "0")
    cost = ProgramCost((line,), 2 * parameters, "0")
    target = Target("cuda", 312e12, 2.0e12)
    found = predict(cost, {"batch": 1}, target)
    assert found.lines[0].bound == "memory"
    assert found.time_us == pytest.approx(6.6e3, rel=0.05)
    assert predict(cost, {"batch": 1024}, target).lines[0].bound == "compute"
