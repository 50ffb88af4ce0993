"""Running a program with its operations replaced by what ONNX has, so that PyTorch's exporter can trace it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.traceback import preserve_node_meta, set_current_meta

from graphwright.ir import dialect
from graphwright.ir.diagnostics import at_node
from graphwright.ir.errors import ExportError
from graphwright.ir.ops.definition import NAMESPACE
from graphwright.ir.program import Program, calls

from .attention import AttentionWriter, Past
from .calls import onnx_call
from .ops import LOWERINGS, repeats_its_half
from .windows import find_windows

aten = torch.ops.aten
_SWAP = [0, 2, 1, 3]
_WRITTEN: tuple[Any, ...] = (dialect.attention, dialect.kv_static_attention, *LOWERINGS)
_WRITTEN_BY_TORCH = frozenset({"aten", "prims", "torchvision"})


class Writer(torch.nn.Module):
    """The program as a module of ATen operations and calls of ONNX operators.

    Args:
        program: after all passes.
    """

    WEIGHTS = "graph_module"
    """What stands before every weight's name."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.graph_module = program.module()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return those of the program's results that are tensors."""
        self._relate(tensors)
        with preserve_node_meta():
            results = _Run(self.graph_module, self.program).run(*tensors)
        return tuple(result for result in results if isinstance(result, torch.Tensor))

    def _relate(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let the tracer know what sizes that are formulas have to do with the others."""
        sizes: dict[str, Any] = {}
        formulas = []
        for spec, tensor in zip(self.program.signature.tensors, tensors, strict=True):
            for size, value in zip(spec.shape, tensor.shape, strict=True):
                if isinstance(size, str) and size in self.program.dimensions:
                    sizes.setdefault(size, value)
                elif isinstance(size, str):
                    formulas.append((size, value))
        check: Any = torch._check
        for text, value in formulas:
            formula = sympy.sympify(text, locals={name: sympy.Symbol(name) for name in sizes})
            names = sorted(str(symbol) for symbol in formula.free_symbols)
            check(value == sympy.lambdify(names, formula)(*(sizes[name] for name in names)))


def refuse_unknown(program: Program) -> None:
    """Raise for the first operation, of the dialect or of another library than PyTorch, that has no form in ONNX.

    Raises:
        ExportError: there is one.
    """
    for node in calls(program.graph):
        target: Any = node.target
        namespace = getattr(target, "namespace", "aten")
        if namespace in _WRITTEN_BY_TORCH or target in _WRITTEN:
            continue
        message = f"{target.name()} has no form in ONNX. "
        if namespace == NAMESPACE:
            known = ", ".join(sorted(written.name() for written in _WRITTEN))
            message += f"Of the dialect these have one: {known}. Export the model without the pass that put it there."
        else:
            message += f"It is no operation of PyTorch's but of {namespace}: what to do is to keep the model from calling it."
        raise at_node(ExportError(message), program, node)


class _Run(fx.Interpreter):
    """Runs the program's nodes, and keeps the heads of attentions among the features where it can.

    A node that stands for [B, H, S, D] may have a second form, [B, S, H * D]: that of the projection it is a view of. Rotary
    embeddings and attention take and give this form, so that tensors need not be laid out anew between them.
    """

    def __init__(self, module: fx.GraphModule, program: Program) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.program = program
        self.attention = AttentionWriter()
        self.flat: dict[fx.Node, torch.Tensor] = {}
        self.joined: set[fx.Node] = set()
        self.windows = find_windows(program)

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node."""
        try:
            # What is traced here keeps the line of the user's model.
            with set_current_meta(n, "onnx"):
                return self._written(n) if n.op == "call_function" else super().run_node(n)
        except ExportError as error:
            raise at_node(error, self.program, n) from None

    def _written(self, n: fx.Node) -> Any:
        if n.target is dialect.attention:
            return self._by_head(n, self._attention(n))
        if n.target is dialect.kv_static_attention:
            return self._static_attention(n)
        if n.target is operator.getitem and getattr(n.args[0], "target", None) is dialect.kv_static_attention and not n.args[1]:
            return self._by_head(n, self.env[n.args[0]][0])  # type: ignore[index]
        if n.target is dialect.rotary and (flat := self._rotary(n)) is not None:
            return self._by_head(n, flat)
        if n.target is dialect.rms_norm and (flat := self._norm(n)) is not None:
            return self._by_head(n, flat)
        if (flat := self._merged_again(n)) is not None:
            return flat
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return LOWERINGS.get(n.target, n.target)(*args, **kwargs)  # type: ignore[operator]

    def _by_head(self, node: fx.Node, flat: torch.Tensor) -> torch.Tensor:
        """Return [B, H, S, D] of [B, S, H * D]; where nobody needs it, it is not exported."""
        self.flat[node] = flat
        return flat.reshape(flat.shape[0], flat.shape[1], node.meta["val"].shape[1], -1).permute(_SWAP)

    def _flat(self, node: fx.Node) -> torch.Tensor | None:
        """Return [B, S, H * D] of a node that is [B, H, S, D], if it is at hand."""
        if node not in self.flat and node.target is aten.permute.default and list(node.args[1]) == _SWAP:  # type: ignore[arg-type]
            inner: Any = node.args[0]
            value = self.env[inner]
            source = inner.args[0] if inner.op == "call_function" and inner.target in _RESHAPES else None
            if source is not None and source.meta["val"].dim() == 3 and _same_rows(self.env[source], value):
                self.flat[node] = self.env[source]
            else:
                self.flat[node] = value.reshape(value.shape[0], value.shape[1], -1)
        return self.flat.get(node)

    def _made_flat(self, node: fx.Node) -> torch.Tensor:
        """Return [B, S, H * D] of a node that is [B, H, S, D], made if it is not at hand."""
        found, value = self._flat(node), self.env[node]
        return value.permute(_SWAP).reshape(value.shape[0], value.shape[2], -1) if found is None else found

    def _merged_again(self, node: fx.Node) -> torch.Tensor | None:
        """Return the flat form where a node is that of a node that has one: reshape(permute(x), [B, S, H * D])."""
        inner: Any = node.args[0] if node.args else None
        if node.target not in _RESHAPES or inner.target is not aten.permute.default or list(inner.args[1]) != _SWAP:
            return None
        flat = self.flat.get(inner.args[0])
        shape = node.meta["val"].shape
        if flat is None or len(shape) != 3:
            return None
        expected = self.program.shape(inner)
        return flat if self.program.shape(node) == (expected[0], expected[1], expected[2] * expected[3]) else None

    def _attention(self, node: fx.Node) -> torch.Tensor:
        args: Any
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        values, operands, sink = args[:3], args[3], args[4] if len(args) > 4 else None
        given: Any = node.args
        past = self._past(node)
        new = given[:3] if past is None else (given[0], *(cache.args[0][1] for cache in given[1:3]))
        flat = [self._made_flat(source) for source in new]
        heads = (int(values[0].shape[1]), int(values[1].shape[1]))
        sources = [*given[3], given[4] if len(given) > 4 else None]
        q, k, v = flat
        result, *present = self.attention.write(
            q, k, v, operands, sink, heads=heads, sources=sources, past=past, window=self.windows.get(node), **kwargs
        )
        for longer, value in zip(given[1:3], present, strict=False):
            self.env[longer] = value
        return result

    def _static_attention(self, node: fx.Node) -> tuple[torch.Tensor, ...]:
        args: Any
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        given: Any = node.args
        flat = [self._made_flat(source) for source in given[:3]]
        heads = (int(args[0].shape[1]), int(args[1].shape[1]))
        return self.attention.write_static([*flat, *args[3:7]], args[7], heads=heads, sources=given[7], **kwargs)

    def _past(self, node: fx.Node) -> Past | None:
        """Return keys and values of earlier calls where an attention reads them with new ones behind; None elsewhere."""
        given: Any = node.args
        if len(given) > 4 and given[4] is not None:
            return None  # A sink is written as a key behind all others, which must not be kept.
        caches = []
        for longer in given[1:3]:
            parts: Any = longer.args[0] if longer.target is aten.cat.default else ()
            if len(parts) != 2 or parts[0].op != "placeholder" or tuple(longer.args[1:]) != (2,) or longer in self.joined:
                return None
            caches.append(self.env[parts[0]])
        self.joined.update(given[1:3])
        return caches[0], caches[1]

    def _norm(self, node: fx.Node) -> torch.Tensor | None:
        """Return the norm of each head's features, [B, S, H * D]; None where there are no heads."""
        source: Any = node.args[0]
        flat = self._flat(source) if source.meta["val"].dim() == 4 else None
        if flat is None:
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        split = flat.reshape(flat.shape[0], flat.shape[1], source.meta["val"].shape[1], -1)
        return LOWERINGS[node.target](split, *args[1:], **kwargs).reshape(flat.shape[0], flat.shape[1], -1)

    def _rotary(self, node: fx.Node) -> torch.Tensor | None:
        """Return a rotary embedding as RotaryEmbedding, [B, S, H * D]; None where it has another form."""
        source: Any = node.args[0]
        tables: Any = node.args[1:3]
        value = source.meta["val"]
        whole = node.kwargs.get("rotated") in (None, value.shape[-1])
        if node.kwargs.get("interleaved") or not whole or value.dim() != 4 or not all(map(repeats_its_half, tables)):
            return None
        half = value.shape[-1] // 2
        if any(table.meta["val"].dim() != 4 or table.meta["val"].shape[1] != 1 for table in tables):
            return None
        if any(table.meta["val"].dtype != value.dtype for table in tables):
            return None
        flat = self._flat(source)
        if flat is None:
            return None
        batch, tokens = flat.shape[:2]
        caches = [self.env[table][:, 0, :, :half].expand(batch, tokens, half) for table in tables]
        attributes = {"num_heads": int(value.shape[1])}
        return onnx_call("RotaryEmbedding", [flat, *caches], attributes, value.dtype, flat.shape)


_RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default})


def _same_rows(source: torch.Tensor, split: torch.Tensor) -> bool:
    """Return whether [B, S, H, D] is [B, S, E] with only its features split."""
    return all(a is b or str(a) == str(b) for a, b in zip(source.shape[:2], split.shape[:2], strict=True))
