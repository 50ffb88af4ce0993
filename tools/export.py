"""`graphwright export`: a model in, an ONNX file out, checked against the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from .building import gather, model_options, parse_dynamic, parse_passes, parse_recipe
from .output import Command, console, json_option, print_json, progress, size_text, table


@click.command(cls=Command)
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@model_options
@click.option(
    "--opset", type=click.IntRange(23, 25), default=23, show_default=True, help="Version of ONNX's operators to write."
)
@click.option("--external-data", is_flag=True, help="Write the weights to OUTPUT.data; done anyway above 1.9 GB.")
@click.option(
    "--generate",
    is_flag=True,
    help="Write a causal decoder with its past keys and values as inputs and outputs, for generating text.",
)
@json_option
def export(model: str, output: Path, opset: int, external_data: bool, generate: bool, as_json: bool, **options: Any) -> None:
    """Export MODEL, after passes, to the ONNX file OUTPUT.

    MODEL is what `graphwright compile` takes. The file is run by onnxruntime and compared with the model at several sizes
    before it takes its place; --no-check leaves that out.
    """
    if output.suffix != ".onnx":
        raise click.BadParameter(f"{output.name!r} should end with .onnx", param_hint="OUTPUT")
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(output.parent)!r}", param_hint="OUTPUT")
    if model.endswith(".gw"):
        raise click.UsageError(
            f"{model} holds kernels, and its graph no more: export the model that it was made of. The passes that it was made "
            f"with are in it: unzip -p {model} recipe.toml > recipe.toml, and then --recipe recipe.toml"
        )
    given = gather(options)
    passes, dynamic, recipe = parse_passes(given.passes), parse_dynamic(given.dynamic), parse_recipe(given.recipe)
    with progress(f"loading {model}"):
        import graphwright

        from .calibration import read_calibration
        from .models import load_model

        loaded = load_model(
            model, batch=given.batch, tokens=given.tokens, dtype=given.dtype, texts=given.texts, tokenizer=given.tokenizer
        )
        calibration = read_calibration(given.calibration, loaded, given.tokens, given.tokenizer)
    with progress(f"exporting {type(loaded.module).__name__}"):
        report = graphwright.export_onnx(
            loaded.module,
            output,
            *loaded.args,
            passes=passes,
            dynamic=dynamic,
            opset=opset,
            external_data=external_data or None,
            check=given.check,
            calibration=calibration,
            recipe=recipe,
            generate=generate,
            **loaded.kwargs,
        )
    data = {"model": model, **dataclasses.asdict(report), "notes": [*loaded.notes, *report.notes]}
    if as_json:
        print_json(data)
        return
    shown = console()
    for part in tables(data):
        shown.print(part)
    shown.print(f"{output}: {size_text(report.file_bytes)}", markup=False)


def tables(data: dict[str, Any]) -> list[Any]:
    """Return what an export wrote as things that rich prints."""
    from rich.text import Text

    values = [
        [kind, name, f"[{', '.join(map(str, shape))}]"]
        for kind, key in (("input", "inputs"), ("output", "outputs"))
        for name, shape in data[key].items()
    ]
    operators = data["operators"]
    counts = [[name, count] for name, count in operators.items()]
    trials = [[", ".join(f"{k} {n}" for k, n in t["sizes"].items()) or "fixed", f"{t['error']:.3g}"] for t in data["trials"]]
    lines = [f"nodes: {sum(operators.values())}; weights: {size_text(data['weight_bytes'])}; opset {data['opset']}"]
    lines += [f"note: {note}" for note in data["notes"]]
    lines += [f"refused: {done['name']}: {reason}" for done in data["passes"] for reason in done["refusals"]]
    changed = [[done["name"], len(done["decisions"])] for done in data["passes"] if done["decisions"]]
    parts = [
        table("passes", ["pass", "decisions"], changed, right=("decisions",)),
        table("tensors", ["", "name", "shape"], values),
        table("operators", ["operator", "nodes"], counts, right=("nodes",)),
    ]
    if trials:
        parts.append(
            table("against the program, run by onnxruntime", ["sizes", "relative error"], trials, right=("relative error",))
        )
    return [*parts, Text("\n".join(lines))]
