"""What a compiled program is made of: buffers, steps over them, and the kernels that the steps launch.

Everything here is plain data, so that it can be written to a file and read back. Sizes are numbers or arithmetic texts over
the program's dimensions, such as "batch*tokens*384"; they are evaluated when a call brings the dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Size = int | str
"""A number, or an expression of the dimensions with + - * // % max() min() and parentheses."""


@dataclass(frozen=True)
class Buffer:
    """A piece of memory.

    Args:
        name: unique in the schedule.
        dtype: such as "float32".
        shape: sizes of the dimensions.
        strides: in elements.
        kind: "input" is given by the call, "state" too and written in place, "weight" is constant, "temporary" lies in the
            arena, "output" is made by the call.
        source: for a weight its name among the program's weights, for an input its number; else "".
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    kind: Literal["input", "state", "weight", "temporary", "output"]
    source: str = ""


@dataclass(frozen=True)
class View:
    """A buffer looked at with another shape.

    Args:
        buffer: its name.
        shape: sizes of the dimensions.
        strides: in elements.
        offset: of the first element, in elements.
    """

    buffer: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = 0


@dataclass(frozen=True)
class KernelStep:
    """The launch of a generated kernel.

    Args:
        name: the step's name, for people.
        kernel: name of the kernel in the schedule.
        grid: number of programs in up to three directions.
        arguments: in the kernel's order: a `View` (its first element's address is passed), a size, or a float.
        constants: compile-time constants by name.
        reads: names of the buffers it reads.
        writes: names of the buffers it writes.
        provenance: the nodes and lines of the user's model that it computes.
    """

    name: str
    kernel: str
    grid: tuple[Size, ...]
    arguments: tuple[View | Size | float, ...]
    constants: Mapping[str, int]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    provenance: str = ""


@dataclass(frozen=True)
class MatmulStep:
    """out[M, N] = x[M, K] weight[N, K]^T.

    Args:
        name: the step's name, for people.
        x: [M, K], its rows contiguous.
        weight: name of the weight's buffer, [N, K].
        out: [M, N], its rows contiguous.
        accumulate: add to what `out` holds.
        provenance: the nodes and lines of the user's model that it computes.
    """

    name: str
    x: View
    weight: str
    out: View
    accumulate: bool = False
    provenance: str = ""


@dataclass(frozen=True)
class CallStep:
    """A call of an operation of PyTorch.

    Args:
        name: the step's name, for people.
        operation: such as "aten::convolution.default".
        arguments: positional: views stand for tensors, `Symbolic` for sizes; lists of these; plain values.
        keywords: named.
        outs: buffers of the results, in order; "" for a result that nothing uses.
        into: whether the operation writes into the buffer (`out=`) instead of returning a tensor that is copied.
        provenance: the nodes and lines of the user's model that it computes.
    """

    name: str
    operation: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    outs: tuple[str, ...]
    into: bool = False
    provenance: str = ""


@dataclass(frozen=True)
class Symbolic:
    """A size among the arguments of a call."""

    size: Size


Step = KernelStep | MatmulStep | CallStep


@dataclass(frozen=True)
class Schedule:
    """A lowered program.

    Args:
        dimensions: name -> (low, high); high is None for no limit.
        inputs: buffers of the call's tensors, in flat order, states included.
        outputs: the results in flat order: views of buffers, or plain values.
        buffers: all buffers by name.
        steps: in order.
        kernels: name -> Triton source text of the module that defines it.
        device: the device type it was made for.
    """

    dimensions: Mapping[str, tuple[int, int | None]]
    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    buffers: Mapping[str, Buffer]
    steps: tuple[Step, ...]
    kernels: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
