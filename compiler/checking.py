"""Comparing a program with its model at other sizes than the sample's, to learn which sizes it is good for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphwright.ir.containers import Constant, Leaf, Structure, open_container
from graphwright.ir.program import Dimension, Program
from graphwright.ir.signature import Range, evaluate, same_constant

from .exporting import is_cache, quiet
from .sampling import Call, Names, resized

FARTHEST = 1024
"""Sizes above are not tried, for that could take long."""

MOST_ENDS = 6
"""How many sizes at which an assumption ends are tried, for each dimension and direction."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, relative to the largest value, by dtype: the program may take other kernels than the model."""

Sizes = Mapping[str, int]


@dataclass
class Findings:
    """What was learned about the dimensions of a program.

    Args:
        ranges: those that are known to be right: the least and the most that each may be.
        longer: a sample size to capture with anew, for dimensions whose size the code took for fixed.
        fixed: why, for dimensions that cannot vary.
    """

    ranges: dict[str, Range] = field(default_factory=dict)
    longer: dict[str, int] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)


class Checker:
    """Runs a program and its model side by side.

    Args:
        program: the program.
        model: the model it was captured from, in evaluation mode.
        call: how the model is called.
        tensors: the sample.
        guards: what torch assumed of sizes when it traced, as Python conditions.
    """

    def __init__(
        self, program: Program, model: torch.nn.Module, call: Call, tensors: Sequence[torch.Tensor], guards: Sequence[str]
    ) -> None:
        self.program = program
        self.model = model
        self.call = call
        self.tensors = tensors
        self.names: Names = tuple(
            {dim: str(size) for dim, size in enumerate(spec.shape) if isinstance(size, str)}
            for spec in program.signature.tensors
        )
        self.sample = {
            name: tensors[index].shape[dim]
            for index, dims in enumerate(self.names)
            for dim, name in dims.items()
            if name in program.dimensions
        }
        self.guards = guard_functions(guards)
        self.module = program.module()
        self.reason = ""

    def examine(self, tried: Collection[str] = ()) -> Findings:
        """Return what is known of the dimensions.

        Args:
            tried: dimensions for which a longer sample has been tried.
        """
        findings = Findings({name: Range(2, d.high) for name, d in self.program.dimensions.items()})
        for name in self.sample:
            self._limit(name, findings, tried)
        free = [name for name in self.sample if name not in findings.fixed and name not in findings.longer]
        if not free:
            return findings
        other = {name: self._other(name, findings.ranges[name]) for name in free}
        if self.trial(other) == "differs":
            wrong = [name for name in free if self.trial({name: other[name]}) == "differs"] or free
            for name in wrong:
                self._give_up(name, findings, tried, f"at {other[name]} {self.reason}", 2 * other[name] + 1)
            return findings
        self._low_end(free, findings)
        return findings

    def _low_end(self, free: list[str], findings: Findings) -> None:
        """Find out whether sizes of 1, and empty batches, are right: torch itself assumes at least 2."""
        at_two = [name for name in free if findings.ranges[name].low == 2]
        if not at_two:
            return
        together = self.trial(dict.fromkeys(at_two, 1)) == "same"
        for name in at_two:
            if together or self.trial({name: 1}) == "same":
                findings.ranges[name] = Range(1, findings.ranges[name].high)
        for name in at_two:
            # Models that reshape with -1 refuse an empty batch where the program, which knows its sizes, need not.
            if (
                "batch" in name
                and findings.ranges[name].low == 1
                and self.trial({name: 0}) != "differs"
                and self._runs({name: 0})
            ):
                findings.ranges[name] = Range(0, findings.ranges[name].high)

    def _limit(self, name: str, findings: Findings, tried: Collection[str]) -> None:
        """Where the code's assumptions end above and below the sample, find out whether the program does too."""
        size, high = self.sample[name], findings.ranges[name].high
        for above in self._ends(name, range(size + 1, min(high or FARTHEST, FARTHEST) + 1)):
            verdict = self.trial({name: above})
            if verdict == "differs" and name not in tried:
                findings.longer[name] = 2 * above + 1
                return
            if verdict != "same":
                findings.ranges[name] = Range(findings.ranges[name].low, above - 1)
                break
        for below in self._ends(name, range(size - 1, 1, -1)):
            if self.trial({name: below}) != "same":
                findings.ranges[name] = Range(below + 1, findings.ranges[name].high)
                break
        found = findings.ranges[name]
        if found.low == found.high:
            findings.fixed[name] = f"the model's code takes only {size}"

    def _give_up(self, name: str, findings: Findings, tried: Collection[str], why: str, longer: int) -> None:
        high = findings.ranges[name].high
        if name not in tried and longer <= (high or FARTHEST):
            findings.longer[name] = longer
        else:
            findings.fixed[name] = why

    def _ends(self, name: str, sizes: range) -> list[int]:
        """Return where, along `sizes`, assumptions of the code cease to hold: the first size for each of them."""
        waiting = list(self.guards)
        ends: list[int] = []
        for size in sizes:
            if not waiting or len(ends) == MOST_ENDS:
                break
            tried = {**self.sample, name: size}
            shapes = [self._shape(index, tried) for index in range(len(self.tensors))]
            broken = [guard for guard in waiting if not guard(shapes)]
            if broken:
                ends.append(size)
                waiting = [guard for guard in waiting if guard not in broken]
        return ends

    def _shape(self, index: int, sizes: Sizes) -> list[int]:
        dims = self.names[index]
        return [_size(dims[d], sizes) if d in dims else n for d, n in enumerate(self.tensors[index].shape)]

    def _other(self, name: str, allowed: Range) -> int:
        size = self.sample[name]
        other = size + (1 if "batch" in name else 4)
        if allowed.high is not None and other > allowed.high:
            other = max(size - 1, allowed.low)
        return other

    def _resized(self, changed: Sizes) -> list[torch.Tensor]:
        sizes = {**self.sample, **changed}
        shapes = tuple({dim: f"{index}.{dim}" for dim in dims} for index, dims in enumerate(self.names))
        wanted = {f"{i}.{d}": self._shape(i, sizes)[d] for i, dims in enumerate(self.names) for d in dims}
        return resized(self.tensors, shapes, wanted)

    def _runs(self, changed: Sizes) -> bool:
        with quiet(), torch.no_grad():
            try:
                self.module(*self._resized(changed))
            except Exception:  # noqa: BLE001 - whatever an operation raises for such sizes
                return False
        return True

    def trial(self, changed: Sizes) -> str:
        """Compare at the sample's sizes but for some; return "same", "differs" or "refused": the model itself raised."""
        tensors = self._resized(changed)
        leaves: list[Any] = []
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                expected = self.call(self.model, [t.clone() for t in tensors])
            except Exception as error:  # noqa: BLE001 - models may raise anything
                self.reason = f"the model raises {type(error).__name__}: {str(error)[:200]}"
                return "refused"
            torch.manual_seed(0)
            try:
                found = self.module(*tensors)
            except Exception as error:  # noqa: BLE001 - operations may raise anything
                self.reason = f"the program raises {type(error).__name__}: {str(error)[:200]}"
                return "differs"
        if not _open(self.program.signature.results, expected, leaves):
            self.reason = "the model returns something else"
            return "differs"
        worst = max((difference(e, f) for e, f in zip(leaves, found, strict=True)), default=0.0)
        self.reason = f"the program is off by {worst:.1e} times what is allowed"
        return "same" if worst <= 1 else "differs"


def _open(structure: Structure, value: Any, leaves: list[Any]) -> bool:
    """Append the leaves of a value in flat order; return whether it has the structure."""
    if isinstance(structure, Leaf):
        leaves.append(value)
        return True
    if isinstance(structure, Constant):
        return is_cache(value) if structure.value is None and value is not None else same_constant(structure.value, value)
    opened = open_container(value)
    if opened is None or (opened.kind, opened.name, opened.keys) != (structure.kind, structure.name, structure.keys):
        return False
    return len(opened.children) == len(structure.children) and all(
        _open(child, inside, leaves) for child, inside in zip(structure.children, opened.children, strict=True)
    )


def _size(text: str, sizes: Sizes) -> int:
    return sizes[text] if text in sizes else evaluate(text, sizes)


def difference(expected: Any, found: Any) -> float:
    """Return the largest difference of two tensors, in units of what is allowed; infinite if they cannot be compared."""
    if not isinstance(found, torch.Tensor):
        return 0.0 if expected == found else math.inf
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    tolerance = TOLERANCE.get(expected.dtype)
    if tolerance is None:
        return 0.0 if torch.equal(expected, found) else math.inf
    same = (expected == found) | (expected.isnan() & found.isnan())
    finite = expected.isfinite()
    if not bool((same | (finite & found.isfinite())).all()):
        return math.inf
    gap = torch.where(same, 0, expected - found).abs().max()
    scale = torch.where(finite, expected, 0).abs().max()
    return float(gap) / (tolerance * max(float(scale), 1e-30)) if float(gap) else 0.0


Guard = Callable[[Sequence[Sequence[int]]], bool]
"""From the shapes of the inputs to whether one of torch's assumptions holds."""


def guard_functions(guards: Sequence[str]) -> list[Guard]:
    """Return torch's assumptions about sizes as functions."""
    texts = [re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]", r"n[\1][\2]", guard) for guard in guards]
    return [_guard(text) for text in texts if "L[" not in text and "n[" in text]


def _guard(text: str) -> Guard:
    code = compile(text, "<guard>", "eval")
    names = {"math": math, "torch": torch, "max": max, "min": min}

    def holds(shapes: Sequence[Sequence[int]]) -> bool:
        try:
            # The text is torch's own, made in this process from the shapes it saw.
            return bool(eval(code, names, {"n": shapes}))
        except (NameError, ZeroDivisionError):
            return True

    return holds


def apply_ranges(program: Program, ranges: Mapping[str, Range]) -> None:
    """Give the dimensions of a program the ranges that were found, and note those that end where the model's do not."""
    for name, found in ranges.items():
        old = program.dimensions[name]
        program.dimensions[name] = Dimension(name, found.low, found.high)
        if found.high is not None and found.high != old.high:
            program.notes.append(f"{name} may be at most {found.high}: the model's code takes longer inputs another way")
        if found.low > 2:
            program.notes.append(f"{name} must be at least {found.low}")
    dimensions = {name: Range(d.low, d.high) for name, d in program.dimensions.items()}
    program.signature = replace(program.signature, dimensions=dimensions)
