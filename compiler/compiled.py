"""What compiling gives: a model that can be called, looked at, and written to a file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphwright.ir.records import Decision, PassRecord, Plan, Refusal
from graphwright.runtime.artifact import load as load_artifact
from graphwright.runtime.artifact import save as save_artifact
from graphwright.runtime.executable import Executable, Memory, Profile
from graphwright.runtime.schedule import Schedule

REPORT = "report.json"
GRAPH = "ir/final.txt"
RECIPE = "recipe.toml"


@dataclass(frozen=True)
class Report:
    """How a model was compiled.

    Args:
        notes: what the capture found out.
        records: the passes that ran, in order.
        kernels: number of different kernels.
        steps: number of steps of a call, by kind: "kernel", "matmul", "call".
        times_us: how long capturing, the passes, lowering and loading took, by name.
    """

    notes: tuple[str, ...]
    records: tuple[PassRecord, ...]
    kernels: int
    steps: Mapping[str, int]
    times_us: Mapping[str, int]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that `to_json` wrote."""
        data = json.loads(text)
        records = tuple(_record(entry) for entry in data.pop("records"))
        return cls(records=records, notes=tuple(data.pop("notes")), **data)


def _record(data: dict[str, Any]) -> PassRecord:
    plan = data.pop("plan")
    decisions = tuple(Decision(**entry) for entry in plan["decisions"])
    refusals = tuple(Refusal(**entry) for entry in plan["refusals"])
    return PassRecord(plan=Plan(plan["pass_name"], decisions, refusals), **data)


class Compiled:
    """A compiled model: called as the model is, it returns what the model returns.

    Attributes:
        graph: the program after all passes, printed.
        report: how it was made.
        recipe: the passes that were asked for, and the model they were for, as TOML; "" where it is not known.
    """

    def __init__(self, executable: Executable, graph: str, report: Report, recipe: str = "") -> None:
        self.graph = graph
        self.report = report
        self.recipe = recipe
        self._executable = executable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, without gradients.

        Raises:
            InputError: the arguments are not what the model was compiled for.
        """
        return self._executable(*args, **kwargs)

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
        return self._executable.profile(*args, repeat=repeat, **kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load` turns into this compiled model, in any process and without the model's code.

        It holds the weights, the kernels' sources, the steps, the graph after every pass as text where the report has it, the
        report and the recipe. An existing file is replaced in one step, and stays as it is if writing fails.

        Args:
            path: usually ends in ".gw".
        """
        executable = self._executable
        texts = {f"ir/{k:02}-{r.pass_name}.txt": r.text for k, r in enumerate(self.report.records) if r.text}
        extra = {GRAPH: self.graph, REPORT: self.report.to_json(), RECIPE: self.recipe, **texts}
        save_artifact(path, executable.schedule, executable.weights(), executable.signature, extra)


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
    return Compiled(executable, artifact.extra.get(GRAPH, ""), report, artifact.extra.get(RECIPE, ""))
