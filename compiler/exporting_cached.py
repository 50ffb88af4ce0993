"""Programs for ONNX that continue sequences, with keys and values going in and out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from graphwright.codegen.onnx.past_inputs import PAST, with_past_inputs
from graphwright.ir.errors import ExportError, PassError
from graphwright.ir.program import Program
from graphwright.ir.records import PassRecord
from graphwright.passes.base import Context, Pass
from graphwright.passes.kv.quantize_cache import QuantizeCache
from graphwright.passes.registry import as_passes, format_pass

from .comparing_onnx import sample_tensors
from .generating import AFTER
from .pipeline import run_passes
from .static_caches import quantised

CHUNKS = (5, 3, 1, 1)
"""Tokens of the calls that the two forms of a program are compared by."""

PADDING = (0, 2)
"""Tokens of padding before each of two sequences."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a result, of the largest result."""


def with_caches(program: Program, passes: Iterable[Pass | str], context: Context, *, check: bool = True) -> Program:
    """Return the program that continues sequences, of the plain forward of a causal decoder.

    Args:
        program: after all passes of its own.
        passes: those for the program with caches. "quantize-cache" decides bits of each layer as it does elsewhere; its groups
            and its exact newest tokens have no form in ONNX, where each channel has one scale.
        context: of the passes.
        check: compare it with the program with caches that Graphwright runs itself, on random tokens.

    Raises:
        PassError: the model cannot be run token by token.
        ExportError: its caches have no form in ONNX, or the two programs differ.
    """
    steps = as_passes(passes)
    # These find codes of their own for ONNX, which has no place for those of Graphwright.
    static = [step for step in steps if isinstance(step, QuantizeCache)]
    derived = run_passes(program, ["cached-decode", *(step for step in steps if step not in static), *AFTER], context)
    if not derived.states:
        ours = [record for record in derived.records if record.pass_name == "cached-decode"]
        reasons = [refusal.reason for record in ours for refusal in record.plan.refusals]
        raise PassError(f"generate: the model cannot be run token by token: {'; '.join(reasons) or 'no reason was given'}")
    made = run_passes(with_past_inputs(derived), AFTER, context)
    if check:
        check_caches(derived, made)
    bits: dict[int, int] = {}
    for step in static:
        plan = step.plan(derived, context)
        made.records.append(PassRecord(step.name, format_pass(step), plan, 0, 0, 0))
        bits |= {decision.detail["layer"]: decision.detail["bits"] for decision in plan.decisions}
    return quantised(made, bits, context.calibration) if bits else made


def check_caches(derived: Program, made: Program) -> None:
    """Compare the two forms on random tokens of two sequences, one of them padded on the left.

    Raises:
        ExportError: their results differ.
    """
    total = sum(CHUNKS)
    high = made.dimensions[PAST].high
    if high is not None and high < total:
        raise ExportError(f"generate: the model has {high} positions, too few to compare the programs at {total}")
    sizes = {"batch": 2, "tokens": total, PAST: 0, "capacity": total}
    padded = sample_tensors(made, {**dict.fromkeys(made.dimensions, 2), **sizes})[0]
    rows = [padded[row, count:] for row, count in enumerate(PADDING)]
    tokens = torch.stack([torch.cat((row, row[: total - len(row)])) for row in rows])
    mask = (torch.arange(total) >= torch.tensor(PADDING)[:, None]).long().to(padded.device)
    slots = sample_tensors(derived, {**dict.fromkeys(derived.dimensions, 2), **sizes})[2:]
    with torch.no_grad():
        expected = derived.module()(tokens, torch.zeros(2, dtype=torch.int64, device=tokens.device), *slots)[0]
        found = _in_chunks(made, padded, mask)
    limit = TOLERANCES.get(expected.dtype, 1e-4) * float(expected.abs().max())
    for row, count in enumerate(PADDING):
        gap = float((found[row, count:] - expected[row, : total - count]).abs().max())
        if not gap <= limit:
            raise ExportError(
                f"generate: the ONNX form computes something else: sequence {row} differs by {gap:.3g} where {limit:.3g} is "
                "allowed. This is a bug in the rewriting: please report the model."
            )


def _in_chunks(made: Program, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the program's results for all tokens, computed part by part."""
    module, results = made.module(), []
    sizes = {**dict.fromkeys(made.dimensions, 2), "batch": len(tokens), "tokens": 1, PAST: 0}
    present: Any = sample_tensors(made, sizes)[2:]
    start = 0
    for count in CHUNKS:
        end = start + count
        result, *present = module(tokens[:, start:end], mask[:, :end], *present)
        results.append(result)
        start = end
    return torch.cat(results, 1)
