"""From torch.export's program to a plain graph: weights are read by name, regions are inlined, assertions are gone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphwright.ir.diagnostics import user_line
from graphwright.ir.errors import CaptureError

from .exporting import PREFIX, place_of
from .functional import Overwritten, functional_twin

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def import_graph(
    program: ExportedProgram, names: Sequence[str], overwritten: Overwritten
) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Return the graph and its weights.

    Args:
        program: what torch.export made.
        names: the path of each user tensor, in flat order.
        overwritten: what the in-place operations that are left in it overwrite.

    Raises:
        CaptureError: the graph holds something that a plain graph cannot.
    """
    return _Importer(program, names, overwritten).run()


class _Importer:
    def __init__(self, program: ExportedProgram, names: Sequence[str], overwritten: Overwritten) -> None:
        self.program = program
        self.overwritten = overwritten
        self.graph = fx.Graph()
        self.names = names
        self.weights: dict[str, torch.Tensor] = {}
        self.readers: dict[str, fx.Node] = {}
        self.known: dict[Any, str] = {}
        self.lazy: dict[fx.Node, str] = {}

    def run(self) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
        graph = self.program.graph
        values: dict[fx.Node, Any] = {}
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        users = iter(self.names)
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                path = next(users)
                placeholder = self.graph.placeholder(_identifier(path))
                placeholder.meta["val"] = node.meta["val"]
                values[node] = placeholder
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                self.lazy[node] = self._weight(spec.target or node.name)
            else:
                raise CaptureError(f"{spec.target}: the model holds a {spec.kind.name}, which a graph cannot")
        results = self._inline(self.program.graph_module, values)
        self.graph.output(tuple(results))
        return self.graph, self.weights

    def _weight(self, target: str) -> str:
        held = self.program.state_dict.get(target)
        tensor = (held if held is not None else self.program.constants[target]).detach()
        if tensor.layout != torch.strided:
            raise CaptureError(f"{target.removeprefix(PREFIX)}: a {tensor.layout} weight; only dense ones can be captured")
        key: Any = target
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        name = self.known.setdefault(key, target.removeprefix(PREFIX))
        self.weights.setdefault(name, tensor)
        return name

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node in values:
            return values[node]
        name = self.lazy[node]
        if name not in self.readers:
            reader = self.graph.create_node("get_attr", name, (), {})
            reader.meta["val"] = node.meta["val"]
            self.readers[name] = reader
        values[node] = self.readers[name]
        return values[node]

    def _inline(self, module: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
        """Copy the calls of a module's graph; return what its output holds."""
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: self._value(n, values))
            if node.op == "get_attr":
                values[node] = getattr(module, str(node.target))
            elif node.op == "call_function":
                self._call(node, values)
        return ()

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        if node.target in ASSERTIONS:
            return
        if isinstance(node.target, HigherOrderOperator):
            values[node] = self._region(node, values)
            return
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and isinstance(values.get(first), list | tuple):
            values[node] = values[first][node.args[1]]
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, values))
        target: Any = functional_twin(node.target) if node in self.overwritten else node.target
        copied = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        copied.meta = place_of(node)
        copied.meta["val"] = node.meta.get("val")
        values[node] = copied
        if node in self.overwritten:
            values[node] = self._in_its_dtype(copied)
            for earlier in self.overwritten[node]:
                values[earlier] = values[node]

    def _in_its_dtype(self, node: fx.Node) -> fx.Node:
        """Cast the value of a functional twin to the dtype that the in-place operation keeps."""
        value = node.meta["val"]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with value.fake_mode, torch.no_grad():
            promoted = node.target(*args, **kwargs)  # type: ignore[operator]
        if promoted.dtype == value.dtype:
            return node
        cast = self.graph.call_function(torch.ops.prims.convert_element_type.default, (node, value.dtype))
        cast.meta = dict(node.meta)
        node.meta["val"] = promoted
        return cast

    def _region(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        name = node.target.name()  # type: ignore[union-attr]
        args: Any = fx.node.map_arg(node.args, lambda n: self._value(n, values))
        if name == "wrap_with_set_grad_enabled":
            inner, given = args[1], args[2:]
        elif name == "wrap_with_autocast":
            if args[2]:
                raise CaptureError(
                    f"the model switches autocast on at {user_line(node) or 'an unknown line'}: convert it to the dtype itself"
                )
            inner, given = args[4], args[5:]
        else:
            raise CaptureError(f"torch.{name} at {user_line(node) or 'an unknown line'} cannot be captured yet")
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        return self._inline(inner, dict(zip(placeholders, given, strict=True)))


def _identifier(path: str) -> str:
    name = re.sub(r"\W", "_", path)
    return name if name.isidentifier() else f"input_{name}"
