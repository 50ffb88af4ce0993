"""The contract of a pass."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graphwright.ir.program import Program
from graphwright.ir.records import Decision, Plan, Refusal

__all__ = ["Context", "Decision", "Fidelity", "Pass", "Plan", "Refusal", "Stage"]


class Fidelity(enum.Enum):
    """What a pass does to the values that a program computes."""

    EXACT = "exact"
    """The same values."""

    CLOSE = "close"
    """The same mathematics, rounded elsewhere."""

    LOSSY = "lossy"
    """An approximation."""


class Stage(enum.Enum):
    """Which program a pass rewrites."""

    PROGRAM = "program"
    """The program of a model's forward."""

    DECODE = "decode"
    """The program with caches that is derived of it to generate; such a pass refuses a program without states."""


@dataclass(frozen=True)
class Context:
    """What a pass may use beside the program.

    Args:
        calibration: sample calls of the model, each (args, kwargs); empty if the user gave none.
        target: the device type that the program will run on, such as "cpu".
    """

    calibration: tuple[Any, ...] = field(default=())
    target: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite in two steps: `plan` decides, `apply` does exactly what the plan says.

    A pass is a frozen dataclass; its fields are its options, in recipes and on the command line.

    Class attributes:
        name: how it is asked for.
        fidelity: what it does to the values.
        source: the paper or the mathematics it stands on; "" if it is plain.
        stage: which program it rewrites.
    """

    name: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    source: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.PROGRAM

    @abstractmethod
    def plan(self, program: Program, context: Context) -> Plan:
        """Decide what to do. The program is not changed.

        Places that look alike but do not fit are among the plan's refusals, each with the reason.
        """

    @abstractmethod
    def apply(self, program: Program, plan: Plan) -> Program:
        """Return a program with the plan carried out; the given one is not changed.

        Raises:
            PlanError: the plan does not fit the program.
        """
