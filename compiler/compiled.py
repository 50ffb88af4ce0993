"""What compiling gives: a model that can be called, looked at, and written to a file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.records import CostLine, Decision, PassRecord, Plan, ProgramCost, Refusal
from graphwright.runtime.artifact import load as load_artifact
from graphwright.runtime.artifact import save as save_artifact
from graphwright.runtime.ending import Ending
from graphwright.runtime.executable import Executable, Memory, Profile
from graphwright.runtime.generation import Generator, Streamer, load_generator
from graphwright.runtime.schedule import Schedule
from graphwright.runtime.token_choice import Sampling

from .watch import Watch

REPORT = "report.json"
GRAPH = "ir/final.txt"
RECIPE = "recipe.toml"
GENERATION = "generation.json"
PLAIN = "plain"
"""The name of a model's own program, beside those of its generator."""


@dataclass(frozen=True)
class Report:
    """How a model was compiled.

    Args:
        notes: what the capture found out.
        records: the passes that ran, in order.
        kernels: number of different kernels.
        steps: number of steps of a call, by kind: "kernel", "matmul", "call".
        times_us: how long capturing, the passes, lowering and loading took, by name.
        decoding: the passes that made the program with caches of the model's own, in order; empty if it does not generate.
        prefill: the passes that ran after these on the program for prompts alone.
        costs: what the programs cost after all passes: "plain", and if it generates "prefill" and "step".
    """

    notes: tuple[str, ...]
    records: tuple[PassRecord, ...]
    kernels: int
    steps: Mapping[str, int]
    times_us: Mapping[str, int]
    decoding: tuple[PassRecord, ...] = ()
    prefill: tuple[PassRecord, ...] = ()
    costs: Mapping[str, ProgramCost] = field(default_factory=dict)

    @property
    def all_records(self) -> tuple[PassRecord, ...]:
        """The passes that ran on the model's own program, then those on the program with caches and on that for prompts."""
        return (*self.records, *self.decoding, *self.prefill)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that `to_json` wrote."""
        data = json.loads(text)
        records, decoding, prefill = (
            tuple(_record(entry) for entry in data.pop(key, ())) for key in ("records", "decoding", "prefill")
        )
        costs = {name: _cost(entry) for name, entry in data.pop("costs", {}).items()}
        notes = tuple(data.pop("notes"))
        return cls(notes=notes, records=records, decoding=decoding, prefill=prefill, costs=costs, **data)


def _record(data: dict[str, Any]) -> PassRecord:
    plan = data.pop("plan")
    decisions = tuple(Decision(**entry) for entry in plan["decisions"])
    refusals = tuple(Refusal(**entry) for entry in plan["refusals"])
    for key in ("cost_before", "cost_after"):
        data[key] = _cost(data[key]) if data.get(key) is not None else None
    return PassRecord(plan=Plan(plan["pass_name"], decisions, refusals), **data)


def _cost(data: dict[str, Any]) -> ProgramCost:
    return ProgramCost(tuple(CostLine(**line) for line in data["lines"]), data["weight_bytes"], data["state_bytes"])


class Compiled:
    """A compiled model: called as the model is, it returns what the model returns.

    Weights that need no other form are shared with the model it was made from, not copied. If that model's weights are changed
    in place afterwards, calls raise an error.

    Attributes:
        graph: the program after all passes, printed.
        graphs: all programs, printed: "plain" is the model's own; if it generates, "prefill" is for prompts and "step" is for
            one token.
        report: how it was made.
        recipe: the passes that were asked for, and the model they were for, as TOML; "" where it is not known.
        generator: what generates tokens; None if the model was not compiled for it.
    """

    def __init__(
        self,
        executable: Executable,
        graph: str,
        report: Report,
        recipe: str = "",
        generator: Generator | None = None,
        watch: Watch | None = None,
        graphs: Mapping[str, str] | None = None,
    ) -> None:
        self.graph = graph
        self.graphs = {PLAIN: graph, **(graphs or {})}
        self.report = report
        self.recipe = recipe
        self.generator = generator
        self._executable = executable
        self._watch = watch or Watch({})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, without gradients.

        Raises:
            InputError: the arguments are not what the model was compiled for, or its weights were changed since.
        """
        self._watch.check()
        return self._executable(*args, **kwargs)

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        attention_mask: torch.Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        pad_token_id: int | None = None,
        streamer: Streamer | None = None,
    ) -> torch.Tensor:
        """Return prompts and what the model continues them with.

        Args:
            input_ids: the prompts, int64 [batch, tokens].
            max_new_tokens: most tokens to generate.
            attention_mask: [batch, tokens], 0 where a prompt is padded, at its start or at its end; None for no padding. Each
                sequence is continued as if it were alone.
            do_sample: draw tokens, instead of taking the likeliest.
            temperature: scores are divided by it before a token is drawn; above 0.
            top_k: only the k likeliest are drawn from; 0 for all.
            top_p: of these only the likeliest that together have at least this probability.
            seed: of what is drawn; None for another one each time.
            eos_token_id: a token or several that end a sequence, () for none; None for the model's own.
            stop_sequences: tokens that end a sequence when they are the last that were generated.
            pad_token_id: what follows an end where others of the batch go on; None for the model's own.
            streamer: called with the new tokens [batch] as soon as they are known.

        Returns:
            int64 [batch, tokens + n], n at most `max_new_tokens`.

        Raises:
            InputError: the prompts do not fit the model, or it was not compiled with `generate=True`.
            OptionError: an option is out of its range.
        """
        self._watch.check()
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed) if do_sample else None
        generator = self._generator()
        return generator.generate(
            input_ids,
            max_new_tokens=max_new_tokens,
            attention_mask=attention_mask,
            sampling=sampling,
            ending=generator.ending.changed(eos_token_id, stop_sequences, pad_token_id),
            streamer=streamer,
        )

    def _generator(self) -> Generator:
        if self.generator is None:
            raise InputError("generate: the model was not compiled for it; compile it with generate=True")
        return self.generator

    @property
    def schedule(self) -> Schedule:
        """The steps that a call runs."""
        return self._executable.schedule

    @property
    def kernels(self) -> Mapping[str, str]:
        """The generated kernels' sources by name."""
        return self._executable.schedule.kernels

    @property
    def memory(self) -> Memory:
        """The memory that is held between calls."""
        return self._executable.memory

    def profile(self, *args: Any, repeat: int = 10, **kwargs: Any) -> Profile:
        """Return how long each step of a call takes.

        Args:
            args: as the model takes them.
            repeat: number of calls, at least 1.
            kwargs: likewise.
        """
        self._watch.check()
        return self._executable.profile(*args, repeat=repeat, **kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load` turns into this compiled model, in any process and without the model's code.

        It holds the weights, the kernels' sources, the steps, the graph after every pass as text where the report has it, the
        report and the recipe. An existing file is replaced in one step, and stays as it is if writing fails.

        Args:
            path: usually ends in ".gw".
        """
        self._watch.check()
        executable = self._executable
        texts = {f"ir/{k:02}-{r.pass_name}.txt": r.text for k, r in enumerate(self.report.all_records) if r.text}
        extra = {GRAPH: self.graph, REPORT: self.report.to_json(), RECIPE: self.recipe, **texts}
        weights, programs = executable.weights(), {}
        if self.generator is not None:
            programs = self.generator.programs()
            weights = self.generator.weights() | weights
            extra[GENERATION] = self.generator.ending.to_json()
            extra |= {_graph_member(name): self.graphs[name] for name in programs if name in self.graphs}
        save_artifact(path, executable.schedule, weights, executable.signature, extra, programs)

    def __repr__(self) -> str:
        taken = ", ".join(f"{spec.name} {spec}" for spec in self._executable.signature.tensors)
        return f"<Compiled: takes {taken}; {len(self.schedule.steps)} steps, {len(self.kernels)} kernels>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a compiled model holds machine code and addresses, and cannot be copied or pickled. What to do: write it with "
            "`save`, and `graphwright.load` it as often as needed."
        )


def load(path: str | os.PathLike[str]) -> Compiled:
    """Return the compiled model that `Compiled.save` wrote.

    Args:
        path: of the file.

    Raises:
        ArtifactError: it is damaged, changed, of another device or of a newer version.
    """
    artifact = load_artifact(path)
    executable = Executable(artifact.schedule, artifact.weights, artifact.signature)
    report = Report.from_json(artifact.extra[REPORT])
    generator, graphs = None, {}
    if GENERATION in artifact.extra:
        ending = Ending.from_json(artifact.extra[GENERATION])
        generator = load_generator(artifact.programs, artifact.weights, ending, executable)
        members = {name: _graph_member(name) for name in artifact.programs}
        graphs = {name: artifact.extra[member] for name, member in members.items() if member in artifact.extra}
    recipe = artifact.extra.get(RECIPE, "")
    return Compiled(executable, artifact.extra.get(GRAPH, ""), report, recipe, generator, graphs=graphs)


def _graph_member(program: str) -> str:
    return f"ir/final-{program}.txt"
