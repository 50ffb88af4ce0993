"""What was done to a program: one record per pass that ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decision:
    """One thing that a pass decided to do.

    Args:
        where: the name of the node it is about.
        what: what is to be done, a few words.
        why: the reason, a few words.
        detail: what `apply` needs to do it: plain values (numbers, text, lists and dicts of these).
    """

    where: str
    what: str
    why: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """A place, or a whole program, that a pass looked at and left alone.

    Args:
        where: the name of the node it is about; "" for the whole program.
        reason: why.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a pass means to do: it can be printed, edited, saved and applied later. An empty plan is the identity.

    Args:
        pass_name: the name of the pass.
        decisions: in the order in which they are applied.
        refusals: what was left alone, and why.
    """

    pass_name: str
    decisions: tuple[Decision, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class CostLine:
    """What equal operations of a program cost; sizes are texts of the program's dimensions (`ir/size_texts.py`).

    Operations that are computed in one kernel - a chain of additions, norms and casts - are one line, called by its last one.

    Args:
        kind: "product" (of matrices, convolutions), "attention" or "rest".
        operation: the operation, as it is printed.
        count: how many there are.
        flops: floating point operations of one.
        weight_bytes: bytes of weights that it reads.
        state_bytes: bytes that it reads of, or writes to, what is kept from call to call.
        value_bytes: bytes of other values that it reads and writes.
    """

    kind: str
    operation: str
    count: int
    flops: str
    weight_bytes: str
    state_bytes: str
    value_bytes: str


@dataclass(frozen=True)
class ProgramCost:
    """What a program costs.

    Args:
        lines: its operations, equal ones together.
        weight_bytes: bytes of its weights.
        state_bytes: bytes of what is kept from call to call, such as caches, as a text of the dimensions.
    """

    lines: tuple[CostLine, ...]
    weight_bytes: int
    state_bytes: str


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran.

    Args:
        pass_name: the name of the pass.
        options: its options as text, such as "token-merge:ratio=0.5".
        plan: what it decided.
        nodes_before: number of calls in the graph before.
        nodes_after: number of calls after.
        time_us: how long planning, applying and verifying took.
        text: the program after it, printed; "" if nothing changed.
        cost_before: what the program cost before; None if nothing changed, and for a capture.
        cost_after: what it costs after; None if nothing changed.
    """

    pass_name: str
    options: str
    plan: Plan
    nodes_before: int
    nodes_after: int
    time_us: int
    text: str = ""
    cost_before: ProgramCost | None = None
    cost_after: ProgramCost | None = None
