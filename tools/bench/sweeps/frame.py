"""What a sweep is, and the table of those that there are."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from graphwright.ir.errors import OptionError, unknown

SWEEPS: dict[str, str] = {
    "density": "graphwright.tools.bench.sweeps.density:DENSITY",
    "density-1024": "graphwright.tools.bench.sweeps.density:DENSITY_1024",
    "density-kernel": "graphwright.tools.bench.sweeps.density_kernel:KERNELS",
    "density-2048": "graphwright.tools.bench.sweeps.density:DENSITY_2048",
    "cache": "graphwright.tools.bench.sweeps.cache:CACHE",
    "layers": "graphwright.tools.bench.sweeps.layers:LAYERS",
    "merging": "graphwright.tools.bench.sweeps.merging:MERGING",
}
"""Name -> where the sweep is, "module:attribute"; imported when it is asked for."""

UNITS: dict[str, str] = {
    "time_us": "time of a call in us",
    "time_ratio": "time / time of the unchanged model",
    "flops": "floating point operations",
    "cache_bytes_per_token": "bytes of cache per token",
    "cache_bytes_per_sequence": "bytes of cache beside these",
    "nll_change": "rise of the loss in nats per token",
    "nll_change_percent": "rise of the loss in %",
    "cosine": "cosine similarity",
    "top10_overlap": "overlap of the ten nearest",
}
"""What a key of quality or cost is called in tables and pictures; a key that is not here is called by its name."""


@dataclass(frozen=True)
class Setting:
    """One way to run the model.

    Args:
        label: a few words, shown in its row and beside its point; unique in its series.
        passes: what changes the program, as texts such as "drop-layers:drop=2"; none for the unchanged program.
        series: settings of one series are joined by a line, from the least cost to the most.
        rival: who runs the unchanged model in our place: a name of `bench.models.rivals`, such as "eager"; "" for us.
    """

    label: str
    passes: tuple[str, ...] = ()
    series: str = ""
    rival: str = ""

    @property
    def name(self) -> str:
        """The label with the series' name, unique in a sweep."""
        return f"{self.series}, {self.label}" if self.series else self.label


RIVALS: tuple[Setting, ...] = tuple(Setting(name, rival=name) for name in ("eager", "compile", "onnx-20"))
"""The unchanged model in PyTorch, torch.compile and onnxruntime: references for the cost of a forward pass."""

UNCHANGED = Setting("unchanged")
"""The model compiled by us, with no pass that changes what it computes."""


@dataclass(frozen=True)
class Outcome:
    """What was found of a setting.

    Args:
        setting: what was run.
        quality: key -> how near the results are to the unchanged model's.
        cost: key -> what it costs; less is better.
        predicted: key of `cost` -> what the cost analysis says of it, where it says something.
        problem: why there are no numbers; "" if all is well.
    """

    setting: Setting
    quality: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


class Sweep(Protocol):
    """A model, settings, and how to measure them."""

    @property
    def name(self) -> str:
        """Return what the sweep is called on the command line."""

    @property
    def title(self) -> str:
        """Return one line on what is swept."""

    @property
    def x(self) -> str:
        """Return the key of the cost that a picture shows."""

    @property
    def y(self) -> str:
        """Return the key of the quality that it shows."""

    def settings(self, quick: bool) -> Sequence[Setting]:
        """Return what is run; less of it if quick."""

    def run(self, settings: Sequence[Setting], repeat: int, threads: int) -> Iterator[Outcome]:
        """Yield what is found, in the order of the settings.

        Args:
            settings: of `settings`.
            repeat: rounds of timing, in which all settings run in turns.
            threads: number of threads. With 1, times are the thread's own CPU time, with more, wall time.
        """


def find_sweep(name: str) -> Sweep:
    """Return the sweep called `name`.

    Raises:
        OptionError: there is none.
    """
    if name not in SWEEPS:
        raise OptionError(unknown("sweep", name, SWEEPS))
    module, _, attribute = SWEEPS[name].partition(":")
    found: Sweep = getattr(importlib.import_module(module), attribute)
    return found
