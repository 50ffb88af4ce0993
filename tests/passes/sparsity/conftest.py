"""What tests of sparse attention have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphwright.codegen.lower import lower
from graphwright.ir.containers import Leaf
from graphwright.ir.program import Program
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.executable import Executable


@pytest.fixture(scope="session")
def executable_of() -> Callable[[Program], Executable]:
    """Return a function that makes what runs a program built by hand, called by position; it returns the first result."""

    def make(program: Program) -> Executable:
        specs = []
        for node in program.inputs:
            shape = tuple(n if isinstance(n, int) else str(n) for n in program.shape(node))
            specs.append(TensorSpec(node.name, node.meta["val"].dtype, "cpu", shape))
        names = [spec.name for spec in specs]
        signature = Signature(
            tuple(Parameter(name, "positional_or_keyword") for name in names),
            {name: Leaf(at) for at, name in enumerate(names)},
            tuple(specs),
            {name: Range(0, None) for name in program.dimensions},
            Leaf(0),
        )
        return Executable(lower(program), program.weights, signature)

    return make
