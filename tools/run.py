"""`graphwright run`: call a compiled model."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from .building import ModelOptions, build_or_load, gather, model_options, signature_of
from .costs import parse_sizes
from .output import Command, check_output, console, json_option, print_json, progress, table, time_text, write_whole, writing

if TYPE_CHECKING:
    import torch

    from graphwright.compiled import Compiled

    from .models import Model


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=FILE",
    help="Take a tensor from a .npy or .safetensors file; FILE.safetensors alone gives all its tensors. May be repeated.",
)
@click.option("--size", "sizes", multiple=True, metavar="NAME=N,...", help="Sizes of dimensions; may be repeated.")
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="Timed calls, after the first.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the results to this .safetensors file.")
@model_options
@json_option
def run(
    model: str,
    inputs: tuple[str, ...],
    sizes: tuple[str, ...],
    repeat: int,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Call MODEL, a .gw file or anything that `graphwright compile` takes, and show what it returns.

    Inputs that are not given are random: token ids below the size of the vocabulary where the compiled model shows it, 0 or 1
    elsewhere; masks of ones. Times are wall times; the first call compiles kernels.
    """
    if output is not None:
        check_output(output, ".safetensors", "--output")
    wanted = {name: number for found in parse_sizes(sizes) for name, number in found.items()}
    how = gather(options)
    built = build_or_load(model, how)
    compiled, original = built.compiled, built.model
    with progress("running"):
        tensors = _tensors(compiled, original, how, inputs, wanted)
        results, times_us = call(compiled, tensors, 1 + repeat)
    data = {
        "model": model,
        "inputs": {
            spec.name: {"dtype": _short(t), "shape": list(t.shape)}
            for spec, t in zip(signature_of(compiled).tensors, tensors, strict=True)
        },
        "outputs": {name: describe_tensor(tensor) for name, tensor in results.items()},
        "first_call_us": times_us[0],
        "call_us": median(times_us[1:]),
        "repeat": repeat,
    }
    if output is not None:
        import safetensors.torch

        with writing(output):
            write_whole(output, safetensors.torch.save({name: t.cpu().contiguous().clone() for name, t in results.items()}))
        data["output"] = str(output)
    if as_json:
        print_json(data)
    else:
        _show(data)


def _tensors(
    compiled: Compiled, original: Model | None, how: ModelOptions, files: tuple[str, ...], sizes: dict[str, int]
) -> list[torch.Tensor]:
    """Return the tensors of the call: from files, from text, the sample of a model that was made here, or random."""
    from graphwright.ir.errors import InputError, unknown

    from .inputs import choose_inputs, read_inputs

    signature = signature_of(compiled)
    for name in sizes:
        if name not in signature.dimensions:
            raise InputError(f"--size: {unknown('dimension', name, signature.dimensions)}")
    given = read_inputs(files)
    if how.texts and original is None:
        for name, tensor in _tokenised(compiled, how).items():
            given.setdefault(name, tensor)
    elif original is not None and not files and not sizes:
        from graphwright.sampling import bind

        return bind(original.module, original.args, original.kwargs)[1]
    wanted = {"batch": how.batch, **sizes}
    wanted |= {name: how.tokens for name in signature.dimensions if "tokens" in name and name not in wanted}
    return choose_inputs(signature, compiled.schedule, given, wanted)


def _tokenised(compiled: Compiled, how: ModelOptions) -> dict[str, torch.Tensor]:
    """Return what a tokenizer makes of the texts, as far as the model takes it, at a length that it takes."""
    from graphwright.ir.errors import InputError

    from .models import tokenised

    signature = signature_of(compiled)
    specs = {spec.name: spec for spec in signature.tensors}
    if "input_ids" not in specs:
        raise InputError(f"--text: the model takes no input_ids, but {', '.join(specs)}")
    length = specs["input_ids"].shape[-1]
    exactly = length if isinstance(length, int) else None
    longest = signature.dimensions[length].high if length in signature.dimensions else None  # type: ignore[index]
    made = tokenised(how.tokenizer, how.texts, longest=longest, exactly=exactly)
    mask = made.get("attention_mask")
    if "attention_mask" not in specs and mask is not None and not bool(mask.all()):
        raise InputError(
            "--text: the texts are of different lengths, and the model takes no attention_mask: give one at a time"
        )
    return {name: tensor for name, tensor in made.items() if name in specs}


def call(compiled: Compiled, tensors: list[torch.Tensor], times: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the tensors that a call returns, by name, and the wall time of each of `times` calls in microseconds."""
    from graphwright.ir.containers import build
    from graphwright.measuring import tensors_of

    # By name every argument can be passed, those of a `*args` too.
    arguments = {name: build(structure, tensors) for name, structure in signature_of(compiled).arguments.items()}
    result, times_us = None, []
    for _ in range(times):
        start = time.perf_counter_ns()
        result = compiled(**arguments)
        times_us.append((time.perf_counter_ns() - start) / 1000)
    return tensors_of(result), times_us


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """Return dtype, shape and, of the elements that are finite, `mean`, `std`, `min` and `max`, and how many are not.

    The statistics are null for a tensor without finite elements.
    """
    values = tensor.detach().double()
    finite = values[values.isfinite()]
    found: dict[str, Any] = {"dtype": _short(tensor), "shape": list(tensor.shape)}
    for name in ("mean", "std", "min", "max"):
        found[name] = None
        if finite.numel():
            found[name] = float(finite.std(correction=0) if name == "std" else getattr(finite, name)())
    return {**found, "not_finite": values.numel() - finite.numel()}


def _short(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _show(data: dict[str, Any]) -> None:
    shown = console()
    inputs = [[name, i["dtype"], i["shape"]] for name, i in data["inputs"].items()]
    shown.print(table("inputs", ["name", "dtype", "shape"], inputs))
    numbers = ("mean", "std", "min", "max")
    rows = [
        [name, o["dtype"], o["shape"], *("-" if o[n] is None else f"{o[n]:.5g}" for n in numbers), o["not_finite"]]
        for name, o in data["outputs"].items()
    ]
    columns = ["name", "dtype", "shape", *numbers, "not finite"]
    shown.print(table("outputs", columns, rows, right=tuple(columns[3:])))
    shown.print(
        f"first call {time_text(data['first_call_us'])}, then {time_text(data['call_us'])} (median of {data['repeat']})"
    )
    if "output" in data:
        shown.print(f"written to {data['output']}", markup=False)
