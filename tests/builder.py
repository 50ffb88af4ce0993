"""Programs built node by node, for tests of passes and analyses. conftest.py files make a fixture of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from graphwright.ir.program import Dimension, Program, dimension_symbol

aten = torch.ops.aten

SAMPLE = {"batch": 11, "tokens": 13}
"""Sizes that the named dimensions have while shapes are inferred: unlike any size of a model."""


class Positional:
    """A signature of tensors by position."""

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        return list(args)

    def unflatten(self, results: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(results)


class Builder:
    """Builds a program: inputs first, then weights and calls, then `program`."""

    def __init__(self) -> None:
        environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=environment, static_shapes=False)
        self.built = Program(fx.Graph(), {}, Positional())
        self.sizes: dict[str, Any] = {}
        for name, value in SAMPLE.items():
            source = ConstantSource(name)
            symbol = environment.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            self.sizes[name] = environment.create_symintnode(symbol, hint=value, source=source)
            self.built.dimensions[name] = Dimension(name)
            self.built.named[symbol] = dimension_symbol(name)

    def input(self, name: str, *shape: int | str, dtype: torch.dtype = torch.float32) -> fx.Node:
        """Add a tensor that calls pass; sizes are numbers, "batch" or "tokens"."""
        node = self.built.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty([self.sizes.get(n, n) for n in shape], dtype=dtype)
        return node

    def weight(self, name: str, value: torch.Tensor) -> fx.Node:
        """Add a weight."""
        return self.built.weight(name, value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call."""
        return self.built.call(target, *args, **kwargs)

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        """Add the size of a dimension."""
        return self.call(aten.sym_size.int, node, dim)

    def program(self, *results: Any) -> Program:
        """Return the program with these results."""
        self.built.graph.output(tuple(results))
        return self.built
