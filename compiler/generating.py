"""Compiling what generates: programs with caches, derived from the plain forward of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphwright.codegen.lower import lower
from graphwright.ir.errors import PassError
from graphwright.ir.fixing import fix_dimension
from graphwright.ir.program import Program
from graphwright.ir.records import PassRecord
from graphwright.passes.base import Context, Pass
from graphwright.runtime.ending import Ending
from graphwright.runtime.executable import Executable
from graphwright.runtime.generation import PREFILL, STEP, Generator, load_generator

from .pipeline import run_passes

AFTER = ("common-subexpressions", "constant-folding", "dead-code")
"""What is done to a derived program."""


@dataclass(frozen=True)
class Derived:
    """What generates, and where it came from.

    Args:
        generator: continues sequences.
        programs: the program for prompts and that for one token, by their names.
        records: the passes that made the program with caches of the plain one.
        prefill: those that ran on the program for prompts after these.
    """

    generator: Generator
    programs: Mapping[str, Program]
    records: tuple[PassRecord, ...]
    prefill: tuple[PassRecord, ...]


def compile_generator(
    program: Program,
    context: Context,
    shared: Executable,
    ending: Ending,
    passes: Iterable[Pass | str] = (),
    *,
    keep_text: bool = False,
) -> Derived:
    """Return what continues sequences, and the programs that it was made of.

    Args:
        program: the program of a causal decoder, after all passes.
        context: of the passes.
        shared: the executable of the program; its weights are used where they can be.
        ending: what ends a sequence.
        passes: what to do to the derived program.
        keep_text: print the derived program after every pass that changed something, into the record.

    Raises:
        PassError: the program cannot be run token by token.
        LoweringError: an operation can neither be generated nor called.
    """
    derived = run_passes(program, ["cached-decode", *passes, *AFTER], context, keep_text=keep_text)
    records = tuple(derived.records[len(program.records) :])
    if not derived.states:
        reasons = [refusal.reason for record in records for refusal in record.plan.refusals if _is_ours(record)]
        raise PassError(f"generate: the model cannot be run token by token: {'; '.join(reasons) or 'no reason was given'}")
    _tell_apart(derived, program)
    prompt = run_passes(derived, ["last-token", "dead-code"], context, keep_text=keep_text)
    single = run_passes(fix_dimension(derived, "tokens", 1), ["dense-when-short", "dead-code"], context)
    programs = {PREFILL: prompt, STEP: single}
    lowered = {name: (lower(made, device=context.target), made.signature) for name, made in programs.items()}
    generator = load_generator(lowered, {**prompt.weights, **single.weights}, ending, shared)
    return Derived(generator, programs, records, tuple(prompt.records[len(derived.records) :]))


def _tell_apart(derived: Program, plain: Program) -> None:
    """Rename weights that passes made anew under the names of others of the plain program: one file holds all of them."""
    for name in [name for name, weight in derived.weights.items() if plain.weights.get(name, weight) is not weight]:
        new = next(n for k in range(len(derived.weights)) if (n := f"cached{k}_{name}") not in derived.weights | plain.weights)
        derived.weights[new] = derived.weights.pop(name)
        for node in derived.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                node.target = new


def _is_ours(record: PassRecord) -> bool:
    return record.pass_name == "cached-decode"


def ending_of(model: Any) -> Ending:
    """Return what ends the sequences that a model generates, from its `generation_config` if it has one."""
    config = getattr(model, "generation_config", None)
    end, padding = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
    ends = tuple(int(token) for token in (end if isinstance(end, Sequence) else [end]) if token is not None)
    if padding is None:
        padding = ends[0] if ends else 0
    return Ending(ends, (), int(padding))
