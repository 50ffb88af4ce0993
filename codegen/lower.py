"""Lowering: from a program to a schedule of steps over buffers, with the kernels' sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphwright.ir.errors import LoweringError
from graphwright.ir.program import Program
from graphwright.runtime.schedule import Buffer, KernelStep, Schedule, Step, Symbolic, View

from .external import accepts as external_accepts
from .external import buffer_shape, count_results, step_of, view_of
from .fusion import Fusion, Unit, is_item
from .indexing import Ranges, contiguous_strides, flat, size_text, unflatten
from .kernel import LoopKernel, Store, write_kernel
from .loops import GraphReader, NeedsExternal, NeedsStore, Stored, strided
from .provenance import provenance_of
from .sources import KernelSources
from .states import states_in_place
from .step_table import step_maker
from .steps import scratch_buffer
from .values import COLUMN

MOST_ROUNDS = 1000
"""More changes of mind about what to store than this mean that something is wrong."""


def lower(program: Program, *, device: str = "cpu") -> Schedule:
    """Return the schedule of a program.

    Args:
        program: a verified program.
        device: the device type it will run on.

    Raises:
        LoweringError: an operation can neither be generated nor called, or a size depends on values.
    """
    _refuse_sizes_from_values(program)
    external: set[fx.Node] = set()
    forced: set[fx.Node] = set()
    for _ in range(MOST_ROUNDS):
        try:
            return _Lowering(program, external, forced, device).run()
        except NeedsExternal as found:
            external.add(found.node)
        except NeedsStore as found:
            if found.node in forced:
                external.add(found.node)
            forced.add(found.node)
    raise LoweringError("no set of stored values was found that every kernel can be made from")


def _refuse_sizes_from_values(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and free_unbacked_symbols(node.meta.get("val")):
            raise LoweringError(
                f"{provenance_of([node])}: {node.target} makes a number of a tensor's values, or a result whose size depends "
                "on them, and sizes and numbers must be known before the steps run. What to do: use torch.where or a mask, "
                "keep the number in a tensor, or compute it outside and pass it as an argument."
            )


class _Lowering:
    def __init__(self, program: Program, external: set[fx.Node], forced: set[fx.Node], device: str) -> None:
        self.program = program
        self.device = device
        self.fusion = Fusion(program, external)
        self.forced = forced
        self.stored: dict[fx.Node, Stored] = {}
        self.buffers: dict[str, Buffer] = {}
        self.sources = KernelSources()
        self.result_bases: set[fx.Node] = set()
        self.in_place = states_in_place(program)

    def run(self) -> Schedule:
        """Lower the program."""
        self._place_given()
        wanted = self._wanted()
        units = self.fusion.units(wanted, self.in_place.after)
        for unit in units:
            self._place_results(unit)
        steps: list[Step] = []
        for unit in units:
            steps.extend(self._loop_steps(unit) if unit.is_loop else self._external_steps(unit.nodes[0]))
        dimensions = {name: (d.low, d.high) for name, d in self.program.dimensions.items()}
        return Schedule(
            dimensions,
            tuple(node.name for node in self.program.inputs),
            tuple(self._result(value) for value in self._returned()),
            self.buffers,
            tuple(steps),
            self.sources.texts(),
            self.device,
        )

    def _returned(self) -> list[Any]:
        """Return the results that a call gets; states are changed in place."""
        states = set(self.program.states.values())
        return [value for k, value in enumerate(self.program.results) if k not in states]

    # -- what is stored where

    def _place_given(self) -> None:
        for node in self.program.graph.nodes:
            kind = self.fusion.kind(node)
            if kind == "input":
                given = "state" if node.name in self.program.states else "input"
                self._place(node, node.name, contiguous_strides(self.program.shape(node)), given)
            elif kind == "weight":
                weight = self.program.weights[node.target]
                self._place(node, node.target, tuple(weight.stride()), "weight", node.target)

    def _place(self, node: fx.Node, name: str, strides: Sequence[Any], kind: Any, source: str = "", shape: Any = None) -> None:
        dtype = node.meta["val"].dtype
        own = self.program.shape(node)
        self.stored[node] = Stored(name, tuple(sympy.sympify(s) for s in strides), sympy.Integer(0), dtype)
        if name in self.buffers:
            return
        allocated = own if shape is None else shape
        self._add_buffer(name, dtype, allocated, strides if shape is None else contiguous_strides(shape), kind, source)

    def _add_buffer(
        self, name: str, dtype: torch.dtype, shape: Sequence[Any], strides: Sequence[Any], kind: Any, source: str = ""
    ) -> None:
        self.buffers[name] = Buffer(
            name,
            str(dtype).removeprefix("torch."),
            tuple(size_text(n) for n in shape),
            tuple(size_text(s) for s in strides),
            kind,
            source,
        )

    def _wanted(self) -> list[fx.Node]:
        """Return the nodes that loop kernels store, in the graph's order."""
        fusion = self.fusion
        wanted: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            if fusion.kind(node) == "loop" and (node in self.forced or fusion.worth_storing(node)):
                wanted.add(node)
            elif fusion.kind(node) == "external" and not is_item(node):
                for arg in fusion.tensor_args(node):
                    self._want(arg, wanted, node)
        for result in self._returned():
            if isinstance(result, fx.Node) and fusion.kind(result) != "size":
                self._want(result, wanted, None)
        wanted |= {n for n in self.forced if fusion.kind(n) in ("loop", "view", "generator")}
        return [node for node in self.program.graph.nodes if node in wanted]

    def _want(self, node: fx.Node, wanted: set[fx.Node], reader: fx.Node | None) -> None:
        """See to it that a tensor lies somewhere where `reader`, or the caller, can read it."""
        fusion = self.fusion
        base = fusion.base(node)
        kind = fusion.kind(base)
        if base is not node:
            trial = self.stored.get(base)
            if trial is None:
                trial = self._planned(base)
            where = None if kind == "generator" else strided(self.program, node, base, trial)
            if where is None or (reader is not None and not _accepts(reader, node, where, self.program.shape(node))):
                base, kind = node, "loop"
        elif kind in ("input", "weight", "external") and reader is not None:
            trial = self.stored.get(base) or self._planned(base)
            if not _accepts(reader, node, trial, self.program.shape(node)):
                raise LoweringError(f"{reader.name}: {node.name} does not lie as {reader.target} reads it")
        if kind in ("loop", "generator"):
            wanted.add(base)
        if reader is None and kind not in ("input", "weight"):
            self.result_bases.add(base)

    def _planned(self, node: fx.Node) -> Stored:
        """Return where a node will lie that is not placed yet."""
        return Stored(node.name, self._strides(node), sympy.Integer(0), node.meta["val"].dtype)

    def _strides(self, node: fx.Node) -> tuple[Any, ...]:
        maker = step_maker(node)
        return (maker.strides if maker else contiguous_strides)(self.program.shape(node))

    def _place_results(self, unit: Unit) -> None:
        for node in unit.nodes:
            if is_item(node) or not isinstance(node.meta["val"], torch.Tensor):
                continue
            self._place_result(node)
        if not unit.is_loop and not isinstance(unit.nodes[0].meta["val"], torch.Tensor):
            for user in unit.nodes[0].users:
                if user.users:
                    self._place_result(user)

    def _place_result(self, node: fx.Node) -> None:
        if node in self.in_place.states:
            self.stored[node] = self.where(self.in_place.states[node])
            return
        kind = "output" if node in self.result_bases else "temporary"
        shape = self.program.shape(node)
        allocated = buffer_shape(node, shape)
        self._place(node, node.name, self._strides(node), kind, shape=None if allocated == shape else allocated)

    def where(self, node: fx.Node) -> Stored:
        """Return where a tensor lies, views included."""
        if node in self.stored:
            return self.stored[node]
        base = self.fusion.base(node)
        found = strided(self.program, node, base, self.stored[base])
        if found is None:
            raise LoweringError(f"{node.name}: its elements do not lie at even distances")
        self.stored[node] = found
        return found

    def _result(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if self.fusion.kind(value) == "size":
            size = size_text(self.program.size(value))
            return size if isinstance(size, int) else Symbolic(size)
        return view_of(self.where(value), self.program.shape(value))

    # -- steps

    def _external_steps(self, node: fx.Node) -> Sequence[Step]:
        if is_item(node):
            return ()
        maker = step_maker(node)
        if maker is not None:
            for name, (dtype, shape) in maker.scratch(self.program, node).items():
                self._add_buffer(scratch_buffer(node, name), dtype, shape, contiguous_strides(shape), "temporary")
            return maker.make(self.program, node, self.where, self.sources, self.device)
        if isinstance(node.meta["val"], torch.Tensor):
            outs: dict[Any, Stored] = {0: self.stored[node]}
        else:
            outs = {user.args[1]: self.stored[user] for user in node.users if is_item(user) and user in self.stored}
        if not outs and count_results(node) > 0:
            return ()
        return (step_of(self.program, node, self.where, outs, provenance_of([node])),)

    def _loop_steps(self, unit: Unit) -> Sequence[Step]:
        if all(self.fusion.numel(node) == 0 for node in unit.nodes):
            return ()
        kernel = self._kernel(unit)
        name = self.sources.add("_".join(_short(n) for n in unit.nodes), kernel.body, provenance_of(unit.nodes))
        arguments: list[Any] = []
        for buffer in kernel.buffers:
            placed = self.buffers[buffer]
            arguments.append(View(buffer, placed.shape, placed.strides))
        arguments.extend(size_text(size) for size in kernel.sizes.values())
        grid = kernel.grid if isinstance(kernel.grid, str) else size_text(kernel.grid)
        step = KernelStep(
            unit.nodes[-1].name,
            name,
            (grid,),
            tuple(arguments),
            kernel.constants,
            kernel.reads,
            kernel.writes,
            provenance_of(unit.nodes),
        )
        return (step,)

    def _kernel(self, unit: Unit) -> LoopKernel:
        fusion, program = self.fusion, self.program
        lead = next((n for n in unit.nodes if not fusion.rows(n).reduced), unit.nodes[0])
        rows = fusion.rows(lead)
        columns = int(rows.columns) if rows.columns.is_Integer else rows.columns
        shape = self._outer_shape(lead)
        symbols = [sympy.Symbol(f"i{k}", integer=True, nonnegative=True) for k in range(len(shape))]
        ranges = Ranges({**dict(zip(symbols, shape, strict=True)), COLUMN: sympy.sympify(columns)})
        inside = frozenset(unit.nodes)
        reader = GraphReader(program, self.stored, inside, ranges, sympy.sympify(columns))
        outer = tuple(sympy.Integer(0) if n == 1 else s for s, n in zip(symbols, shape, strict=True))
        stores = []
        for node in unit.nodes:
            index = self._index(node, lead, outer, shape, columns, ranges)
            stored = self.stored[node]
            offset = sympy.expand(sum((i * s for i, s in zip(index, stored.strides, strict=True)), sympy.Integer(0)))
            value, varies = reader.value(node, index), not fusion.rows(node).reduced
            if varies and not reader.values.depends(offset):
                # The only element of a tensor: its place is written as that of a column, as any other's.
                offset += COLUMN
            stores.append(Store(stored.buffer, offset, value, stored.dtype, varies))
        return write_kernel(
            reader.values, stores, list(zip(symbols, shape, strict=True)), columns, on_cuda=self.device == "cuda"
        )

    def _outer_shape(self, lead: fx.Node) -> tuple[Any, ...]:
        """Return the sizes of the rows' dimensions: those of the lead without its columns."""
        shape, rows = self.program.shape(lead), self.fusion.rows(lead)
        if rows.reduced:
            return tuple(n for n in shape if n != 1)
        count, left = 0, sympy.Integer(1)
        for size in reversed(shape):
            if left == rows.columns:
                break
            left = sympy.expand(left * size)
            count += 1
        return shape[: len(shape) - count]

    def _index(
        self, node: fx.Node, lead: fx.Node, outer: tuple[Any, ...], shape: tuple[Any, ...], columns: Any, ranges: Ranges
    ) -> tuple[Any, ...]:
        own = self.program.shape(node)
        if self.fusion.rows(node).reduced:
            return unflatten(flat(outer, shape), own, ranges)
        if own == self.program.shape(lead) and len(own) == len(shape) + 1:
            return (*outer, COLUMN if own[-1] != 1 else sympy.Integer(0))
        return unflatten(flat((*outer, COLUMN), (*shape, columns)), own, ranges)


def _accepts(reader: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    maker = step_maker(reader)
    return (maker.accepts if maker else external_accepts)(reader, arg, stored, shape)


def _short(node: fx.Node) -> str:
    name = getattr(node.target, "_opname", None) or str(node.target).split(".")[-2]
    return str(name).strip("_")
