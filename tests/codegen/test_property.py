"""Random graphs against eager, at the size that they were compiled with and at another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphwright
from graphwright.ir.errors import CaptureError

SIZES = ({"b": 5, "t": 6}, {"b": 7, "t": 9})
"""The first are compiled for. The others are no smaller: a slice to 3 then means 3. No width of a model equals one of them."""

WIDTHS = (1, 4, 8, 20, 33)
LARGEST = 20000
"""No value has more elements."""

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Step:
    """A call of an operation: its name, the numbers of the values it takes, and its other arguments."""

    name: str
    operands: tuple[int, ...]
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join([*(f'v{k}' for k in self.operands), *map(repr, self.arguments)])})"


def _positions(x: torch.Tensor, dim: int) -> torch.Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.arange(x.shape[dim], device=x.device).view(shape)


def _masked(x: torch.Tensor, shift: int) -> torch.Tensor:
    return torch.where(_positions(x, -1) <= _positions(x, -2) + shift, x, -1.0)


def _self_product(x: torch.Tensor) -> torch.Tensor:
    return torch.matmul(torch.tanh(x), torch.tanh(x).transpose(-1, -2))


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "exp": lambda x: torch.exp(-x.abs()),
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x),
    "root": lambda x: (x * x + 0.5).sqrt(),
    "affine": lambda x: 1.5 - 0.5 * x,
    "clamp": lambda x: x.clamp(-0.7, 1.1),
    "add": operator.add,
    "sub": operator.sub,
    "mul": lambda x, y: x * torch.tanh(y),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x < y, x, 0.5 * y + 0.5 * x),
    "sum": lambda x, dims, keep: x.sum(dims, keepdim=keep),
    "mean": lambda x, dims, keep: x.mean(dims, keepdim=keep),
    "amax": lambda x, dims, keep: x.amax(dims, keepdim=keep),
    "centre": lambda x: x - x.mean(-1, keepdim=True),
    "softmax": lambda x, dim: x.softmax(dim),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], eps=0.1),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=0.1),
    "permute": lambda x, order: x.permute(order),
    "flatten": lambda x, dim: x.flatten(dim, dim + 1),
    "split": lambda x, dim, size: x.unflatten(dim, (-1, size)),
    "unsqueeze": lambda x, dim: x.unsqueeze(dim),
    "squeeze": lambda x, dim: x.squeeze(dim),
    "expand": lambda x, dim, size: x.expand(*x.shape[:dim], size, *x.shape[dim + 1 :]),
    "slice": lambda x, dim, start, stop, step: x[(slice(None),) * dim + (slice(start, stop, step),)],
    "select": lambda x, dim, at: x.select(dim, at),
    "flip": lambda x, dim: x.flip(dim),
    "roll": lambda x, shift, dim: x.roll(shift, dim),
    "pad": lambda x, before, after: F.pad(x, (before, after), value=0.25),
    "pad_rows": lambda x, before, after: F.pad(x, (0, 0, before, after)),
    "cat": lambda x, y, dim: torch.cat([x, y], dim),
    "cat_three": lambda x, y, dim: torch.cat([y, x, y], dim),
    "stack": lambda x, y, dim: torch.stack([x, y], dim),
    "positions": lambda x, dim: x + 0.1 * _positions(x, dim),
    "masked": _masked,
    "tril": lambda x, shift: x.tril(shift),
    "triu": lambda x, shift: x.triu(shift),
    "take": lambda x, dim: x.index_select(dim, torch.arange(x.shape[dim] - 1, -1, -1)),
    "every_other": lambda x, dim: x.index_select(dim, torch.arange(0, x.shape[dim], 2)),
    "cumsum": lambda x: torch.tanh(x).cumsum(-1),
    "product": _self_product,
    "linear": lambda x, weight: F.linear(x, weight),
    "linear_bias": lambda x, weight, bias: F.linear(x, weight, bias),
}

POINTWISE = ("exp", "tanh", "relu", "gelu", "silu", "leaky", "root", "affine", "clamp")
BINARY = ("add", "sub", "mul", "maximum", "where")
ROWS = ("centre", "log_softmax", "layer_norm", "rms_norm", "cumsum")


class Graph(nn.Module):
    """A module that makes steps, and returns some of the values."""

    def __init__(self, steps: Sequence[Step], results: Sequence[int], weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.steps, self.results = tuple(steps), tuple(results)
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Tensors:
        values = [x, y, *self.weights]
        for step in self.steps:
            values.append(CALLS[step.name](*(values[k] for k in step.operands), *step.arguments))
        return tuple(values[k] for k in self.results)

    def __str__(self) -> str:
        count = 2 + len(self.weights)
        lines = [f"v{count + k} = {step}" for k, step in enumerate(self.steps)]
        shapes = [f"v{2 + k}: {list(w.shape)}" for k, w in enumerate(self.weights)]
        return "\n".join([", ".join(shapes), *lines, f"return {self.results}"])


class Planner:
    """Draws steps that are possible at both sizes.

    Args:
        draw: of hypothesis.
        width: of the inputs.
    """

    def __init__(self, draw: Callable[..., Any], width: int) -> None:
        self.draw = draw
        generator = torch.Generator().manual_seed(0)
        shapes = [[(s["b"], s["t"], width) for s in SIZES], [(s["b"], 1, width) for s in SIZES]]
        self.inputs = [[torch.randn(shape, generator=generator) for shape in pair] for pair in shapes]
        self.weights = [torch.randn(shape, generator=generator) * 0.4 for shape in ((7, width), (7,), (width,))]
        self.values: list[Tensors] = [tuple(pair) for pair in self.inputs]
        self.values += [(w, w) for w in self.weights]
        self.steps: list[Step] = []

    def integer(self, low: int, high: int) -> int:
        """Draw an integer."""
        return int(self.draw(st.integers(low, high)))

    def recent(self) -> int:
        """Draw the number of a value that is no weight, late ones more often."""
        candidates = [0, 1, *range(2 + len(self.weights), len(self.values))]
        return candidates[-1 - min(self.integer(0, len(candidates) - 1), self.integer(0, len(candidates) - 1))]

    def step(self) -> None:
        """Draw one step; nothing if what is drawn is not possible."""
        k = self.recent()
        options = list(self.options(k, self.values[k]))
        step = options[self.integer(0, len(options) - 1)]
        try:
            made = tuple(CALLS[step.name](*(self.values[n][s] for n in step.operands), *step.arguments) for s in (0, 1))
        except (RuntimeError, IndexError):
            return
        if all(0 < m.numel() <= LARGEST and m.dim() <= 5 for m in made) and made[0].dim() == made[1].dim():
            self.steps.append(step)
            self.values.append(made)

    def options(self, k: int, pair: Tensors) -> Iterator[Step]:
        """Yield one step of each kind for a value."""
        rank, shape = pair[0].dim(), pair[0].shape
        fixed = [d for d in range(rank) if pair[0].shape[d] == pair[1].shape[d]]
        yield Step(POINTWISE[self.integer(0, len(POINTWISE) - 1)], (k,))
        others = [n for n in range(len(self.values)) if self.broadcasts(k, n)]
        if others:
            other = others[self.integer(0, len(others) - 1)]
            pairs = [(k, other), (other, k)]
            yield Step(BINARY[self.integer(0, len(BINARY) - 1)], pairs[self.integer(0, 1)])
        if rank == 0:
            return
        dim = self.integer(0, rank - 1)
        yield Step(ROWS[self.integer(0, len(ROWS) - 1)], (k,))
        dims = [(-1,), (-2, -1), (dim,), tuple(range(rank))][self.integer(0, 3)]
        yield Step(("sum", "mean", "amax")[self.integer(0, 2)], (k,), (dims, bool(self.integer(0, 1))))
        yield Step("softmax", (k,), ((-1, -1, dim)[self.integer(0, 2)],))
        yield Step("permute", (k,), (tuple(self.draw(st.permutations(range(rank)))),))
        yield Step(
            "slice", (k,), (dim, *((1, None, 1), (None, -1, 1), (0, 3, 1), (2, None, 1), (1, None, 2))[self.integer(0, 4)])
        )
        yield Step("select", (k,), (dim, self.integer(-1, 0)))
        yield Step(("flip", "take", "every_other", "positions")[self.integer(0, 3)], (k,), (dim,))
        yield Step("roll", (k,), (self.integer(1, 2), dim))
        yield Step("pad", (k,), (self.integer(0, 3), self.integer(0, 3)))
        yield Step("unsqueeze", (k,), (self.integer(0, rank),))
        alike = [
            n for n in range(len(self.values)) if all(a.shape == b.shape for a, b in zip(pair, self.values[n], strict=True))
        ]
        other = alike[self.integer(0, len(alike) - 1)]
        yield Step(("cat", "cat_three", "stack")[self.integer(0, 2)], (k, other), (dim,))
        if rank >= 2:
            yield Step("flatten", (k,), (self.integer(0, rank - 2),))
            yield Step("pad_rows", (k,), (self.integer(0, 2), self.integer(0, 2)))
            yield Step(("masked", "tril", "triu")[self.integer(0, 2)], (k,), (self.integer(-2, 2),))
            yield Step("product", (k,))
        for d in fixed:
            if shape[d] == 1:
                yield Step("expand", (k,), (d, self.integer(2, 4)))
                yield Step("squeeze", (k,), (d,))
            for size in (2, 3, 4, 5):
                if shape[d] % size == 0 and shape[d] > size:
                    yield Step("split", (k,), (d, size))
        if shape[-1] == self.weights[0].shape[1] and rank - 1 in fixed:
            yield Step("linear", (k, 2))
            yield Step("linear_bias", (k, 2, 3))

    def broadcasts(self, k: int, n: int) -> bool:
        """Whether two values can be combined at both sizes."""
        try:
            for s in (0, 1):
                torch.broadcast_shapes(self.values[k][s].shape, self.values[n][s].shape)
        except RuntimeError:
            return False
        return True


@st.composite
def graphs(draw: Callable[..., Any]) -> tuple[Graph, list[list[torch.Tensor]]]:
    """Draw a graph, and the inputs of its two sizes."""
    planner = Planner(draw, draw(st.sampled_from(WIDTHS)))
    for _ in range(draw(st.integers(3, 12))):
        planner.step()
    made = range(2 + len(planner.weights), len(planner.values))
    results = {planner.recent() for _ in range(draw(st.integers(0, 2)))} | ({made[-1]} if made else {0})
    return Graph(planner.steps, sorted(results), planner.weights), planner.inputs


def compare(graph: Graph, inputs: Sequence[Tensors], dynamic: bool) -> None:
    """Compile a graph, and compare it with eager at the sizes that it takes: by the error against float64."""
    names = {"x": {0: "b", 1: "t"}, "y": {0: "b"}}
    compiled = graphwright.compile(graph, *(pair[0] for pair in inputs), dynamic=names if dynamic else False, check=False)
    for s in (0, 1) if dynamic and len(compiled.schedule.dimensions) == 2 else (0,):
        given_tensors = [pair[s] for pair in inputs]
        with torch.no_grad():
            eager = graph(*given_tensors)
            exact = graph.double()(*(t.double() for t in given_tensors))
            graph.float()
        compiled(*given_tensors)
        compiled._executable._arena.fill_(0xFF)
        found = compiled(*given_tensors)
        for k, a, b, c in zip(graph.results, found, eager, exact, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape, f"v{k} at size {s}: {a.shape} instead of {b.shape}"
            assert not a.isnan().any(), f"v{k} at size {s}: {int(a.isnan().sum())} of {a.numel()} are NaN"
            allowed = 8 * (b - c).abs().max() + 64 * torch.finfo(torch.float32).eps * c.abs().max()
            assert (a - c).abs().max() <= allowed, (
                f"v{k} at size {s}: {int(((a - c).abs() > allowed).sum())} of {a.numel()} differ"
            )


COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}


def check_graph(drawn: tuple[Graph, list[Any]], dynamic: bool) -> None:
    graph, inputs = drawn
    note(str(graph))
    try:
        compare(graph.eval(), inputs, dynamic)
    except CaptureError:
        # Something in the graph is only possible at the size of the sample.
        reject()


@settings(max_examples=10, **COMMON)
@given(graphs())
def test_random_graphs_of_fixed_sizes(drawn: Any) -> None:
    """Graphs of 3 to 12 operations compute what eager does."""
    check_graph(drawn, False)


@settings(max_examples=15, **COMMON)
@given(graphs())
def test_random_graphs_of_any_size(drawn: Any) -> None:
    """Graphs compiled for sizes that vary compute what eager does, at another size too."""
    check_graph(drawn, True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any"])
def test_many_random_graphs(dynamic: bool) -> None:
    """Many more graphs compute what eager does."""

    @settings(max_examples=150, **COMMON)
    @given(graphs())
    def run(drawn: Any) -> None:
        check_graph(drawn, dynamic)

    run()
