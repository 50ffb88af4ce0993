"""Run every pass of the registry on every family of models, and write what came of it into docs/models.md.

python tools/dev/pass_table.py              # all families, writes the page's table of passes
python tools/dev/pass_table.py llama bert   # these only, printed
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from model_table import PAGE, ROOT, load_families

import graphwright
from graphwright.ir.program import Program
from graphwright.passes.base import Context
from graphwright.passes.registry import PASSES
from graphwright.pipeline import DEFAULT_PASSES, run_passes

START, END = "<!-- passes: written by tools/dev/pass_table.py -->", "<!-- end of passes -->"

LONGEST = 100
"""Characters of a reason."""

NO_CACHES = "the model cannot be run token by token"

HEADER = """
## Passes

What each pass does to each family, as the tests try it ([tests/trials.py](../tests/trials.py)): how many places it changes, or
why it changes none. Passes of every compilation are counted over all their runs; where they find nothing, nothing is shown.
`tests/test_contract.py` runs the same and compares values.

| pass | tried as | applied: places (families) | refused: reason (families) |
| --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Cell:
    """A pass on a family.

    Args:
        places: decisions of its plan.
        reason: why there are none, as its first refusal says; "" if nothing was refused.
    """

    places: int
    reason: str = ""


def main() -> int:
    """Try what the command line names; write the page's table if it names nothing."""
    families = load_families()
    parser = argparse.ArgumentParser(description="Run every pass on every family of models.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"one of {', '.join(families)} (default: all)")
    names: list[str] = parser.parse_args().families
    if strange := [name for name in names if name not in families]:
        parser.error(f"there is no family {', '.join(strange)}; known: {', '.join(families)}")
    # Transformers says which optional packages would make it faster.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trials = load_trials()
    found = {}
    for name in names or families:
        print(name, file=sys.stderr, flush=True)
        found[name] = try_all(families[name], trials)
    text = to_text(found, trials.TEXTS)
    if names:
        print(text)
    else:
        PAGE.write_text(with_table(PAGE.read_text(), text))
    return 0


def load_trials() -> Any:
    """Return the module tests/trials.py."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        return importlib.import_module("trials")
    finally:
        sys.path.remove(str(ROOT / "tests"))


def try_all(family: Any, trials: Any) -> dict[str, Cell]:
    """Return what every pass of the registry does to a family, by the pass's name."""
    captured = graphwright.capture(family.build(), **family.sample(2, 7, 0))
    program = run_passes(captured)
    cells = {name: Cell(0) for name in DEFAULT_PASSES}
    for record in program.records:
        cells[record.pass_name] = Cell(cells[record.pass_name].places + len(record.plan.decisions))
    cached = trials.with_caches(program)
    context = trials.calibration(family)
    return {name: cells[name] if name in cells else _try(name, program, cached, context, trials) for name in PASSES}


def _try(name: str, program: Program, cached: Program | None, context: Context, trials: Any) -> Cell:
    step = trials.tried(name)
    if trials.needs_caches(step):
        if cached is None:
            return Cell(0, NO_CACHES)
        program = cached
    plan = step.plan(program, context)
    reason = plan.refusals[0].reason if plan.refusals and not plan.decisions else ""
    return Cell(len(plan.decisions), reason)


def to_text(found: Mapping[str, Mapping[str, Cell]], texts: Mapping[str, str]) -> str:
    """Return the table: a row for each pass, families with the same outcome together.

    Args:
        found: family -> pass -> what came of it.
        texts: how passes are tried that are not tried by their name alone.
    """
    return HEADER + "\n".join(f"| {' | '.join(_row(name, found, texts))} |" for name in PASSES) + "\n"


def _row(name: str, found: Mapping[str, Mapping[str, Cell]], texts: Mapping[str, str]) -> Sequence[str]:
    applied: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for family, cells in found.items():
        cell = cells[name]
        if cell.places:
            applied.setdefault(str(cell.places), []).append(family)
        elif cell.reason:
            refused.setdefault(_short(cell.reason), []).append(family)
    tried = f"`{texts[name].partition(':')[2]}`" if name in texts else ""
    parts = [sorted(applied.items(), key=lambda item: -int(item[0])), refused.items()]
    return name, tried, *("; ".join(f"{what} ({', '.join(families)})" for what, families in part) for part in parts)


def _short(reason: str) -> str:
    """Return a reason without the names and numbers of one model, so that it is the same for several."""
    text = re.sub(r",? from \S+:\d+.*", "", reason.replace("|", "/"))
    text = re.sub(r"%?\b\w+_(default|tensor)\w*", "a value", text, flags=re.IGNORECASE)
    text = re.sub(r"^(a value|%?\w+|layer \d+): ", "", text)
    general = re.sub(r"\b(?![01]\b)\d+(\.\d+)?\b", "N", text)
    return general if len(general) <= LONGEST else general[:LONGEST].rpartition(" ")[0] + " ..."


def with_table(page: str, text: str, marks: tuple[str, str] = (START, END)) -> str:
    """Return the page with a text between its marks, or at its end if it has none."""
    start, end = marks
    table = f"{start}\n{text}\n{end}"
    if start not in page:
        return f"{page.rstrip()}\n\n{table}\n"
    return page[: page.index(start)] + table + page[page.index(end) + len(end) :]


if __name__ == "__main__":
    sys.exit(main())
