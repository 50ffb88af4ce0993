"""The backend of torch.compile: `torch.compile(model, backend="graphwright")`.

It compiles what runs without gradients, under `torch.no_grad()` or `torch.inference_mode()`. A graph that gradients are to flow
through is run by PyTorch as it is traced, forward and backward, so that training works and gains nothing. So is a graph that
Graphwright cannot compile. `graphs()` tells which was done, and why.

In-place changes of inputs and results that share memory with inputs work as in PyTorch: torch.compile takes them out of the
graph, and carries them out after it.

Weights - parameters and buffers that torch.compile knows to stay the same tensors - are taken into what is compiled: they are
packed, folded and fused. Every call checks that they are the same tensors, and unchanged since: a changed weight leads to
another compilation, and one that changed twice is taken as an input from then on. A change that PyTorch itself does not see,
such as `weight.data.copy_(...)`, is not seen: write `weight.copy_(...)` under `torch.no_grad()`, as optimizers and
`load_state_dict` do. Python floats that torch.compile passes as tensors, such as the epsilon of a norm, are taken in likewise,
by value.

Options, as in `torch.compile(model, backend="graphwright", options={"passes": ["..."]})`:

- `passes`: what to do beyond what is done to every model, as for `graphwright.compile`.
- `fallback`: False to raise an error where PyTorch would run the graph instead. Default True.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import CaptureError, GraphwrightError, OptionError, unknown
from graphwright.passes.base import Pass
from graphwright.passes.registry import as_passes

from .compiled import Compiled
from .compiling import compile
from .exporting import quiet
from .traced_graph import program_of

MOST_WEIGHTS = 64
"""Sets of weights that a graph is kept compiled for: layers of one class share a graph."""

MOST_CHANGES = 2
"""A weight that changes as often is an input."""

MOST_GRAPHS = 256

logger = logging.getLogger(__name__)

Run = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class TracedGraph:
    """A graph that torch.compile handed over.

    Args:
        nodes: number of calls in it.
        compiled: what runs it; None where PyTorch does.
        note: why PyTorch does; "" where it does not.
    """

    nodes: int
    compiled: Compiled | None
    note: str = ""


_graphs: deque[TracedGraph] = deque(maxlen=MOST_GRAPHS)


def graphs() -> list[TracedGraph]:
    """Return what was made of each graph that torch.compile handed over, oldest first: the last 256."""
    return list(_graphs)


@dataclass(frozen=True)
class _Options:
    passes: tuple[Pass, ...] = ()
    fallback: bool = True


def graphwright_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph for torch.compile, which calls this.

    Args:
        graph_module: the graph, of PyTorch's functions.
        example_inputs: what it will be called with.
        options: `passes` and `fallback`, see above.
        mode: there is none but the default.

    Returns:
        What runs the graph.

    Raises:
        OptionError: an option is unknown.
        GraphwrightError: the graph cannot be compiled, and `fallback` is False.
    """
    if mode not in (None, "default"):
        raise OptionError(f"torch.compile(mode={mode!r}): the backend graphwright has no modes; leave it out")
    chosen = _parse(options or {})

    def inference(traced: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        weights = static_inputs()
        graph = _Graph(traced, weights, chosen)
        if len(inputs) == len(example_inputs):
            # What is assumed of sizes while torch.compile still traces becomes a condition of its own.
            with on_real_tensors():
                graph.prepare(example_inputs)
        return boxed(graph)

    def training(traced: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        note = "gradients flow through it: call the model under torch.no_grad() to have it compiled"
        return boxed(_plain(traced, CaptureError(f"torch.compile: {note}"), chosen))

    return aot(graph_module, example_inputs, inference, training)


def _parse(options: Mapping[str, Any]) -> _Options:
    for name in options:
        if name not in ("passes", "fallback"):
            raise OptionError(f"torch.compile: {unknown('option', name, ('passes', 'fallback'))}")
    passes: Iterable[Pass | str] = options.get("passes", ())
    return _Options(tuple(as_passes(passes)), bool(options.get("fallback", True)))


def _plain(traced: fx.GraphModule, reason: GraphwrightError, options: _Options) -> Run:
    """Return what lets PyTorch run a graph, noted with the reason.

    Raises:
        GraphwrightError: the reason, if that is not wanted.
    """
    if not options.fallback:
        raise reason
    logger.info("PyTorch runs a graph: %s", reason)
    _graphs.append(TracedGraph(_count(traced), None, str(reason)))
    return lambda args: traced(*args)


def _count(traced: fx.GraphModule) -> int:
    return sum(1 for node in traced.graph.nodes if node.op == "call_function")


class _Graph:
    """A traced graph, compiled once for each set of weights that it is called with.

    Args:
        traced: the graph.
        weights: the numbers of the arguments that are weights.
    """

    def __init__(self, traced: fx.GraphModule, weights: Iterable[int], options: _Options) -> None:
        self.traced = traced
        self.weights = tuple(weights)
        self.numbers = tuple(set(numbers_of(traced)) - set(self.weights))
        self.options = options
        self.runs: OrderedDict[Any, Run] = OrderedDict()
        self.changes: Counter[int] = Counter()
        self.lock = threading.Lock()

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        with self.lock:
            run = self._find(args)
        if not isinstance(run, _Caller) or run.proved:
            return run(args)
        try:
            results = run(args)
        except GraphwrightError as error:
            # Kernels are compiled when they are first called.
            plain = _plain(self.traced, error, self.options)
            with self.lock:
                self.runs = OrderedDict((key, plain if kept is run else kept) for key, kept in self.runs.items())
            return plain(args)
        run.proved = True
        return results

    def prepare(self, args: Sequence[Any]) -> None:
        """Compile for the weights among `args`, without a call."""
        if all(type(args[k]) in (torch.Tensor, torch.nn.Parameter) for k in (*self.weights, *self.numbers)):
            self._find(args)

    def _find(self, args: Sequence[Any]) -> Run:
        # Tensors that were made in inference mode do not count their changes.
        weights = [k for k in self.weights if not args[k].is_inference()]
        numbers = {k: float(args[k]) for k in self.numbers}
        key = (
            *[(k, args[k].data_ptr(), args[k]._version) for k in weights],
            *[(k, "number", value) for k, value in numbers.items()],
        )
        run = self.runs.get(key)
        if run is not None:
            return run
        if self._forget(key):
            return self._find(args)
        self.runs[key] = run = self._compile({**{k: args[k] for k in weights}, **numbers})
        if len(self.runs) > MOST_WEIGHTS:
            self.runs.popitem(last=False)
        return run

    def _forget(self, key: Any) -> bool:
        """Drop what was compiled for earlier values of the same weights; return whether a weight became an input by that."""
        changed: set[int] = set()
        for old in list(self.runs):
            if [entry[:2] for entry in old] == [entry[:2] for entry in key]:
                del self.runs[old]
                changed |= {new[0] for before, new in zip(old, key, strict=True) if before != new}
        self.changes.update(changed)
        often = {k for k in changed if self.changes[k] >= MOST_CHANGES}
        self.weights = tuple(k for k in self.weights if k not in often)
        self.numbers = tuple(k for k in self.numbers if k not in often)
        if often:
            self.runs.clear()
        return bool(often)

    def _compile(self, fixed: Mapping[int, torch.Tensor | float]) -> Run:
        try:
            with quiet():
                program = program_of(self.traced, fixed)
                compiled = compile(program, passes=self.options.passes)
        except GraphwrightError as error:
            return _plain(self.traced, error, self.options)
        _graphs.append(TracedGraph(_count(self.traced), compiled))
        # The weights are held: another tensor must not come to lie where one of them lay.
        return _Caller(self.traced, compiled, fixed)


def numbers_of(traced: fx.GraphModule) -> list[int]:
    """Return the numbers of the arguments in which torch.compile passes Python floats: float64 tensors without dimensions."""
    placeholders = [node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"]
    return [
        k
        for k, value in enumerate(placeholders)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.dim() == 0 and value.device.type == "cpu"
    ]


class _Caller:
    """Calls a compiled graph with the arguments of the traced one, and lays its results out as the traced one would."""

    def __init__(self, traced: fx.GraphModule, compiled: Compiled, fixed: Mapping[int, torch.Tensor | float]) -> None:
        self.compiled = compiled
        self.fixed = fixed
        self.proved = False
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self.inputs = [k for k, n in enumerate(placeholders) if k not in fixed and isinstance(n.meta["val"], torch.Tensor)]
        self.values = [placeholders[k].meta["val"] for k in self.inputs]
        (self.results,) = next(node for node in traced.graph.nodes if node.op == "output").args

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        tensors = [args[k] for k in self.inputs]
        results = self.compiled(*tensors)
        return [
            self._laid_out(result, node, tensors) if isinstance(result, torch.Tensor) else result
            for result, node in zip(results, self.results, strict=True)
        ]

    def _laid_out(self, result: torch.Tensor, node: fx.Node, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a result with the strides that torch.compile, and the code around the graph, count on."""
        wanted = node.meta["val"].stride()
        if not all(isinstance(stride, int) for stride in wanted):
            sizes = {
                size.node.expr: found
                for value, tensor in zip(self.values, tensors, strict=True)
                for size, found in zip(value.shape, tensor.shape, strict=True)
                if isinstance(size, torch.SymInt)
            }
            wanted = tuple(s if isinstance(s, int) else int(s.node.expr.xreplace(sizes)) for s in wanted)
        if all(have == want or n == 1 for have, want, n in zip(result.stride(), wanted, result.shape, strict=True)):
            return result
        return torch.empty_strided(result.shape, wanted, dtype=result.dtype, device=result.device).copy_(result)


# -- torch's side: what of it is not public is used here only


def boxed(run: Run) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that takes its arguments as one list, in the form that torch marks as such."""

    def call(args: Sequence[Any]) -> Sequence[Any]:
        return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def aot(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    inference: Callable[[fx.GraphModule, Sequence[Any]], Any],
    training: Callable[[fx.GraphModule, Sequence[Any]], Any],
) -> Callable[..., Any]:
    """Trace a graph into functional ATen operations, and return what runs it.

    Args:
        graph_module: as torch.compile hands it over.
        example_inputs: likewise.
        inference: makes a boxed function of a graph that no gradients flow through.
        training: likewise of one that they do, forward or backward.
    """
    from torch._dynamo.backends.common import aot_autograd

    made = aot_autograd(fw_compiler=training, bw_compiler=training, inference_compiler=inference)
    return made(graph_module, example_inputs)


def on_real_tensors() -> AbstractContextManager[Any]:
    """Return what lets operations compute while torch.compile traces."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def static_inputs() -> list[int]:
    """Return the numbers of the arguments that torch.compile, which is tracing, knows to be the same tensors in every call.

    Those that the graph changes are not among them.
    """
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    meta = context.fw_metadata if context is not None else None
    if meta is None:
        return []
    return [
        k for k in meta.static_input_indices if not (meta.input_info[k].mutates_data or meta.input_info[k].mutates_metadata)
    ]
