"""The rules that programs obey: each is broken once, and the message says what is wrong."""

from __future__ import annotations

import operator

import pytest
import torch

from graphwright.ir.errors import VerifyError
from graphwright.ir.verifier import verify, violations

aten = torch.ops.aten


@pytest.fixture
def program(builder):
    """A program that obeys the rules."""
    b = builder()
    x = b.input("x", "batch", 6)
    y = b.call(aten.linear.default, x, b.weight("w", torch.ones(3, 6)))
    y = b.call(aten.reshape.default, y, [b.call(operator.mul, b.size(x, 0), 3)])
    y.meta["stack_trace"] = '  File "/a/model.py", line 3, in forward\n    return y.reshape(-1)\n'
    built = b.program(b.call(aten.relu.default, y), 1, None)
    verify(built)
    return built


def node_of(program, target):
    """Return the call of `target`."""
    return next(node for node in program.graph.nodes if node.target is target)


def broken(program, match):
    """Check that the program is refused with a message."""
    with pytest.raises(VerifyError, match=match) as raised:
        verify(program)
    return raised.value


def test_mutation(program) -> None:
    """Operations that change a tensor are refused."""
    node_of(program, aten.relu.default).target = aten.relu_.default
    broken(program, "operation at %relu_default: aten.relu_.default changes a tensor in place")


def test_unknown_target(program) -> None:
    """A Python function that computes no size is refused."""
    node_of(program, aten.relu.default).target = torch.relu
    broken(program, "is not an operation")


def test_missing_weight(program) -> None:
    """A weight that a node reads must be there."""
    del program.weights["w"]
    broken(program, "weight at %w: there is no weight 'w'")


@pytest.mark.parametrize("other", [torch.ones(3, 5), torch.ones(3, 6, dtype=torch.float16)])
def test_another_weight(program, other) -> None:
    """A weight must have the shape and dtype that its node says."""
    program.weights["w"] = other
    broken(program, r"the node says \(3, 6\) torch.float32")


def test_missing_value(program) -> None:
    """Every node says what it computes."""
    del node_of(program, aten.relu.default).meta["val"]
    broken(program, 'value at %relu_default: meta."val". is missing')


def test_stale_shape(program) -> None:
    """A node whose operation changed, but not what it says, is found; the user's line and the graph are shown."""
    node_of(program, aten.reshape.default).args = (node_of(program, aten.linear.default), [-1, 1])
    error = broken(program, r"shape at %reshape_default: the node says \(3\*batch,\) torch.float32, its operation gives")
    assert error.__notes__[0] == "from /a/model.py:3: return y.reshape(-1)"
    assert "--> %reshape_default" in error.__notes__[1]


def test_stale_dtype(program) -> None:
    """A number of another type changes the dtype, though the numbers are equal."""
    node = node_of(program, aten.relu.default)
    node.target, node.args = aten.eq.Scalar, (node.args[0], 1)
    broken(program, "torch.float32, its operation gives .* torch.bool")


@pytest.mark.filterwarnings("ignore")
def test_arguments_that_do_not_fit(program) -> None:
    """What an operation does not accept is told in its own words."""
    node = node_of(program, aten.linear.default)
    with program.graph.inserting_before(node):
        wrong = program.weight("v", torch.ones(3, 7))
    node.args = (node.args[0], wrong)
    broken(program, "shape at %linear_default: the operation does not accept its arguments")


def test_order(program) -> None:
    """A node comes before its users."""
    relu, linear = node_of(program, aten.relu.default), node_of(program, aten.linear.default)
    linear.prepend(relu)
    broken(program, "graph: ")


def test_results(program) -> None:
    """A result is a node or a plain value."""
    program.output.args = ((torch.ones(1),),)
    broken(program, "signature at %output: a result is tensor")


def test_placeholders_first(program) -> None:
    """Inputs come before calls."""
    with program.graph.inserting_before(program.output):
        late = program.graph.placeholder("late")
    late.meta["val"] = program.inputs[0].meta["val"]
    broken(program, "signature at %late: placeholders come before calls")


def test_the_signature_counts(captured) -> None:
    """A program has as many results and inputs as its signature."""
    program = captured("convnet").copy()
    verify(program)
    results = program.output.args[0]
    program.output.args = ((*results, results[0]),)
    broken(program, "signature at %output: there are 2 results, the signature and the states have 1")
    program.output.args = (results,)
    with program.graph.inserting_before(program.inputs[0]):
        extra = program.graph.placeholder("extra")
    extra.meta["val"] = program.inputs[-1].meta["val"]
    broken(program, "signature: there are 2 inputs, the signature has 1")


def test_only_what_changed_is_inferred_again(program, monkeypatch) -> None:
    """A second run, and one on a copy, infer nothing."""
    monkeypatch.setattr("graphwright.ir.verifier.infer_value", lambda node, mode: pytest.fail(f"inferred {node}"))
    verify(program)
    verify(program.copy())


def test_equal_calls_are_inferred_once(builder, monkeypatch) -> None:
    """Layers that ask the same question get the same answer without asking PyTorch again."""
    b = builder()
    x = b.input("x", "batch", 6)
    target = aten.relu.default
    first = b.call(target, x)
    monkeypatch.setattr(type(target), "__call__", lambda self, *args, **kwargs: pytest.fail("inferred again"))
    second = b.call(target, first)
    assert b.built.shape(second) == b.built.shape(first)


def test_all_violations_are_listed(program) -> None:
    """Several broken rules are all reported."""
    del program.weights["w"]
    node_of(program, aten.relu.default).target = torch.relu
    assert {found.rule for found in violations(program)} >= {"operation", "weight"}
