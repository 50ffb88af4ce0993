"""The options that say what MODEL is and how to compile it, and the compiled model they lead to."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .output import progress

if TYPE_CHECKING:
    from graphwright.compiled import Compiled
    from graphwright.ir.program import Program
    from graphwright.ir.signature import Signature
    from graphwright.passes.base import Pass
    from graphwright.recipe import Recipe

    from .models import Model

Function = TypeVar("Function", bound=Callable[..., Any])

CAPTURE = "capture"
"""The name under which the program is recorded as it was before the first pass."""

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)

_DYNAMIC = re.compile(r"([\w.]+):(\d+=\w+(?:,\d+=\w+)*)")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What the options of MODEL say.

    Args:
        passes: passes as text.
        dynamic: as written, such as "input_ids:0=batch,1=tokens".
        check: compare the capture with the model at other sizes.
        batch: rows of a random sample.
        tokens: its tokens.
        dtype: "fp32", "bf16" or "fp16"; None leaves the model's.
        texts: what to tokenise as the sample.
        tokenizer: where the tokenizer is.
        recipe: a file of passes, which come before `passes`; None for none.
        calibration: files of sample calls, for passes that decide by these.
        generate: compile it to generate too.
    """

    passes: tuple[str, ...]
    dynamic: tuple[str, ...]
    check: bool
    batch: int
    tokens: int
    dtype: str | None
    texts: tuple[str, ...]
    tokenizer: str
    recipe: Path | None
    calibration: tuple[Path, ...]
    generate: bool = False


@dataclass(frozen=True)
class Built:
    """MODEL, compiled.

    Args:
        compiled: what came out.
        model: what went in; None for an artifact.
        program: as it was captured, before the first pass; None for an artifact.
        calibration: the sample calls that passes decided by.
    """

    compiled: Compiled
    model: Model | None = None
    program: Program | None = None
    calibration: tuple[Any, ...] = ()


def model_options(function: Function) -> Function:
    """Add the options that are gathered by `gather`."""
    for option in reversed(
        (
            click.option("--pass", "passes", multiple=True, metavar="NAME:OPT=V,...", help="Add a pass; may be repeated."),
            click.option("--recipe", type=_FILE, help="Passes with their options, as TOML; those of --pass come after."),
            click.option(
                "--calibration",
                type=_FILE,
                multiple=True,
                help="Sample calls for passes that decide by them: a .txt file, cut into pieces of --tokens tokens, or a "
                ".safetensors file of one call's tensors by name. May be repeated.",
            ),
            click.option(
                "--dynamic",
                multiple=True,
                metavar="TENSOR:DIM=NAME,...",
                help="Which sizes of a tensor may vary, such as input_ids:0=batch,1=tokens; `none` for no size of any. May "
                "be repeated.",
            ),
            click.option("--no-check", is_flag=True, help="Do not compare the capture with the model at other sizes."),
            click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows of random inputs."),
            click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of random inputs."),
            click.option(
                "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Convert the model.  [default: as it is]"
            ),
            click.option("--text", "texts", multiple=True, help="Take this text as a row of the inputs; may be repeated."),
            click.option("--tokenizer", default="", metavar="FOLDER", help="Tokenizer for --text.  [default: the model's]"),
        )
    ):
        function = option(function)
    return function


generate_option = click.option(
    "--generate", is_flag=True, help="Compile a causal decoder to generate too, with keys and values in caches."
)
"""Of commands that can make use of what it asks for; `gather` takes it with the others."""


def gather(options: dict[str, Any]) -> ModelOptions:
    """Take the options of `model_options` out of a command's, and return them."""
    names = [field.name for field in dataclasses.fields(ModelOptions) if field.name not in ("check", "generate")]
    given = {name: options.pop(name) for name in names}
    return ModelOptions(check=not options.pop("no_check"), generate=options.pop("generate", False), **given)


def parse_passes(texts: Sequence[str]) -> list[Pass]:
    """Return the passes that `--pass` asks for.

    Raises:
        click.BadParameter: one is unknown, or an option of it.
    """
    from graphwright.ir.errors import OptionError
    from graphwright.passes.registry import parse_pass

    try:
        return [parse_pass(text) for text in texts]
    except OptionError as error:
        raise click.BadParameter(str(error), param_hint="--pass") from error


def parse_recipe(path: Path | None) -> Recipe | None:
    """Return the recipe in a file; None for none.

    Raises:
        click.BadParameter: it is no recipe.
    """
    from graphwright.ir.errors import OptionError
    from graphwright.recipe import read_recipe

    try:
        return read_recipe(path) if path is not None else None
    except OptionError as error:
        raise click.BadParameter(str(error), param_hint="--recipe") from error


def parse_dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]] | bool | None:
    """Return what `--dynamic` says, in the form that `graphwright.capture` takes.

    Raises:
        click.BadParameter: a text is not of the form.
    """
    if not texts:
        return None
    if "none" in texts:
        if len(texts) > 1:
            raise click.BadParameter("`none` stands alone", param_hint="--dynamic")
        return False
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        match = _DYNAMIC.fullmatch(text)
        if match is None:
            raise click.BadParameter(f"expected TENSOR:DIM=NAME,..., got {text!r}", param_hint="--dynamic")
        pairs = (pair.split("=") for pair in match[2].split(","))
        found.setdefault(match[1], {}).update({int(dim): name for dim, name in pairs})
    return found


def build(name: str, options: ModelOptions) -> Built:
    """Return MODEL compiled, and MODEL itself.

    The first record of the report is the capture, with the program's text; those of the passes have theirs.

    Raises:
        click.BadParameter: a pass or a dynamic size is not written as it should be.
        GraphwrightError: the model cannot be found, loaded, captured or lowered.
    """
    passes, dynamic, recipe = parse_passes(options.passes), parse_dynamic(options.dynamic), parse_recipe(options.recipe)
    _refuse_without_caches([*(recipe.passes if recipe is not None else ()), *passes], options.generate)
    with progress(f"loading {name}"):
        import graphwright
        from graphwright.generating import ending_of
        from graphwright.ir.analyses.cost_lines import program_cost
        from graphwright.ir.printer import print_program
        from graphwright.ir.program import calls
        from graphwright.ir.records import PassRecord, Plan

        from .calibration import read_calibration
        from .models import load_model

        model = load_model(
            name,
            batch=options.batch,
            tokens=options.tokens,
            dtype=options.dtype,
            texts=options.texts,
            tokenizer=options.tokenizer,
        )
        calibration = read_calibration(options.calibration, model, options.tokens, options.tokenizer)
    started = time.perf_counter_ns()
    with progress(f"capturing {type(model.module).__name__}"):
        program = graphwright.capture(model.module, *model.args, dynamic=dynamic, check=options.check, **model.kwargs)
    capture_us = (time.perf_counter_ns() - started) // 1000
    program.notes[:0] = model.notes
    count = sum(1 for _ in calls(program.graph))
    text = print_program(program)
    cost = program_cost(program)
    program.records.append(PassRecord(CAPTURE, CAPTURE, Plan(CAPTURE), 0, count, capture_us, text, cost_after=cost))
    with progress(f"compiling {type(model.module).__name__}"):
        compiled = graphwright.compile(
            program, passes=passes, recipe=recipe, calibration=calibration, keep_text=True, generate=options.generate
        )
    if compiled.generator is not None:
        compiled.generator.ending = ending_of(model.module)
    times_us = {**compiled.report.times_us, CAPTURE: capture_us}
    compiled.report = dataclasses.replace(compiled.report, times_us=times_us)
    return Built(compiled, model, program, tuple(calibration))


def _refuse_without_caches(passes: Sequence[Pass], generate: bool) -> None:
    """Refuse, before any work, passes that rewrite caches in a model that has none.

    Raises:
        click.UsageError: there is such a pass, and the model is not compiled to generate.
    """
    names = list(dict.fromkeys(step.name for step in passes if step.stage.value == "decode"))
    if names and not generate:
        verb = "rewrites" if len(names) == 1 else "rewrite"
        raise click.UsageError(f"{', '.join(names)} {verb} caches, which only a model that generates has: add --generate")


def build_or_load(name: str, options: ModelOptions) -> Built:
    """Return MODEL compiled: read if it is an artifact, made anew otherwise.

    Raises:
        click.BadParameter: an option is not written as it should be.
        GraphwrightError: MODEL cannot be loaded or compiled.
        OSError: the artifact cannot be read.
    """
    if not name.endswith(".gw"):
        return build(name, options)
    names = ("passes", "recipe", "calibration", "dynamic", "dtype", "generate")
    given = next((f"--{key.removesuffix('es')}" for key in names if getattr(options, key)), None)
    if given is not None:
        raise click.UsageError(f"{given} has no effect on {name}, which is compiled already: give the model instead")
    if not Path(name).is_file():
        raise FileNotFoundError(f"MODEL {name!r}: there is no such file")
    with progress(f"loading {name}"):
        import graphwright

        return Built(graphwright.load(name))


def signature_of(compiled: Compiled) -> Signature:
    """Return how a compiled model is called."""
    return compiled._executable.signature
