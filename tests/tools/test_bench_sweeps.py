"""Sweeps: what is measured, and what is printed, written and drawn. A tiny model stands in for the true ones."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from graphwright.ir.errors import OptionError
from graphwright.ir.target import Target
from graphwright.tools.bench.models import measure, rivals
from graphwright.tools.bench.models.rows import ROWS, Row
from graphwright.tools.bench.sweeps import command, forward, frame, report, workloads
from graphwright.tools.bench.sweeps.forward import ForwardSweep
from graphwright.tools.bench.sweeps.frame import SWEEPS, UNCHANGED, Outcome, Setting, find_sweep
from graphwright.tools.bench.sweeps.plot import plot


class Tiny(torch.nn.Module):
    """Three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return x


def mean_error(calls: Sequence[Any], expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> dict[str, float]:
    return {"error": max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))}


def given(seed: int, rows: int = 2) -> dict[str, Any]:
    return {"x": torch.randn(rows, 40, 16, generator=torch.Generator().manual_seed(seed))}


DROPPED = tuple(Setting(str(k), (f"drop-layers:drop={k},unit=block",), "blocks") for k in (1, 2, 3, 9))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ForwardSweep:
    """A sweep called `tiny`, in the table of sweeps."""
    torch.manual_seed(0)
    model = Tiny().eval()
    row = Row(name="tiny", load=lambda: model, inputs=lambda ragged: given(0, 1), varying=(0, 1), bar=1.0, quick=True)
    made = ForwardSweep(
        name="tiny",
        title="three blocks",
        y="error",
        row=row,
        calls=lambda: ([given(1)], [given(2), given(3)]),
        quality=mean_error,
        chosen=lambda quick: [UNCHANGED, *DROPPED[: 1 if quick else 4], Setting("eager", rival="eager")],
    )
    monkeypatch.setattr(command, "is_environment_set", lambda: True)
    monkeypatch.setattr(forward, "tell", lambda text: None)
    monkeypatch.setattr(forward, "this_machine", lambda: Target("cpu", flops_per_second=1e9, bytes_per_second=1e12))
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)
    monkeypatch.setattr(frame, "find_sweep", lambda name: made)
    for name in list(SWEEPS):
        monkeypatch.delitem(SWEEPS, name)
    monkeypatch.setitem(SWEEPS, "tiny", "nowhere:TINY")
    return made


@pytest.fixture
def outcomes() -> list[Outcome]:
    """Outcomes of every kind: unchanged, two of a series, one that failed, a rival near and one far away."""
    return [
        Outcome(UNCHANGED, {"error": 0.0}, {"time_ratio": 1.0, "flops": 2e9}, {"time_ratio": 1.0}),
        Outcome(Setting("1", ("drop-layers:drop=1",), "blocks"), {"error": 0.25}, {"time_ratio": 0.75}, {"time_ratio": 0.7}),
        Outcome(Setting("2", ("drop-layers:drop=2",), "blocks"), {"error": 0.5}, {"time_ratio": 0.5}, {"time_ratio": 0.4}),
        Outcome(Setting("9", ("drop-layers:drop=9",), "blocks"), problem="there are 3"),
        Outcome(Setting("eager", rival="eager"), {"error": 0.0}, {"time_ratio": 0.9}),
        Outcome(Setting("onnx-20", rival="onnx-20"), {"error": 0.0}, {"time_ratio": 4.0}),
    ]


def test_every_sweep_is_there_and_runs_real_passes() -> None:
    """The table's sweeps load, their settings have names of their own, their rivals exist and their passes parse."""
    from graphwright.passes.registry import parse_pass

    for name in SWEEPS:
        sweep = find_sweep(name)
        assert sweep.name == name
        assert len(sweep.settings(True)) < len(sweep.settings(False))
        names = [setting.name for setting in sweep.settings(False)]
        assert len(names) == len(set(names))
        assert {setting.name for setting in sweep.settings(True)} <= set(names)
        for setting in sweep.settings(False):
            assert not setting.rival or setting.rival in rivals.RIVALS
            assert [parse_pass(text).name for text in setting.passes] == [text.partition(":")[0] for text in setting.passes]


def test_unknown_sweep() -> None:
    """An unknown name is answered with the nearest."""
    with pytest.raises(OptionError, match="layers"):
        find_sweep("layrs")


def test_quality_and_cost_of_each_setting(tiny: ForwardSweep) -> None:
    """Every setting has its own numbers: the unchanged is exact and 1, each block less costs less and errs more."""
    found = {outcome.setting.label: outcome for outcome in tiny.run(tiny.settings(False), 3, 1)}
    assert list(found) == ["unchanged", "1", "2", "3", "9", "eager"]
    assert found["unchanged"].quality["error"] < 1e-5
    assert found["unchanged"].cost["time_ratio"] == found["unchanged"].predicted["time_ratio"] == 1
    kept = [found[label] for label in ("unchanged", "1", "2")]
    assert [a.quality["error"] < b.quality["error"] for a, b in itertools.pairwise(kept)] == [True, True]
    # Three products and what is around them: each block less is a third less.
    assert [o.cost["flops"] / kept[0].cost["flops"] for o in kept] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [o.predicted["time_ratio"] for o in kept] == pytest.approx([1, 2 / 3, 1 / 3])
    # A thousand operations take a microsecond on the machine that stands in.
    assert [o.predicted["time_us"] for o in kept] == pytest.approx([o.cost["flops"] / 1e3 for o in kept])
    assert all(o.cost["time_us"] > 0 for o in kept)
    assert found["eager"].quality == {"error": 0}
    assert found["eager"].cost["time_us"] > 0


def test_a_setting_that_cannot_run_says_why(tiny: ForwardSweep) -> None:
    """A pass that raises, and one that does nothing, are results without numbers; the others are measured."""
    settings = [DROPPED[3], Setting("none", ("pack-tokens",)), DROPPED[0]]
    many, none, one = tiny.run(settings, 1, 1)
    assert "drop=9" in many.problem
    assert many.cost == none.cost == {}
    assert none.problem.startswith("pack-tokens did nothing: ")
    assert not one.problem
    # The unchanged model is timed too, although it is not among the settings.
    assert one.cost["time_ratio"] > 0


def test_a_rival_that_computes_something_else_has_no_number(tiny: ForwardSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """A competitor is compared with eager before it is timed."""
    monkeypatch.setitem(rivals.RIVALS, "wrong", lambda case: lambda: torch.zeros(1, 40, 16))
    _, wrong = tiny.run([UNCHANGED, Setting("wrong", rival="wrong")], 1, 1)
    assert wrong.problem.startswith("WrongResultError")


def test_times_are_medians_over_rounds(tiny: ForwardSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio is the median of the rounds' ratios, not the ratio of medians."""
    times = {"unchanged": [1.0, 2.0, 4.0], "blocks, 1": [3.0, 3.0, 3.0]}
    monkeypatch.setattr(forward, "rounds", lambda runs, threads, repeat, tell: (times, {}))
    _, one = tiny.run([UNCHANGED, DROPPED[0]], 3, 1)
    assert one.cost["time_us"] == 3e6
    assert one.cost["time_ratio"] == 1.5


def test_next_token_quality() -> None:
    """Loss, divergence and agreement against values worked out by hand."""
    call = {"input_ids": torch.tensor([[0, 1, 0]])}
    old = torch.tensor([[[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]]).log()
    new = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]]]).log()
    found = workloads.next_token_quality([call], [old], [new])
    assert found["nll_change"] == pytest.approx((math.log(0.25 / 0.5) + math.log(0.25 / 0.75)) / 2)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found["kl"] == pytest.approx((first + 0.5 * math.log(3)) / 3, rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(2 / 3)
    assert workloads.next_token_quality([call], [old], [old]) == {"nll_change": 0, "kl": 0, "top1_agreement": 1}


def test_sentence_quality() -> None:
    """Padding counts for nothing, and neighbours are compared by the ten nearest."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(30, 4, 8, generator=generator)
    mask = torch.ones(30, 4, dtype=torch.long)
    mask[:, 2:] = 0
    call = {"attention_mask": mask}
    poisoned = torch.where(mask[..., None] == 0, 1e6, states)
    assert workloads.sentence_quality([call], [states], [poisoned]) == pytest.approx({"cosine": 1, "top10_overlap": 1})
    other = workloads.sentence_quality([call], [states], [torch.randn(30, 4, 8, generator=generator)])
    assert abs(other["cosine"]) < 0.3
    # Ten of 29 by chance.
    assert 0.2 < other["top10_overlap"] < 0.5
    assert workloads.sentence_quality([call], [states], [-states])["cosine"] == pytest.approx(-1)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(tiny: ForwardSweep, outcomes: list[Outcome], tmp_path: Path, ending: str) -> None:
    """A picture is written in the format that its ending names."""
    path = tmp_path / f"picture.{ending}"
    plot(tiny, outcomes, path)
    assert path.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_picture_shows_what_was_found(
    tiny: ForwardSweep, outcomes: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points are at their numbers; the failed setting is none of them; a rival far away is told of, not shown."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    plot(tiny, outcomes, tmp_path / "picture.png")
    trade, predictions = figures[0].axes
    assert [tuple(map(float, c.get_offsets()[0])) for c in trade.collections] == [(0.75, 0.25), (1.0, 0.0)]
    assert sorted(tuple(map(float, c.get_offsets()[0])) for c in predictions.collections) == [(0.4, 0.5), (0.7, 0.75), (1, 1)]
    assert {text.get_text() for text in trade.texts} == {"unchanged", "1", "2"}
    legend = [text.get_text() for text in trade.get_legend().get_texts()]
    assert legend == ["blocks", "eager 0.9", "onnx-20 4 (right of this)"]
    assert trade.get_xlim()[1] < 2


def test_picture_without_predictions_has_one_part(tiny: ForwardSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn where nothing is predicted."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    plot(tiny, [Outcome(UNCHANGED, {"error": 0.0}, {"time_ratio": 1.0})], tmp_path / "picture.png")
    assert len(figures[0].axes) == 1


def test_page(tiny: ForwardSweep, outcomes: list[Outcome]) -> None:
    """The page has a row for each setting, what its passes were, the picture, and why numbers are missing."""
    page = report.to_markdown(tiny, outcomes, "graphwright bench sweep tiny", "picture.svg")
    assert page.startswith("# Three blocks\n\nWritten by `graphwright bench sweep tiny` on ")
    assert "| setting | error | time_ratio | time_ratio predicted | flops |" in page
    assert "| blocks, 1 | 0.250 | 0.750 | 0.700 | - |" in page
    assert "| blocks, 9 | - | - | - | - |" in page
    assert "- blocks, 1: `drop-layers:drop=1`" in page
    assert "- blocks, 9: there are 3" in page
    assert "](picture.svg)" in page
    assert "![" not in report.to_markdown(tiny, outcomes, "")


def test_table(tiny: ForwardSweep, outcomes: list[Outcome]) -> None:
    """The terminal's table has the same cells."""
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(report.to_table(tiny, outcomes))
    text = console.export_text()
    assert "time_ratio predicted" in text
    assert "blocks, 2" in text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("a", 3.0, "3"), ("a", 0.12345, "0.123"), ("a", 1.6e-7, "2e-07"), ("a", 1234.5, "1234"), ("a", 2.5e9, "2.5e+09")],
)
def test_numbers_are_short(key: str, value: float, text: str) -> None:
    """A number is shown as long as it says something."""
    assert report.cells(Outcome(UNCHANGED, {key: value}), ["setting", key])[1] == text


def test_command_writes_all(tiny: ForwardSweep, tmp_path: Path) -> None:
    """The command prints the table and writes JSON, page and picture; a setting without a result makes it fail."""
    files = {option: tmp_path / f"out.{ending}" for option, ending in (("json", "json"), ("markdown", "md"), ("plot", "svg"))}
    options = [part for option, path in files.items() for part in (f"--{option}", str(path))]
    result = CliRunner().invoke(command.sweep, ["tiny", "--quick", "--repeat", "2", *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert "blocks, 1" in result.output
    data = json.loads(files["json"].read_text())
    assert data["command"] == "graphwright bench sweep tiny --quick --threads 1 --repeat 2"
    assert [outcome["setting"]["label"] for outcome in data["outcomes"]] == ["unchanged", "1", "eager"]
    assert data["sweep"]["x"] == "time_ratio"
    assert "](out.svg)" in files["markdown"].read_text()
    assert files["plot"].stat().st_size > 1000
    assert CliRunner().invoke(command.sweep, ["tiny", "--repeat", "1"]).exit_code == 1


def test_command_keeps_what_it_has(tiny: ForwardSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped leaves the outcomes that it had."""

    def stopped(self: ForwardSweep, settings: Sequence[Setting], repeat: int, threads: int) -> Iterator[Outcome]:
        yield Outcome(settings[0], {"error": 0.0}, {"time_ratio": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(ForwardSweep, "run", stopped)
    CliRunner().invoke(command.sweep, ["tiny", "--json", str(tmp_path / "out.json")])
    assert len(json.loads((tmp_path / "out.json").read_text())["outcomes"]) == 1


def test_command_lists_and_refuses() -> None:
    """Without a name it lists what there is; an unknown one is refused."""
    listed = CliRunner().invoke(command.sweep, [])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == list(SWEEPS)
    assert CliRunner().invoke(command.sweep, ["layrs"]).exit_code == 2


@pytest.mark.slow
def test_calls_of_the_real_models_are_of_different_text() -> None:
    """No two calls of a workload share a row, and the models take them."""
    for calls in (workloads.language_calls(2), workloads.sentence_calls(2)):
        rows = [tuple(row.tolist()) for call in calls for row in call["input_ids"]]
        assert len(set(rows)) == len(rows)
    model = ROWS["prefill-256"].load()
    with torch.no_grad():
        assert model(**workloads.language_calls(1)[0]).logits.shape == (4, 256, 2048)
