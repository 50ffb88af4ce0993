"""The command line of the benchmark of decoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphwright.tools.bench.command import parse_threads
from graphwright.tools.bench.models.command import ARGUMENTS, KeepingCommand, again, chosen_names, is_environment_set, progress
from graphwright.tools.output import console, write_whole

if TYPE_CHECKING:
    from .measure import Result

REPEAT, QUICK_REPEAT = 9, 3
QUICK_CASES = ([1], [256])


def parse_numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """Return numbers from a text such as "512,1024", each once; None where there is none."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"expected numbers such as 1,8, got {text!r}")
    return list(dict.fromkeys(numbers))


@click.command("decode", cls=KeepingCommand)
@click.option("--batch", "batches", callback=parse_numbers, help="Numbers of sequences.  [default: 1,8; 1 if quick]")
@click.option(
    "--context",
    "contexts",
    callback=parse_numbers,
    help="Tokens of a prompt and its answer.  [default: 512,1024,2048,4096; 256 if quick]",
)
@click.option("--threads", default="1,2", show_default=True, callback=parse_threads, help="Numbers of threads, with commas.")
@click.option("--rival", "rival_names", multiple=True, metavar="NAME", help="Compare these only; may be repeated.")
@click.option("--repeat", type=click.IntRange(1), help=f"Samples per rival.  [default: {REPEAT}; {QUICK_REPEAT} if quick]")
@click.option("--new", type=click.IntRange(2), default=32, show_default=True, help="Tokens of an answer.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the results here.")
@click.option("--markdown", "page", type=click.Path(path_type=Path, dir_okay=False), help="Also write the tables here.")
@click.option("--quick", is_flag=True, help="One small case, fewer samples.")
@click.pass_context
def decode(
    context: click.Context,
    batches: list[int] | None,
    contexts: list[int] | None,
    threads: list[int],
    rival_names: tuple[str, ...],
    repeat: int | None,
    new: int,
    json_path: Path | None,
    page: Path | None,
    quick: bool,
) -> None:
    """Compare greedy decoding on this CPU with transformers, torch.compile and onnxruntime.

    The small language model continues text that it has not seen. The ratio is the best competitor's time from token to token
    divided by ours, the median over rounds in which all run in turns; with one thread it is CPU time, with more wall time. The
    time until the first token, which is mostly the prompt's, is shown beside it. Tokens are checked first.

    Exits with 1 if our tokens are wrong or missing.
    """
    arguments: list[str] = context.meta[ARGUMENTS]
    if not is_environment_set():
        context.exit(again("decode", arguments))

    from graphwright.tools import reference
    from graphwright.tools.bench.measure import keep_memory

    from .measure import measure
    from .rivals import OURS, RIVALS

    names = chosen_names(rival_names, RIVALS, "--rival")
    # Words of the command that would measure the same, without the files that it writes.
    words = ["graphwright bench decode", *(f"--rival {name}" for name in rival_names)]
    words += [f"--{option} {','.join(map(str, n))}" for option, n in (("batch", batches), ("context", contexts)) if n]
    words += [f"--threads {','.join(map(str, threads))}", *([f"--repeat {repeat}"] if repeat else []), f"--new {new}"]
    command = " ".join([*words, *(["--quick"] if quick else [])])
    batches = batches or (QUICK_CASES[0] if quick else [1, 8])
    contexts = contexts or (QUICK_CASES[1] if quick else [512, 1024, 2048, 4096])
    rounds = repeat or (QUICK_REPEAT if quick else REPEAT)
    keep_memory()
    model = reference.load_language_model()
    results: list[Result] = []
    with progress() as tell:
        for count in threads:
            for batch in batches:
                for size in contexts:
                    about = f"{batch} x {size}, {count} thread{'s' if count > 1 else ''}"
                    show = partial(_tell_about, tell, about)
                    results.append(measure(model, batch, size, new, count, names, rounds, tell=show))
                    # Written every time, so that a run that is stopped leaves what it has measured.
                    _write(results, names, threads, command, json_path, page)
    _show(results, names, threads)
    context.exit(1 if any(OURS in result.failures for result in results) else 0)


def _tell_about(tell: Callable[[str], None], about: str, text: str) -> None:
    tell(f"{about}: {text}")


def _show(results: Sequence[Result], names: Sequence[str], threads: Sequence[int]) -> None:
    from .report import failures, first_table, speed_table

    shown = console()
    for count in threads:
        shown.print(speed_table(results, names, count))
        shown.print(first_table(results, names, count))
    for line in failures(results):
        shown.print(f"- {line}", markup=False, highlight=False)


def _write(
    results: Sequence[Result],
    names: Sequence[str],
    threads: Sequence[int],
    command: str,
    json_path: Path | None,
    page: Path | None,
) -> None:
    from .report import to_json, to_markdown

    if json_path is not None:
        write_whole(json_path, (json.dumps(to_json(results, command), indent=2) + "\n").encode())
    if page is not None:
        write_whole(page, to_markdown(results, names, threads, command).encode())
