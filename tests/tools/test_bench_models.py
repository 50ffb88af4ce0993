"""The benchmark of models: its gate, its arithmetic, and what it prints and writes. Tiny models stand in for the true ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from graphwright.ir.errors import InputError
from graphwright.tools import cli, reference
from graphwright.tools.bench.models import measure, onnx_files, profile, report, rivals, rows, startup
from graphwright.tools.bench.models.measure import Result, Timing
from graphwright.tools.bench.models.rivals import EAGER, OURS, RIVALS, Case
from graphwright.tools.bench.models.rows import ROWS, Row


class TinyModel(torch.nn.Module):
    """An embedding and a product, with the encoder's signature."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, width)
        self.head = torch.nn.Linear(width, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": self.head(torch.relu(self.table(input_ids))) * attention_mask[..., None]}


def tiny_inputs(batch: int = 2, length: int = 5) -> Callable[[bool], rows.Inputs]:
    def build(ragged: bool) -> rows.Inputs:
        mask = torch.ones(batch, length, dtype=torch.long)
        if ragged:
            mask[0, length // 2 :] = 0
        return {"input_ids": torch.arange(batch * length).view(batch, length) % 50, "attention_mask": mask}

    return build


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Row:
    """A quick row `tiny` and a long one, in place of the true rows, and eager execution in place of our compiler."""
    torch.manual_seed(0)
    model = TinyModel().eval()
    row = Row(name="tiny", load=lambda: model, inputs=tiny_inputs(), varying=(0, 1), bar=1.5, quick=True)
    for name in list(ROWS):
        monkeypatch.delitem(ROWS, name)
    monkeypatch.setitem(ROWS, "tiny", row)
    monkeypatch.setitem(ROWS, "long", dataclasses.replace(row, name="long", quick=False))
    monkeypatch.setitem(RIVALS, OURS, RIVALS[EAGER])
    # What the command would otherwise run itself again for.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return row


def measure_quietly(row: Row, threads: int, names: Sequence[str], repeat: int = 2, ragged: bool = False) -> Result:
    return measure.measure(row, threads, names, repeat, ragged=ragged, tell=lambda text: None)


def constant(value: float) -> Callable[[Case], rivals.Run]:
    return lambda case: lambda: torch.full((2, 5, 3), value)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [("minilm-1x32", (1, 32)), ("minilm-32x128", (32, 128)), ("minilm-8x384", (8, 384)), ("prefill-256", (1, 256))],
)
def test_inputs_have_the_size_in_the_name(name: str, shape: tuple[int, int]) -> None:
    """Rows without padding are full of real tokens."""
    inputs = ROWS[name].inputs(False)
    assert inputs["input_ids"].shape == shape
    assert inputs["input_ids"].unique().numel() > 10
    assert rows.real_positions(inputs) is None


def test_ragged_inputs_are_documents_of_their_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ragged row has padding at the end of its shorter sequences, and lengths that differ."""
    monkeypatch.setattr(reference, "docstrings", lambda: list(itertools.islice(reference.each_docstring(), 100)))
    inputs = ROWS["minilm-8x384"].inputs(True)
    real = rows.real_positions(inputs)
    assert real is not None
    assert real.shape == (8, 384)
    assert real.sum(1).unique().numel() > 3
    assert bool((real.int().diff(dim=1) <= 0).all())


@pytest.mark.parametrize("name", ["minilm-1x32", "prefill-256"])
def test_the_true_rows_run(name: str) -> None:
    """A true model takes its row's inputs, and its first output is the hidden states or logits of every position."""
    row = ROWS[name]
    inputs = row.inputs(False)
    output = RIVALS[EAGER](Case(row, row.load(), inputs, 1))()
    assert output.shape[:2] == inputs["input_ids"].shape
    assert output.shape[2] == (384 if name.startswith("minilm") else 2048)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: {"a": x, "b": None}])
def test_first_output(wrap: Callable[[torch.Tensor], Any]) -> None:
    """The first tensor is found in what models return."""
    x = torch.ones(2)
    assert rows.first_output(wrap(x)) is x


# -- rivals ------------------------------------------------------------------------------------------------------------


def test_settings_of_torch_compile_do_not_mix(tiny: Row) -> None:
    """Two settings of torch.compile for one model are compiled once each, and not again by later calls."""
    compiled = {"one": 0, "two": 0}

    def backend(name: str) -> Callable[[Any, Any], Any]:
        def count(graph: Any, example: Any) -> Any:
            compiled[name] += 1
            return graph.forward

        return count

    case = Case(tiny, tiny.load(), tiny.inputs(False), 1)
    rivals.forget_compiled()
    runs = [rivals._compiled(name, backend=backend(name))(case) for name in compiled]
    results = [run() for _ in range(3) for run in runs]
    assert compiled == {"one": 1, "two": 1}
    assert all(torch.equal(result, results[0]) for result in results)


def test_onnxruntime_agrees_and_is_exported_once(tiny: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file serves every size; other weights get a file of their own."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for size in ((2, 5), (1, 1), (3, 63)):
        row = dataclasses.replace(tiny, inputs=tiny_inputs(*size))
        found = measure_quietly(row, 1, [EAGER, "onnx-20"], repeat=1)
        assert found.failures == {}
    (path,) = onnx_files.cache_folder().glob("*")
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: SimpleNamespace(save=lambda p: Path(p).write_text("new")))
    inputs = tiny.inputs(False)
    assert onnx_files.exported(tiny.load(), inputs, (0, 1), 20) == path
    other = onnx_files.exported(TinyModel().eval(), inputs, (0, 1), 20)
    assert other != path
    assert other.read_text() == "new"
    assert len(list(onnx_files.cache_folder().glob("*"))) == 2


def test_an_exporter_that_gives_nothing_leaves_no_file(tiny: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed export is an error, not a file that the next run takes for the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="opset20"):
        onnx_files.exported(tiny.load(), tiny.inputs(False), (0, 1), 20)
    assert list(onnx_files.cache_folder().glob("*")) == []


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_measure_times_every_rival(tiny: Row, threads: int) -> None:
    """Each rival gets as many samples as asked for, and the number of threads is put back."""
    before = torch.get_num_threads()
    found = measure_quietly(tiny, threads, [OURS, EAGER], repeat=3)
    assert torch.get_num_threads() == before
    assert found.failures == {}
    assert found.best == EAGER
    assert found.ratio is not None
    assert 0 < found.ratio < 100
    assert all(t.samples == 3 and 0 < t.p20_ms <= t.median_ms and t.error == 0 for t in found.timings.values())


def test_a_slower_rival_gives_a_higher_ratio(tiny: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio is the competitor's time divided by ours."""

    def slow(case: Case) -> rivals.Run:
        run = RIVALS[EAGER](case)

        def both() -> torch.Tensor:
            end = time.thread_time() + 5e-3
            while time.thread_time() < end:
                pass
            return run()

        return both

    monkeypatch.setitem(RIVALS, "slow", slow)
    found = measure_quietly(tiny, 1, [OURS, "slow"])
    assert found.best == "slow"
    assert found.ratio is not None
    assert found.ratio > 3
    assert found.timings["slow"].median_ms >= 5


def test_the_best_competitor_counts() -> None:
    """The ratio is to the competitor with the lowest median, the median over rounds and not the quotient of medians."""
    result = Result("row", 1, bar=1.0)
    samples = {OURS: [1.0, 2.0, 4.0], "a": [3.0, 3.0, 3.0], "b": [9.0, 2.0, 2.0]}
    for name, times in samples.items():
        result.timings[name] = Timing(sorted(times)[1], measure.p20(times), 3, 0, 0.0, 0.0)
    measure._compare(result, samples)
    assert result.best == "b"
    assert result.ratio == 1.0
    assert result.ratio_p20 == pytest.approx(2.0 / 1.4)
    assert not result.below_bar


def test_p20() -> None:
    """The 20th percentile is interpolated, and that of one sample is the sample."""
    assert measure.p20([3.0]) == 3.0
    assert measure.p20([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0


@pytest.mark.parametrize("value", [7.0, float("nan"), float("inf")])
def test_a_wrong_result_is_not_timed(tiny: Row, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """A result that differs from eager's or is not a number has a reason in place of a time."""
    monkeypatch.setitem(RIVALS, OURS, constant(value))
    found = measure_quietly(tiny, 1, [OURS, EAGER])
    assert list(found.timings) == [EAGER]
    assert "differs from eager" in found.failures[OURS]
    assert found.ratio is None
    assert not found.below_bar


def test_a_result_of_another_shape_is_wrong() -> None:
    """Broadcasting does not hide a wrong shape."""
    with pytest.raises(measure.WrongResultError, match=r"shape \(1, 3\), eager's is \(2, 3\)"):
        measure.error_of(torch.ones(1, 3), torch.ones(2, 3), None)


def test_padding_is_not_compared() -> None:
    """What is computed for padding counts for nothing; what is computed for the rest counts."""
    expected = torch.ones(2, 4, 3)
    output, real = expected.clone(), torch.ones(2, 4, dtype=torch.bool)
    real[1, 2:] = False
    output[1, 2:] = float("nan")
    output[0, 0, 0] += 5e-5
    assert measure.error_of(output, expected, real) == pytest.approx(5e-5, rel=1e-2)
    output[1, 1] = float("nan")
    with pytest.raises(measure.WrongResultError):
        measure.error_of(output, expected, real)


def test_work_in_other_threads_is_refused(tiny: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread, a rival that hides its work in another thread gets no time."""

    def hidden(case: Case) -> rivals.Run:
        result = RIVALS[EAGER](case)()

        def work() -> None:
            end = time.thread_time() + 0.03
            while time.thread_time() < end:
                pass

        def run() -> torch.Tensor:
            worker = threading.Thread(target=work)
            worker.start()
            worker.join()
            return result

        return run

    monkeypatch.setitem(RIVALS, OURS, hidden)
    found = measure_quietly(tiny, 1, [OURS, EAGER])
    assert "StrayThreadsError" in found.failures[OURS]
    assert list(measure_quietly(tiny, 2, [OURS]).timings) == [OURS]


# -- startup and profile -----------------------------------------------------------------------------------------------


def test_startup_sees_time_and_memory(tiny: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that only making ready needs is in its peak, and not in that of later calls."""
    size = 200 * 2**20

    def hungry(case: Case) -> rivals.Run:
        # Memory of its own from the system, which gets it back at once.
        with mmap.mmap(-1, size) as memory:
            for start in range(0, size, mmap.PAGESIZE):
                memory[start] = 1
        time.sleep(0.05)
        return RIVALS[EAGER](case)

    monkeypatch.setitem(RIVALS, "hungry", hungry)
    before = torch.get_num_threads()
    found = startup.startup("tiny", "hungry", before)
    assert found["ready_s"] > 0.05
    assert found["ready_peak_bytes"] > size
    if Path("/proc/self/clear_refs").exists():
        assert found["call_peak_bytes"] < found["ready_peak_bytes"] - size / 2


def test_startup_runs_cold_then_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process gets the caches of the first, which start empty."""
    folders = []

    def run(command: list[str], env: dict[str, str], **settings: Any) -> subprocess.CompletedProcess[str]:
        cache = Path(env["TORCHINDUCTOR_CACHE_DIR"])
        folders.append((cache, cache.exists()))
        cache.mkdir(exist_ok=True)
        numbers = {"ready_s": 10.0 / len(folders), "ready_peak_bytes": 2, "call_peak_bytes": 1}
        return subprocess.CompletedProcess(command, 0, f"compiling\n{json.dumps(numbers)}\n", "")

    monkeypatch.setattr(startup.subprocess, "run", run)
    found = startup.measure_startup("row", "compile", 1)
    assert (found.cold_s, found.warm_s, found.ready_peak_bytes, found.call_peak_bytes, found.failure) == (10, 5, 2, 1, "")
    assert [existed for _, existed in folders] == [False, True]
    assert folders[0][0] == folders[1][0]
    assert not folders[0][0].exists()


def test_startup_that_fails_has_the_last_line_as_its_reason() -> None:
    """A process that ends with an error leaves its reason, not numbers."""
    found = startup.measure_startup("no-such-row", EAGER, 1)
    assert found.failure == "KeyError: 'no-such-row'"


@pytest.mark.slow
def test_startup_of_a_true_model() -> None:
    """A true model's first result and memory are measured in processes of their own."""
    found = startup.measure_startup("prefill-256", EAGER, 1)
    assert found.failure == ""
    assert 0 < found.cold_s < 60
    assert found.call_peak_bytes > 50 * 2**20


STEPS = [("norm", "kernel", 10.0), ("mm", "extern", 60.0), ("norm", "kernel", 20.0), ("", "gap", 10.0)]


def shown(*renderables: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(*renderables)
    return capture.get()


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_profile_per_kind() -> None:
    """Times are summed per kind, longest first, with their share of the whole."""
    assert cells(shown(profile.kinds_table(STEPS))) == [
        ["extern", "1", "60.0", "60.0%"],
        ["kernel", "2", "30.0", "30.0%"],
        ["gap", "1", "10.0", "10.0%"],
        ["all", "4", "100.0", "100.0%"],
    ]


def test_profile_per_step() -> None:
    """Steps of one name are one line, and the title says how many lines are left out."""
    text = shown(profile.steps_table(STEPS, lines=2))
    assert "1 shorter ones left out" in text
    assert cells(text) == [["mm", "extern", "1", "60.0", "60.0%"], ["norm", "kernel", "2", "30.0", "30.0%"]]
    assert cells(shown(profile.kinds_table([]))) == [["all", "0", "0.0", "0.0%"]]


# -- reports -----------------------------------------------------------------------------------------------------------


def make_result(ratio: float | None, **changes: Any) -> Result:
    timings = {name: Timing(ms, ms, 3, 0, 2e-6, 1.0) for name, ms in ((OURS, 10.0), (EAGER, 15.0), ("onnx-23", 1234.0))}
    result = Result("row-1", 1, bar=1.2, timings=timings, best=EAGER, ratio=ratio, ratio_p20=ratio)
    return dataclasses.replace(result, **changes)


def test_table_marks_what_is_below_the_bar() -> None:
    """The asterisk stands at ratios below the bar only, and other numbers of threads have tables of their own."""
    results = [make_result(1.19), make_result(1.2, row="row-2"), make_result(2.0, threads=2)]
    below, above = cells(shown(report.to_table(results, list(make_result(1).timings), 1)))
    assert below == ["row-1", "10", "15", "1234", "1.19 *", "1.19", "1.2", "2e-06"]
    assert above == ["row-2", "10", "15", "1234", "1.20", "1.20", "1.2", "2e-06"]


def test_page_and_missing_numbers() -> None:
    """The page names the machine, has the best competitor in bold, a dash for what is missing, and each reason once."""
    missing = {"compile": "NoCompilerError: no | compiler"}
    results = [make_result(1.5, failures=missing), make_result(1.5, row="row-2", failures=missing)]
    started = [startup.Startup("row-1", OURS, 1, 2.5, 0.5, 3 * 2**20, 2**20), startup.Startup("row-1", "x", 1, failure="no")]
    page = report.to_markdown(results, [OURS, EAGER, "compile"], [1], started, "graphwright bench models")
    assert page.startswith("# ")
    assert "| row-1 | 10 | **15** | - | 1.50 | 1.50 | 1.2 | 2e-06 |" in page
    assert page.count("no | compiler") == 1
    assert "- compile (row-1, row-2): NoCompilerError" in page
    assert "| row-1 | graphwright | 2.5 | 0.5 | 3 | 1 |" in page
    assert "| row-1 | x | no |  |  |  |" in page


def test_plot(tmp_path: Path) -> None:
    """The picture is written, also where a row has no numbers."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    report.plot([make_result(1.5), Result("row-2", 2, bar=1.0)], [OURS, EAGER, "compile"], path)
    assert "<svg" in path.read_text()


# -- command line ------------------------------------------------------------------------------------------------------


def test_command_prints_and_writes(tiny: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a row, and writes results with the machine's description and the command that made them."""
    data, page = tmp_path / "results.json", tmp_path / "page.md"
    argv = ["bench", "models", "--rival", OURS, "--rival", EAGER, "--threads", "1", "--repeat", "2", "--quick", "--ragged"]
    assert cli.main([*argv, "--json", str(data), "--markdown", str(page)]) == 0
    captured = capsys.readouterr()
    assert "tiny" in captured.out
    assert "long" not in captured.out
    assert "tiny, 1 thread: round 2 of 2" in captured.err
    written = json.loads(data.read_text())
    assert written["machine"]["cpu"]
    assert set(written["machine"]["packages"]) >= {"torch", "transformers", "onnxruntime"}
    (result,) = written["results"]
    assert result["best"] == EAGER
    assert result["ratio"] > 0
    command = "graphwright bench models --rival graphwright --rival eager --threads 1 --repeat 2 --ragged --quick"
    assert f"`{command}`" in page.read_text()
    assert written["command"] == command


def test_a_competitor_that_is_missing_is_a_dash(
    tiny: Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without onnxruntime there is a dash and the reason below the table, and the run is a success."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    argv = ["--row", "tiny", "--threads", "1", "--repeat", "1", "--rival", "graphwright", "--rival", "onnx-23"]
    assert cli.main(["bench", "models", *argv]) == 0
    out = capsys.readouterr().out
    (row,) = cells(out)
    assert row[2:5] == ["-", "-", "-"]
    assert "onnx-23 (tiny): ModuleNotFoundError" in out


def test_a_model_that_is_missing_fails_its_row(
    tiny: Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a row's model is not installed the remedy is shown, the other rows are measured, and the exit code is 1."""

    def load() -> Any:
        raise InputError("the model is not here: pip install it")

    monkeypatch.setitem(ROWS, "tiny", dataclasses.replace(tiny, load=load))
    assert cli.main(["bench", "models", "--threads", "1", "--repeat", "1", "--rival", "eager", "--rival", "graphwright"]) == 1
    out = capsys.readouterr().out
    assert "graphwright (tiny): InputError: the model is not here: pip install it" in out
    missing, measured = cells(out)
    assert missing[1:3] == ["-", "-"]
    assert "-" not in measured


def test_our_failure_is_the_exit_code(tiny: Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where our result is wrong the exit code is 1, and the competitors are measured all the same."""
    monkeypatch.setitem(RIVALS, OURS, constant(7.0))
    argv = ["--row", "tiny", "--threads", "1", "--repeat", "1", "--rival", "graphwright", "--rival", "eager", "--profile"]
    assert cli.main(["bench", "models", *argv]) == 1
    out = capsys.readouterr().out
    assert "graphwright (tiny): WrongResultError: differs from eager" in out
    assert cells(out)[0][2] != "-"


def test_profile_and_startup_are_shown(
    tiny: Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`--profile` shows our steps, `--startup` the times and memory of the rivals that compile."""
    monkeypatch.setattr(startup, "measure_startup", lambda *what: startup.Startup(*what, cold_s=12.5))
    data = tmp_path / "results.json"
    argv = [
        "--row",
        "tiny",
        "--threads",
        "1",
        "--repeat",
        "1",
        "--rival",
        "graphwright",
        "--rival",
        "onnx-20",
        "--json",
        str(data),
    ]
    monkeypatch.setitem(RIVALS, "onnx-20", RIVALS[EAGER])
    assert cli.main(["bench", "models", *argv, "--json", str(data), "--profile", "--startup"]) == 0
    out = capsys.readouterr().out
    assert "matmul" in out
    assert "between steps" in out
    assert "12.5" in out
    assert [s["rival"] for s in json.loads(data.read_text())["startups"]] == [OURS]


def test_the_command_runs_itself_with_passive_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where OpenMP's threads would spin, the same command runs in a fresh process, whose exit code is passed on."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    seen = []

    def run(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        seen.append((command, env))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert cli.main(["bench", "models", "--row", "tiny", "--threads=2"]) == 3
    ((command, env),) = seen
    assert command[1:] == ["-m", "graphwright.tools.cli", "bench", "models", "--row", "tiny", "--threads=2"]
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--row", "tinny"], "there is no row 'tinny'. Did you mean 'tiny'?"),
        (["--rival", "egaer"], "there is no rival 'egaer'. Did you mean 'eager'?"),
        (["--threads", "two"], "expected numbers of threads"),
        (["--repeat", "0"], "--repeat"),
        (["--plot", "picture.xyz"], "'picture.xyz' should end with one of"),
    ],
)
def test_wrong_options(tiny: Row, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that makes no sense is refused with exit code 2, and the nearest name suggested."""
    assert cli.main(["bench", "models", *argv]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_lists_both_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    """`graphwright bench --help` shows the commands, though one of them may be left out."""
    assert cli.main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "kernels" in out
    assert "models" in out
