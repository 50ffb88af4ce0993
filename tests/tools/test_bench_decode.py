"""The benchmark of decoding: tokens are checked, times are told apart, and the tables say what was measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graphwright.tools import cli, reference
from graphwright.tools.bench.decode import case, measure, report, rivals
from graphwright.tools.bench.decode.case import Case, Decoded, looped, streamed
from graphwright.tools.bench.decode.rivals import GENERATE, OURS, RIVALS

NEW = 5


@pytest.fixture
def model(built, monkeypatch: pytest.MonkeyPatch):
    """A small Llama in place of the language model, and random tokens in place of text."""
    monkeypatch.setattr(reference, "load_language_model", lambda: built("llama"))
    monkeypatch.setattr(reference, "held_out_ids", lambda n: torch.randint(3, 97, (n,), generator=torch.manual_seed(0)))
    # What the command would otherwise run itself again for.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return built("llama")


def case_of(model, batch: int = 2, context: int = 20) -> Case:
    return Case(model, case.prompts_of(model, batch, context, NEW), NEW, 1)


def after(seconds: float, tokens: Callable[[Case], torch.Tensor]) -> Callable[[Case], case.Run]:
    """Return a rival whose steps take so long."""

    def build(given: Case) -> case.Run:
        answer = tokens(given)
        return lambda: Decoded(answer, 2 * seconds, (NEW - 1) * seconds)

    return build


def right(given: Case) -> torch.Tensor:
    return RIVALS[GENERATE](given)().tokens


def test_prompts_leave_room_for_their_answers(model) -> None:
    """A context is a prompt and its answer; one that the model has no positions for is refused with both numbers."""
    assert case.prompts_of(model, 3, 20, NEW).shape == (3, 15)
    for context in (NEW, 257):
        with pytest.raises(case.InputError, match=f"at most the model's 256 positions; got {context}"):
            case.prompts_of(model, 1, context, NEW)


@pytest.mark.parametrize("name", [OURS, "static"])
def test_rivals_give_the_tokens_of_transformers(model, name) -> None:
    """Several prompts; both parts of the time are there, and a second run gives the same."""
    given = case_of(model)
    run, expected = RIVALS[name](given), RIVALS[GENERATE](given)()
    assert expected.tokens.shape == (2, NEW)
    for _ in range(2):
        found = run()
        assert torch.equal(found.tokens, expected.tokens)
        assert found.first_s > 0
        assert found.rest_s > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "onnx"])
def test_compilers_give_the_tokens_of_transformers(model, name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches of a run start empty again in the next."""
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = case_of(model)
    run = RIVALS[name](given)
    for _ in range(2):
        assert torch.equal(run().tokens, right(given))


def test_the_first_token_is_timed_apart(model) -> None:
    """What comes until then is the prompt's; the rest is from there to the last token."""
    given = Case(model, torch.zeros(1, 3, dtype=torch.int64), 3, 2)

    def pause(seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        return torch.zeros(1, 1, dtype=torch.int64)

    def generate(tell: Callable[[], None]) -> torch.Tensor:
        for seconds in (0.1, 0.01, 0.01):
            pause(seconds)
            tell()
        return torch.zeros(1, 6, dtype=torch.int64)

    for run in (looped(given, lambda: pause(0.1), lambda tokens: pause(0.01)), streamed(given, generate)):
        found = run()
        assert found.tokens.shape == (1, 3)
        assert found.first_s >= 0.1
        assert 0.02 <= found.rest_s < 0.1


def test_a_slower_rival_gives_a_higher_ratio(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best competitor counts; the numbers are those of its steps."""
    for name, seconds in ((OURS, 0.002), ("slow", 0.02), ("slower", 0.04)):
        monkeypatch.setitem(RIVALS, name, after(seconds, right))
    result = measure.measure(model, 2, 20, NEW, 1, [OURS, "slower", "slow"], 3, tell=lambda text: None)
    assert result.best == "slow"
    assert result.ratio == pytest.approx(10)
    assert result.timings[OURS].tokens_per_s == pytest.approx(1000)
    assert result.timings["slow"].first_ms == pytest.approx(40)
    assert result.bar is None
    assert measure.measure(model, 1, 20, NEW, 1, [OURS], 1, tell=lambda text: None).bar == measure.BAR


def test_wrong_tokens_are_not_timed(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that differs is named, and the others are still measured."""

    def wrong(given: Case) -> torch.Tensor:
        tokens = right(given).clone()
        tokens[1, 3:] += 1
        return tokens

    monkeypatch.setitem(RIVALS, OURS, after(0.001, wrong))
    monkeypatch.setitem(RIVALS, "short", after(0.001, lambda given: right(given)[:, 1:]))
    result = measure.measure(model, 2, 20, NEW, 1, [OURS, "short", GENERATE], 1, tell=lambda text: None)
    assert "token 3 of sequence 1 is" in result.failures[OURS]
    assert "tokens [2, 4], those of transformers are [2, 5]" in result.failures["short"]
    assert list(result.timings) == [GENERATE]
    assert result.ratio is None


def test_the_command_writes_what_it_shows(
    model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cases that cannot be are dashes with the reason; the command in the page would measure the same."""
    monkeypatch.setitem(RIVALS, OURS, after(0.001, right))
    data, page = tmp_path / "r.json", tmp_path / "r.md"
    words = ["--batch", "2", "--context", "20,300", "--threads", "1", "--repeat", "2", "--new", "5"]
    argv = ["--rival", OURS, "--rival", GENERATE, *words]
    assert cli.main(["bench", "decode", *argv, "--json", str(data), "--markdown", str(page)]) == 1
    out = capsys.readouterr().out
    assert "2 x 20" in out
    assert "graphwright (2 x 300, 1 thread): InputError" in out
    written = json.loads(data.read_text())
    assert [(r["batch"], r["context"], sorted(r["timings"])) for r in written["results"]] == [
        (2, 20, [GENERATE, OURS]),
        (2, 300, []),
    ]
    assert written["command"] == "graphwright bench decode --rival graphwright --rival generate " + " ".join(words)
    text = page.read_text()
    assert f"`{written['command']}`" in text
    assert "| 2 x 300 | - | - | - | - |  |" in text
    assert cli.main(["bench", "decode", *argv[:-2], "--new", "5", "--context", "20"]) == 0


def test_a_page_marks_what_is_below_its_bar() -> None:
    """The best competitor is bold, and a ratio below the bar has an asterisk."""
    timing = measure.Timing(100.0, 10.0, 9.0, 1234.5, 3, 0)
    result = measure.Result(1, 512, 32, 2, 3.0, {OURS: timing, "onnx": timing}, {}, "onnx", 1.0, 1.0)
    text = report.to_markdown([result], [OURS, "onnx"], [2], "command")
    assert "| 1 x 512 | 100 | **100** | 1.00 * | 1.00 | 3 |" in text
    assert "| 1 x 512 | 1234 | 1234 |" in text
    result.ratio = 3.5
    assert "| 3.50 |" in report.to_markdown([result], [OURS, "onnx"], [2], "command")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rival", "onxx"], "there is no rival 'onxx'. Did you mean 'onnx'?"),
        (["--batch", "1,two"], "expected numbers such as 1,8"),
        (["--context", "0"], "expected numbers such as 1,8"),
        (["--new", "1"], "--new"),
    ],
)
def test_wrong_options(model, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that makes no sense is refused with exit code 2."""
    assert cli.main(["bench", "decode", *argv]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_argument_for_a_cache_is_found_by_name(model) -> None:
    """Versions of transformers call it differently."""

    class Older(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None):
            return input_ids

    assert rivals.cache_parameter(Older()) == "past_key_values"
    assert rivals.cache_parameter(model) in ("cache", "past_key_values")
