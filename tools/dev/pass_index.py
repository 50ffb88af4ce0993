"""Write the index of passes and the table of pairs of docs/passes/README.md.

python tools/dev/pass_index.py           # writes the page
python tools/dev/pass_index.py --print   # prints both tables
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from model_table import ROOT, load_families
from pass_table import load_trials, with_table

import graphwright
from graphwright.passes.base import Fidelity, Stage
from graphwright.passes.registry import PASSES, pass_class
from graphwright.pipeline import DEFAULT_PASSES, run_passes

PAGE = ROOT / "docs" / "passes" / "README.md"
INDEX = ("<!-- index: written by tools/dev/pass_index.py -->", "<!-- end of index -->")
PAIRS = ("<!-- pairs: written by tools/dev/pass_index.py -->", "<!-- end of pairs -->")
MODELS = ("bert", "llama")


def main() -> int:
    """Write the page's tables."""
    parser = argparse.ArgumentParser(description="Write the index of passes and the table of their pairs.")
    parser.add_argument("--print", action="store_true", help="print the tables instead")
    printed: bool = parser.parse_args().print
    # Transformers says which optional packages would make it faster.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trials, families = load_trials(), load_families()
    composing, reasons = try_pairs(trials, {name: families[name] for name in MODELS})
    texts = (index_text(), pairs_text(trials.pairs(), composing, reasons))
    page = PAGE.read_text() if PAGE.exists() else "# Passes\n"
    for text, marks in zip(texts, (INDEX, PAIRS), strict=True):
        page = with_table(page, text, marks)
    if printed:
        print("\n".join(texts))
    else:
        PAGE.write_text(page)
    return 0


def index_text() -> str:
    """Return the table of all passes."""
    lines = ["", "| pass | does | kind | fidelity | runs on | options |", "|---|---|---|---|---|---|"]
    for name, target in PASSES.items():
        cls = pass_class(name)
        link = f"[{name}]({name}.md)" if (PAGE.parent / f"{name}.md").exists() else name
        first = (cls.__doc__ or "").strip().partition("\n")[0].replace("|", "/")
        on = "caches" if cls.stage is Stage.DECODE else "every model" if name in DEFAULT_PASSES else "request"
        options = ", ".join(f"`{field.name}`" for field in dataclasses.fields(cls))
        fidelity = f"**{cls.fidelity.value}**" if cls.fidelity is Fidelity.LOSSY else cls.fidelity.value
        lines.append(f"| {link} | {first} | {target.split('.')[2]} | {fidelity} | {on} | {options} |")
    return "\n".join([*lines, ""])


def try_pairs(trials: Any, families: Mapping[str, Any]) -> tuple[dict[tuple[str, str], list[str]], dict[str, list[str]]]:
    """Return on which families the second of a pair finds places after the first, and the reasons why not elsewhere."""
    composing: dict[tuple[str, str], list[str]] = {pair: [] for pair in trials.pairs()}
    reasons: dict[str, list[str]] = {}
    for name, family in families.items():
        program = run_passes(graphwright.capture(family.build(), **family.sample(2, 7, 0)))
        tried = trials.Pairs(family, program)
        for first, second in composing:
            print(name, first, second, file=sys.stderr, flush=True)
            given = tried.after(first, second)
            plan = "there is no program with caches" if given is None else tried.plan(second, given)
            if not tried.does(first):
                continue
            if isinstance(plan, str) or not plan.decisions:
                reason = plan if isinstance(plan, str) else plan.refusals[0].reason
                reasons.setdefault(reason, []).append(f"{first}, {second} ({name})")
            else:
                composing[first, second].append(name)
    return composing, reasons


def pairs_text(
    pairs: list[tuple[str, str]], composing: Mapping[tuple[str, str], list[str]], reasons: Mapping[str, list[str]]
) -> str:
    """Return the table of pairs: the first pass down, the second one across; and why pairs are not in it."""
    firsts = list(dict.fromkeys(first for first, _ in pairs))
    seconds = list(dict.fromkeys(second for _, second in pairs))
    lines = ["", f"| first | {' | '.join(seconds)} |", "|---" * (len(seconds) + 1) + "|"]
    for first in firsts:
        cells = [", ".join(composing[first, second]) or "-" if (first, second) in composing else "" for second in seconds]
        lines.append(f"| {first} | {' | '.join(cells)} |")
    lines += ["", *(f"- {reason}: {'; '.join(places)}" for reason, places in reasons.items())]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
