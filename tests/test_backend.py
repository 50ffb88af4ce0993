"""torch.compile(model, backend="graphwright"): values, sizes, weights that change, and what PyTorch is left to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from graphwright import backend
from graphwright.ir.errors import GraphwrightError, OptionError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget what was compiled before, and after."""
    torch._dynamo.reset()
    backend._graphs.clear()
    yield
    torch._dynamo.reset()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="graphwright", **options)


def all_compiled() -> bool:
    return all(graph.compiled is not None for graph in backend.graphs())


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_is_registered() -> None:
    """PyTorch lists the backend, which the package's entry point tells it of."""
    assert "graphwright" in torch._dynamo.list_backends()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values(mode: Callable[[], Any]) -> None:
    """A module is compiled, and gives the values and strides that it gives without."""
    model, x = mlp(), torch.randn(3, 8)
    with mode():
        found = compiled(model)(x)
        close(found, model(x))
    assert len(backend.graphs()) == 1
    assert backend.graphs()[0].compiled is not None
    assert backend.graphs()[0].compiled.report.steps["matmul"] == 2


def test_sizes_that_vary() -> None:
    """With dynamic=True one compilation serves other sizes."""
    model = mlp()
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for rows in (3, 63, 1000):
            x = torch.randn(rows, 8)
            close(fast(x), model(x))
    assert len(backend.graphs()) == 1
    assert all_compiled()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", {"raise-attention": 2}),
        pytest.param("llama", {"raise-attention": 2, "raise-norms": 5, "raise-rotary": 4}, marks=pytest.mark.slow),
    ],
)
def test_language_models(name: str, expected: dict[str, int], built: Any, families: dict[str, Any]) -> None:
    """What PyTorch takes apart is recognised again: attention, norms and rotary embeddings; two lengths share a compilation."""
    model, sample = built(name), families[name].sample
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch, tokens in ((2, 7), (3, 12)):
            inputs = sample(batch, tokens, 0)
            close(fast(**inputs)[0], model(**inputs)[0])
    (graph,) = backend.graphs()
    assert graph.compiled is not None
    records = {record.pass_name: len(record.plan.decisions) for record in graph.compiled.report.records}
    assert {key: records[key] for key in expected} == expected


def test_graph_breaks() -> None:
    """Code that cannot be traced runs between compiled parts."""
    first, second = mlp(), nn.Linear(4, 4)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y) * (2 if float(y.sum()) > 0 else 3)

    x = torch.randn(3, 8)
    with torch.no_grad():
        close(compiled(run)(x), run(x))
    matmuls = [graph.compiled.report.steps.get("matmul", 0) for graph in backend.graphs() if graph.compiled is not None]
    assert [count for count in matmuls if count] == [2, 1]


def test_inputs_that_are_changed() -> None:
    """In-place changes of an argument reach the caller."""

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.mul_(2).add_(1)
        return x @ y

    x, y = torch.randn(3, 8), torch.randn(8, 4)
    own, expected = x.clone(), x.clone()
    with torch.no_grad():
        found, wanted = compiled(run)(own, y), run(expected, y)
    close(found, wanted)
    close(own, expected)
    assert all_compiled()


def test_buffers_that_are_changed() -> None:
    """A buffer that a call changes counts on, and does not lead to another compilation."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x * self.count

    model, x = Counting(), torch.randn(3, 4)
    fast = compiled(model)
    with torch.no_grad():
        for calls in (1, 2, 3, 4):
            close(fast(x), x * calls)
    assert len(backend.graphs()) == 1
    assert all_compiled()


def test_results_that_share_memory() -> None:
    """A result that is a view of an argument, or the argument, shares its memory; two results may share theirs."""

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.exp()
        return x[1:], x, y.transpose(0, 1), y

    x = torch.randn(3, 4)
    with torch.no_grad():
        part, same, turned, y = compiled(run)(x)
    assert part.untyped_storage().data_ptr() == same.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    close(part, x[1:])
    close(turned, x.exp().T)
    assert turned.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert turned.stride() == (1, 4)


def test_strides_and_plain_results() -> None:
    """Results lie as they would without, and numbers and None are passed through."""

    def run(x: torch.Tensor) -> tuple[Any, ...]:
        return (x + 1).permute(2, 0, 1) * 2, None, x.shape[0] * 2, 7

    fast = compiled(run, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5):
            x = torch.randn(rows, 4, 6)
            found, expected = fast(x), run(x)
            close(found[0], expected[0])
            assert found[0].stride() == expected[0].stride()
            assert found[1:] == expected[1:]
    assert all_compiled()


def test_a_weight_that_changes() -> None:
    """A weight changed in place, or exchanged, is never used in its old state; one that keeps changing becomes an input."""
    model, x = mlp(), torch.randn(3, 8)
    fast = compiled(model)
    with torch.no_grad():
        close(fast(x), model(x))
        for _ in range(4):
            model[0].weight.add_(0.5)
            close(fast(x), model(x))
        model.load_state_dict({name: tensor + 0.1 for name, tensor in model.state_dict().items()})
        close(fast(x), model(x))
        model[2].weight.data = torch.randn(4, 16)
        close(fast(x), model(x))
        model[2].bias = nn.Parameter(torch.randn(4))
        close(fast(x), model(x))
    assert all_compiled()
    assert len(backend.graphs()) <= 7


def test_modules_of_one_class_keep_their_own_weights() -> None:
    """Where PyTorch shares a graph between modules, each is called with its own weights, and compiled once."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu()

    layers = [Layer() for _ in range(3)]
    for layer in layers:
        layer.compile(backend="graphwright")
    x = torch.randn(3, 8)
    with torch.no_grad():
        for _ in range(2):
            for layer in layers:
                close(layer(x), layer.linear(x).relu())
    assert len(backend.graphs()) == 3
    assert all_compiled()


def test_weights_made_in_inference_mode() -> None:
    """Weights whose changes PyTorch does not count are taken as inputs, so that a change is seen."""
    with torch.inference_mode():
        model, x = nn.Linear(8, 4), torch.randn(3, 8)
        fast = compiled(model)
        close(fast(x), model(x))
        model.weight.mul_(2)
        close(fast(x), model(x))


def test_gradients_flow() -> None:
    """With gradients PyTorch runs the graph, forward and backward, and that is said."""
    model, twin, x = mlp(), mlp(), torch.randn(3, 8)
    compiled(model)(x).square().sum().backward()
    twin(x).square().sum().backward()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        close(own.grad, expected.grad)
    assert [graph.compiled for graph in backend.graphs()] == [None] * len(backend.graphs())
    assert "torch.no_grad()" in backend.graphs()[0].note


def test_what_cannot_be_compiled_is_run_by_pytorch() -> None:
    """A graph that Graphwright cannot compile runs as it is with a note; with fallback=False that is an error."""

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    x = torch.ones(3, 4)
    with torch.no_grad():
        close(compiled(run)(x), x + 1)
        assert backend.graphs()[-1].compiled is None
        assert "cond" in backend.graphs()[-1].note
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="cond") as caught:
            compiled(run, options={"fallback": False})(x)
    assert isinstance(caught.value.inner_exception, GraphwrightError)


def test_a_failure_of_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """If what was compiled fails when it is first called, PyTorch runs the graph from then on."""
    from graphwright.compiled import Compiled

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise GraphwrightError("the kernel does not compile")

    model, x = mlp(), torch.randn(3, 8)
    monkeypatch.setattr(Compiled, "__call__", fail)
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            close(fast(x), model(x))
    assert [graph.note for graph in backend.graphs()] == ["", "the kernel does not compile"]


def test_options() -> None:
    """Passes are given as options; unknown options, passes and modes are errors."""
    model, x = mlp(), torch.randn(3, 8)
    with torch.no_grad():
        compiled(model, options={"passes": ["fuse-projections:minimum=3"]})(x)
        (graph,) = backend.graphs()
        assert graph.compiled is not None
        assert graph.compiled.report.records[-1].options == "fuse-projections:minimum=3"
        for options in ({"passs": []}, {"passes": ["no-such-pass"]}):
            torch._dynamo.reset()
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
                compiled(model, options=options)(x)
            assert isinstance(caught.value.inner_exception, OptionError)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="has no modes"):
            compiled(model, mode="max-autotune")(x)
