"""What the demo finds out, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .output import size_text, table

BUSY = 0.7
"""A load that is worth a warning."""


@dataclass(frozen=True)
class Latency:
    """One text at a time, both called in turn: what a fifth of the calls stay below.

    Args:
        tokens: its length.
        eager_ms: wall time of the original.
        compiled_ms: of the compiled model.
        ratio: the first over the second.
    """

    tokens: int
    eager_ms: float
    compiled_ms: float
    ratio: float


@dataclass(frozen=True)
class Hit:
    """A docstring that was found.

    Args:
        name: what it documents.
        summary: its first line.
        cosine: its similarity to the query.
    """

    name: str
    summary: str
    cosine: float


@dataclass(frozen=True)
class Answer:
    """What a query finds.

    Args:
        query: the question.
        eager: the best hits of the original, best first.
        compiled: those of the compiled model.
        overlap: how many of the ten best both have.
        compared: how many were compared: ten, or all if there are fewer.
    """

    query: str
    eager: list[Hit]
    compiled: list[Hit]
    overlap: int
    compared: int


@dataclass(frozen=True)
class Outcome:
    """Everything that the demo finds out.

    Args:
        busy: average number of programs that ran or waited during the minute before, 0 where the system does not tell.
        docstrings: how many docstrings there are; the compiled model embeds all.
        eager_docstrings: how many the original embeds before its time is up.
        tokens: of all docstrings, without padding.
        seconds: how long each stage took, by name.
        compile_s: how long each stage of compiling took, by name; "first call" is where kernels are compiled, or read from
            Triton's cache.
        latencies: of single texts.
        eager_per_s: docstrings that the original embeds in a second.
        compiled_per_s: that the compiled model embeds in a second.
        eager_cpu_ms: time of all processors together that the original needs for a docstring, on the batches that both embed.
        compiled_cpu_ms: likewise, the compiled model.
        throughput_ratio: how many times as fast the compiled model is on the batches that both embed.
        call_shape: texts, and tokens in each, of the call whose memory is measured.
        eager_call_bytes: by how much resident memory grows at most during that call; None where the system does not tell.
        compiled_call_bytes: likewise, with the buffers that are held between calls.
        eager_weight_bytes: of the original's weights.
        compiled_weight_bytes: of the compiled model's.
        largest_difference: of a number in an embedding.
        cosine_mean: mean cosine similarity between both embeddings of a docstring.
        cosine_min: the lowest.
        kernels: number of different kernels.
        steps: of a call, by kind.
        answers: of the queries.
    """

    busy: float
    docstrings: int
    eager_docstrings: int
    tokens: int
    seconds: dict[str, float]
    compile_s: dict[str, float]
    latencies: list[Latency]
    eager_per_s: float
    compiled_per_s: float
    eager_cpu_ms: float
    compiled_cpu_ms: float
    throughput_ratio: float
    call_shape: tuple[int, int]
    eager_call_bytes: int | None
    compiled_call_bytes: int | None
    eager_weight_bytes: int
    compiled_weight_bytes: int
    largest_difference: float
    cosine_mean: float
    cosine_min: float
    kernels: int
    steps: dict[str, int]
    answers: list[Answer]


def tables(outcome: Outcome) -> Iterator[Any]:
    """Yield what rich prints of an outcome: a comparison, and the answers."""
    yield _comparison(outcome)
    yield _answers(outcome.answers)


def stages(outcome: Outcome) -> Iterator[str]:
    """Yield what was done, a line each."""
    seconds = outcome.seconds
    yield f"{outcome.docstrings:,} docstrings of Python's standard library, {outcome.tokens:,} tokens"
    times = ", ".join(f"{name} {s:.1f} s" for name, s in outcome.compile_s.items())
    steps = ", ".join(f"{count} {kind}s" for kind, count in sorted(outcome.steps.items()))
    yield f"compiled in {sum(outcome.compile_s.values()):.1f} s: {times}"
    yield f"{outcome.kernels} different Triton kernels; a call runs {steps}"
    if outcome.eager_docstrings < outcome.docstrings:
        yield (
            f"PyTorch embedded a sample of {outcome.eager_docstrings:,} docstrings in the time it was given; speeds and "
            "answers are compared on that"
        )
    yield f"all of it took {seconds['all']:.0f} s"
    if outcome.busy >= BUSY:
        yield f"the machine was busy with other work (load {outcome.busy:.1f}): go by processor time"


def _comparison(outcome: Outcome) -> Any:
    rows = [
        [
            f"latency, 1 text of {latency.tokens} tokens",
            f"{latency.eager_ms:.2f} ms",
            f"{latency.compiled_ms:.2f} ms",
            f"{latency.ratio:.2f} times as fast",
        ]
        for latency in outcome.latencies
    ]
    rows.append(
        [
            "docstrings a second, 32 at a time",
            f"{outcome.eager_per_s:.0f}",
            f"{outcome.compiled_per_s:.0f}",
            f"{outcome.throughput_ratio:.2f} times as fast",
        ]
    )
    rows.append(
        [
            "processor time of a docstring",
            f"{outcome.eager_cpu_ms:.2f} ms",
            f"{outcome.compiled_cpu_ms:.2f} ms",
            f"{outcome.eager_cpu_ms / outcome.compiled_cpu_ms:.2f} times less",
        ]
    )
    theirs, ours = outcome.eager_call_bytes, outcome.compiled_call_bytes
    if theirs is not None and ours is not None:
        less = f"{theirs / ours:.1f} times less" if ours else ""
        count, tokens = outcome.call_shape
        rows.append([f"memory of a call, {count} texts of {tokens} tokens", size_text(theirs), size_text(ours), less])
    rows += [
        ["memory of the weights", size_text(outcome.eager_weight_bytes), size_text(outcome.compiled_weight_bytes), ""],
        ["largest difference in an embedding", "", f"{outcome.largest_difference:.1e}", ""],
        ["cosine similarity, mean and lowest", "", f"{outcome.cosine_mean:.7f}  {outcome.cosine_min:.7f}", ""],
    ]
    columns = ["all-MiniLM-L6-v2", "PyTorch", "Graphwright", ""]
    return table("the original and compiled", columns, rows, right=("PyTorch", "Graphwright"))


def _answers(answers: list[Answer]) -> Any:
    from rich.table import Table
    from rich.text import Text

    made = Table(title="what a question finds: similarity and docstring", title_justify="left", title_style="bold")
    made.add_column("question", max_width=26)
    made.add_column("PyTorch", no_wrap=True, max_width=38)
    made.add_column("Graphwright", no_wrap=True, max_width=38)
    made.add_column("in common", justify="right")
    for answer in answers:
        both = ("\n".join(f"{hit.cosine:.3f} {hit.name}" for hit in hits) for hits in (answer.eager, answer.compiled))
        common = f"{answer.overlap} of {answer.compared}"
        made.add_row(*map(Text, (answer.query, *both, common)), end_section=True)
    return made
