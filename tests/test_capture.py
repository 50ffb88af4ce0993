"""Capturing modules: what is kept, what is refused and how, and what the graph looks like."""

from __future__ import annotations

import collections
import copy
import dataclasses
import operator

import pytest
import torch
from torch import nn

import graphwright
from graphwright.ir.errors import CaptureError, InputError, OptionError
from graphwright.ir.program import calls

aten = torch.ops.aten


class Wrapped(nn.Module):
    """A module whose forward is a function of x and a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def compare(model, *shapes, **options):
    """Capture a model of one float input at the first shape, and compare it with eager at all of them."""
    model.eval()
    program = graphwright.capture(model, torch.randn(shapes[0]), **options)
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program.reference(x), model(x), rtol=1e-5, atol=1e-6)
    return program


def targets(program):
    return {node.target for node in calls(program.graph)}


def test_weights_are_shared_and_detached():
    """A program reads the model's own weights, without gradients, tied ones once."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)
            self.shift = torch.tensor(3.0)

        def forward(self, ids):
            return self.head(self.embedding(ids)) * self.scale + self.shift

    model = Tied()
    program = graphwright.capture(model, torch.arange(8).view(2, 4))
    shared = {name: weight.data_ptr() for name, weight in program.weights.items()}
    assert len(shared) == 3
    assert model.embedding.weight.data_ptr() in shared.values()
    assert not any(weight.requires_grad for weight in program.weights.values())
    ids = torch.arange(9).view(3, 3)
    torch.testing.assert_close(program.reference(ids), model(ids).detach())


def test_training_mode_is_left_as_it_was():
    """A model in training mode is captured in evaluation mode, and every module keeps its own mode."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6))
    model[2].eval()
    program = graphwright.capture(model, torch.randn(4, 6))
    assert [model.training, model[1].training, model[2].training] == [True, True, False]
    assert any("evaluation mode" in note for note in program.notes)
    assert aten.dropout.default not in targets(program)


def test_hooks_are_traced():
    """Forward hooks, of the model itself and of a module in it, are part of the program."""
    model = Wrapped(torch.relu)
    model.linear.register_forward_hook(lambda module, args, output: output * 2)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, output: output - 3)
    compare(model, (2, 6), (5, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat(x.chunk(4, dim=-1)[::-1], -1),
        lambda x: torch.cat(x.split([1, 2, 3], dim=1)[1:], 1),
        lambda x: sum(x.unbind(-1)),
        lambda x: x.unflatten(-1, (2, 3)).movedim(1, -1).flatten(1),
        lambda x: x.view(x.shape[0], 1, 6).expand(-1, 3, -1).contiguous().view(-1, 6),
        lambda x: x.transpose(0, 1).reshape(-1),
        lambda x: x.T @ x,
        lambda x: 1 - x.half().float() + (2 - x.long()),
        lambda x: x[:, -3:-1] + x[:, ::3] + x.narrow(1, 2, 2),
        lambda x: x[:, -1] + x[..., 0],
        lambda x: x.unsqueeze(-1).squeeze((-1, 1)).unsqueeze(0).squeeze(0),
        lambda x: ((x > 0) & (x < 1) | (x > 2) ^ (x < -1)).float().to(torch.float64),
        lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 3, 2).transpose(1, 2)[..., :2].contiguous()) * 1j),
        lambda x: x.masked_fill(x < 0, 0).clone().add_(1).mul_(x).relu_(),
        lambda x: torch.zeros_like(x).copy_(x[:1]) + torch.empty_like(x).fill_(2.0),
        lambda x: x.new_zeros(x.shape[0], 6).index_put_((torch.tensor([0]),), torch.tensor(1.0)) + x,
        lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2] * x.shape[0],
        lambda x: x.type_as(torch.zeros(1, dtype=torch.bfloat16)).expand_as(x),
    ],
)
def test_forms_of_the_same_operations(function):
    """Views, parts, casts and in-place operations compute the same in normal form, at other batch sizes too."""
    program = compare(Wrapped(function), (4, 6), (7, 6), (1, 6))
    gone = {
        aten.view.default,
        aten.transpose.int,
        aten.t.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.clone.default,
        aten.detach.default,
        aten.to.dtype,
        aten.rsub.Scalar,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        operator.getitem,
    }
    assert targets(program) & gone == set()
    assert not any(getattr(target, "_schema", None) and target._schema.is_mutable for target in targets(program))


def test_changing_part_of_a_value():
    """Writing into a slice is turned into an operation on values."""

    def function(x):
        y = x * 2
        y[:, 1:3] = 0
        return y + x

    compare(Wrapped(function), (4, 6), (3, 6))


def test_in_place_operations_keep_their_dtype():
    """An in-place sum with a wider operand keeps the narrow dtype."""
    program = compare(Wrapped(lambda x: x.half().clone().add_(x.double() * 0.3)), (4, 6), (3, 6))
    assert program.output.args[0][0].meta["val"].dtype == torch.float16


def test_a_size_of_one_that_is_special():
    """squeeze() drops a batch of one in the model, and not in its program, which refuses it."""
    program = compare(Wrapped(torch.squeeze), (4, 6), (2, 6))
    assert program.dimensions["batch"].low == 2
    with pytest.raises(InputError, match="at least 2, and is 1"):
        program.reference(torch.randn(1, 6))


def test_nodes_keep_where_they_come_from():
    """Every call but sizes has a value, its line in the model, and the modules around it without the capture's own."""
    program = compare(Wrapped(torch.relu), (4, 6))
    linear = next(calls(program.graph, aten.linear.default))
    assert "test_capture.py" in linear.meta["stack_trace"]
    assert "exporting.py" not in linear.meta["stack_trace"]
    assert [path for path, _ in linear.meta["nn_module_stack"].values()] == ["", "linear"]
    assert all(node.meta.get("val") is not None for node in program.graph.nodes if node.op != "output")


def test_products_with_weights_are_linear():
    """x @ w + b, as in GPT-2, becomes aten.linear."""

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))
            self.bias = nn.Parameter(torch.randn(5))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight) @ self.weight.t()

    assert aten.linear.default in targets(compare(Conv1D(), (4, 6), (2, 6)))


# -- what is returned

Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    values: dict
    rest: tuple
    name: str = "result"
    nothing: object = None


def test_results_come_back_in_their_own_containers():
    """Dataclasses, named tuples, dicts, None and constants come back as the model returned them."""

    class Model(nn.Module):
        def forward(self, x):
            return Result({"a": x + 1, 3: [x, None]}, (Pair(x * 2, 5), x.shape[0]))

    x = torch.randn(5, 2)
    result = graphwright.capture(Model(), torch.randn(3, 2)).reference(x)
    assert type(result) is Result
    assert (result.name, result.nothing, result.values[3][1]) == ("result", None, None)
    assert type(result.rest[0]) is Pair
    assert (result.rest[0].second, result.rest[1]) == (5, 5)
    assert result.values[3][0] is x
    torch.testing.assert_close(result.values["a"], x + 1)


def test_an_object_that_cannot_be_returned_is_named():
    """A model that returns an unknown object is refused, with its type and place."""

    class Model(nn.Module):
        def forward(self, x):
            return {"x": x, "other": collections.deque([x])}

    with pytest.raises(CaptureError, match=r"deque as other"):
        graphwright.capture(Model(), torch.randn(3, 2))


# -- how it is called


def test_positional_named_and_nested_arguments():
    """`*args`, keyword-only and nested arguments can be passed in any legal way; constants are fixed."""

    class Model(nn.Module):
        def forward(self, first, /, *rest, batch, flag=True, scale=2.0):
            total = first * scale + sum(rest)
            return total + batch["a"] - batch["b"][0] if flag else total

    t = [torch.randn(3, 2) for _ in range(5)]
    model = Model()
    program = graphwright.capture(model, t[0], t[1], t[2], batch={"a": t[3], "b": [t[4]]}, scale=3.0)
    batch = {"b": [t[0]], "a": t[1]}
    torch.testing.assert_close(
        program.reference(t[4], t[3], t[2], scale=3.0, batch=batch), model(*t[:1:-1], batch=batch, scale=3.0)
    )
    torch.testing.assert_close(program.reference(t[4], t[3], t[2], batch=batch), model(*t[:1:-1], batch=batch, scale=3.0))
    with pytest.raises(InputError, match=r"scale=2\.0: the model was captured with scale=3\.0"):
        program.reference(t[4], t[3], t[2], batch=batch, scale=2.0)
    with pytest.raises(InputError, match="captured without 'flag'"):
        program.reference(t[4], t[3], t[2], batch=batch, flag=False)


def test_arguments_that_do_not_fit_forward():
    """A sample call that the model would refuse is refused, as is one without tensors, and what is no module."""
    with pytest.raises(InputError, match=r"Wrapped\.forward"):
        graphwright.capture(Wrapped(torch.relu), torch.randn(2, 6), y=1)
    with pytest.raises(InputError, match="no tensor"):
        graphwright.capture(Wrapped(torch.relu), 3)
    with pytest.raises(CaptureError, match=r"takes a torch\.nn\.Module"):
        graphwright.capture(torch.relu, torch.randn(2))


# -- sizes


class Positions(nn.Module):
    """Token and position embeddings: no more than 16 tokens."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 4)
        self.positions = nn.Embedding(16, 4)

    def forward(self, ids, mask=None):
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return x if mask is None else x * mask[..., None]


def test_dimensions_have_names_and_ranges():
    """Batch and tokens of two inputs are one dimension each, with the range that the position table allows."""
    program = graphwright.capture(Positions(), torch.zeros(1, 1, dtype=torch.long), mask=torch.ones(1, 1, dtype=torch.bool))
    assert {d.name: (d.low, d.high) for d in program.dimensions.values()} == {"batch": (0, None), "tokens": (1, 16)}
    assert [spec.shape for spec in program.signature.tensors] == [("batch", "tokens")] * 2
    assert {str(size) for size in program.shape(program.output.args[0][0])} == {"batch", "tokens", "4"}
    assert program.reference(torch.zeros(0, 5, dtype=torch.long), torch.ones(0, 5, dtype=torch.bool)).shape == (0, 5, 4)
    with pytest.raises(InputError, match="from 1 to 16, and is 17"):
        program.reference(torch.zeros(1, 17, dtype=torch.long), torch.ones(1, 17, dtype=torch.bool))
    with pytest.raises(InputError, match="must be equal"):
        program.reference(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))


def test_names_can_be_given_or_left_out():
    """`dynamic` names the sizes that vary; without it none does; it must fit the arguments."""
    x = torch.randn(3, 6)
    named = graphwright.capture(Wrapped(torch.relu), x, dynamic={"x": {0: "rows"}})
    assert [spec.shape for spec in named.signature.tensors] == [("rows", 6)]
    fixed = graphwright.capture(Wrapped(torch.relu), x, dynamic=False)
    assert fixed.dimensions == {}
    with pytest.raises(InputError, match="dimension 0 must be 3"):
        fixed.reference(torch.randn(4, 6))
    with pytest.raises(OptionError, match="Did you mean 'x'"):
        graphwright.capture(Wrapped(torch.relu), x, dynamic={"xx": {0: "rows"}})
    with pytest.raises(OptionError, match="no dimension 2"):
        graphwright.capture(Wrapped(torch.relu), x, dynamic={"x": {2: "rows"}})


def test_a_size_that_the_code_fixes():
    """A size that the code makes special is fixed with a note; if it was asked for, that is an error."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            return x + self.table

    program = graphwright.capture(Table(), torch.randn(2, 5, 6))
    assert [spec.shape for spec in program.signature.tensors] == [("batch", 5, 6)]
    assert any("fixed at 5" in note for note in program.notes)
    with pytest.raises(CaptureError, match="What to do"):
        graphwright.capture(Table(), torch.randn(2, 5, 6), dynamic={"x": {1: "tokens"}})


def test_a_silent_special_case_is_found():
    """Code that branches on a length is captured for the lengths where the graph is right."""
    program = graphwright.capture(Wrapped(lambda x: x * 2 if x.shape[1] < 20 else x * 3), torch.randn(2, 7, 6))
    model = Wrapped(lambda x: x * 2 if x.shape[1] < 20 else x * 3)
    model.load_state_dict({name: weight for name, weight in program.weights.items()})
    tokens = program.dimensions["tokens"]
    assert (tokens.low, tokens.high) == (1, 19)
    for size in (tokens.low, tokens.high):
        x = torch.randn(2, size, 6)
        torch.testing.assert_close(program.reference(x), model(x).detach())
    with pytest.raises(InputError, match="from 1 to 19, and is 20"):
        program.reference(torch.randn(2, 20, 6))


# -- errors


class Branching(nn.Module):
    """Decides by a value."""

    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


def test_a_branch_on_a_value_is_refused_with_its_line():
    """Control flow that depends on data is refused with file, line, source and advice."""
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+: if x\.sum\(\) > 0:(.|\n)*torch\.where"):
        graphwright.capture(Branching(), torch.randn(3, 2))


def test_changing_a_buffer_is_refused_by_name():
    """A model that counts its calls is refused, with the buffer and the line."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return x * self.count

    with pytest.raises(CaptureError, match=r"count at .*test_capture\.py:\d+: self\.count\.add_"):
        graphwright.capture(Counting(), torch.randn(3, 2))


def test_changing_an_argument_is_refused():
    """A model that writes into its input is refused, with the name of the input."""

    class Writing(nn.Module):
        def forward(self, x):
            x.mul_(2)
            return x + 1

    with pytest.raises(CaptureError, match=r"\n  x at .*x\.mul_\(2\)"):
        graphwright.capture(Writing(), torch.randn(3, 2))


def test_autocast_is_refused():
    """A model that switches autocast on is refused with the line."""

    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.T

    with pytest.raises(CaptureError, match="autocast"):
        graphwright.capture(Wrapped(function), torch.randn(3, 6))


@pytest.mark.parametrize(
    ("name", "dtype"), [("bert", torch.float16), ("gpt2", torch.bfloat16), ("encoder-post-norm", torch.bfloat16)]
)
def test_half_precision_models(name, dtype, families, built):
    """Models in half precision compute what eager does."""
    model = copy.deepcopy(built(name)).to(dtype)

    def arguments(*sizes):
        kwargs = families[name].sample(*sizes)
        return {key: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for key, v in kwargs.items()}

    program = graphwright.capture(model, **arguments(2, 7, 0))
    kwargs = arguments(3, 11, 1)
    with torch.no_grad():
        expected, found = model(**kwargs), program.reference(**kwargs)
    expected, found = (getattr(output, "logits", output) for output in (expected, found))
    assert expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
