"""Compile every family of models, compare it with PyTorch, and write docs/models.md.

python tools/dev/model_table.py              # all families, writes docs/models.md
python tools/dev/model_table.py llama bert   # these only, printed
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_sizes import BATCH, TOKENS, Sized, sized

import graphwright
from graphwright.runtime.schedule import CallStep, KernelStep
from graphwright.tools.doctor import cpu_name

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"

SIZES = ((BATCH, TOKENS), (1, 1), (3, 63))
"""(batch, tokens) of the calls whose error counts."""

CAPTURED = (BATCH, 48)
"""(batch, tokens) of the call that is captured: of none of the others, so that every number is one of a size that varies."""

SAMPLES = 15
SAMPLE_S = 0.02

HEADER = """# Models

Every family that the tests know ([tests/families.py](../tests/families.py)), with random weights in float32 and at a size at
which time says something. Written by

    python tools/dev/model_table.py

on {machine}.

- *capture*, *compile*: seconds, capture once and all the rest, kernels' machine code from Triton's cache where it is there.
- *error*: largest difference from eager PyTorch relative to the largest element of the output, over calls with {sizes}
  (batch x tokens); models of images take images of 64 x 64 with those batches.
- *eager*, *ours*: milliseconds of the calling thread's processor time at {batch} x {tokens}, one thread, medians of {samples}
  samples in turns; *ratio*: eager / ours, above 1 is faster.
- *steps*: kernels run in one call (different ones in brackets), and products with weights.
- *attention*: how many attentions were recognised. The mask is part of the kernel.
- *PyTorch operations*: what is neither generated nor a product with a weight, and how often it is called.

Text models have hidden size 256, 4 layers, 8 heads and 1024 words; where a family has several stages, each has that. The
hand-written attentions are one layer of width 32, whose time is mostly overhead.
"""

COLUMNS = (
    "family",
    "model",
    "capture",
    "compile",
    "error",
    "eager",
    "ours",
    "ratio",
    "steps",
    "attention",
    "PyTorch operations",
)


@dataclass(frozen=True)
class Row:
    """What was found of a family.

    Args:
        name: of the family.
        title: what the model is.
        capture_s: seconds to capture it.
        compile_s: seconds for the rest of the compilation, with the first call.
        error: largest difference from eager, relative to the largest element.
        eager_ms: median time of a call in eager mode.
        ours_ms: median time of a call.
        kernels: kernels launched in a call.
        different: of them different.
        products: products with weights.
        attentions: attentions recognised.
        calls: PyTorch operation -> how often a call runs it.
    """

    name: str
    title: str
    capture_s: float
    compile_s: float
    error: float
    eager_ms: float
    ours_ms: float
    kernels: int
    different: int
    products: int
    attentions: int
    calls: Mapping[str, int]

    def cells(self) -> tuple[str, ...]:
        """Return the row's texts, one for each of COLUMNS."""
        return (
            self.name,
            self.title,
            f"{self.capture_s:.1f}",
            f"{self.compile_s:.1f}",
            f"{self.error:.0e}",
            f"{self.eager_ms:.2f}",
            f"{self.ours_ms:.2f}",
            f"{self.eager_ms / self.ours_ms:.2f}",
            f"{self.kernels} ({self.different}) + {self.products}",
            str(self.attentions),
            ", ".join(f"{name} {count}" for name, count in self.calls.items()) or "none",
        )


def main() -> int:
    """Measure what the command line names; write the page if it names nothing."""
    families = load_families()
    parser = argparse.ArgumentParser(description="Compile every family of models and compare it with PyTorch.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"one of {', '.join(families)} (default: all)")
    names: list[str] = parser.parse_args().families
    if strange := [name for name in names if name not in families]:
        parser.error(f"there is no family {', '.join(strange)}; known: {', '.join(families)}")

    # Transformers says which optional packages would make it faster.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in names or families:
        rows.append(measure(name, sized(name, families[name])))
        print("  ".join(rows[-1].cells()), flush=True)
    if not names:
        # The table of passes is another tool's.
        _, mark, passes = PAGE.read_text().partition("<!-- passes")
        PAGE.write_text(to_page(rows) + (f"\n{mark}{passes}" if mark else ""))
    return 0


def load_families() -> dict[str, Any]:
    """Return the families of tests/families.py by name."""
    spec = importlib.util.spec_from_file_location("graphwright_model_families", ROOT / "tests" / "families.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{ROOT / 'tests' / 'families.py'} cannot be loaded")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.FAMILIES
    return found


def measure(name: str, row: Sized) -> Row:
    """Compile a model, compare it with eager at several sizes, and time both in turns."""
    model = row.build()
    inputs = row.sample(BATCH, TOKENS, 0)
    started = time.perf_counter()
    program = graphwright.capture(model, **row.sample(*CAPTURED, 0))
    captured = time.perf_counter()
    made = graphwright.compile(program)
    made(**inputs)
    done = time.perf_counter()

    error = 0.0
    for batch, tokens in SIZES:
        given = row.sample(batch, tokens, tokens)
        with torch.no_grad():
            error = max(error, difference(made(**given), model(**given)))

    def eager() -> None:
        with torch.no_grad():
            model(**inputs)

    eager_s, ours_s = in_turns(eager, lambda: made(**inputs))
    kernels = [step for step in made.schedule.steps if isinstance(step, KernelStep)]
    calls = [step for step in made.schedule.steps if isinstance(step, CallStep)]
    return Row(
        name,
        row.title,
        captured - started,
        done - captured,
        error,
        eager_s * 1e3,
        ours_s * 1e3,
        len(kernels),
        len(made.kernels),
        len(made.schedule.steps) - len(kernels) - len(calls),
        made.graph.count("graphwright.attention"),
        Counter(step.operation.split("::")[-1].split(".")[0] for step in calls),
    )


def tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = list(value.values()) if isinstance(value, Mapping) else value
    return [t for item in values for t in tensors(item)] if isinstance(values, list | tuple) else []


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest element, over all tensors."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def in_turns(*runs: Callable[[], object]) -> list[float]:
    """Return the median seconds per call of each, in processor time of this thread."""
    counts = []
    for run in runs:
        run()
        start = time.thread_time()
        run()
        counts.append(max(1, int(SAMPLE_S / max(time.thread_time() - start, 1e-6))))
    samples: list[list[float]] = [[] for _ in runs]
    gc.disable()
    try:
        for _ in range(SAMPLES):
            for run, count, times in zip(runs, counts, samples, strict=True):
                start = time.thread_time()
                for _ in range(count):
                    run()
                times.append((time.thread_time() - start) / count)
    finally:
        gc.enable()
    return [statistics.median(times) for times in samples]


def to_page(rows: Sequence[Row]) -> str:
    """Return docs/models.md."""
    machine = f"{cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}"
    sizes = ", ".join(f"{batch} x {tokens}" for batch, tokens in SIZES)
    header = HEADER.format(machine=machine, sizes=sizes, batch=BATCH, tokens=TOKENS, samples=SAMPLES)
    lines = [COLUMNS, ("---",) * 2 + ("---:",) * 8 + ("---",), *(row.cells() for row in rows)]
    return header + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
