"""The demo: a quick run of it, what it prints, and that it notices a wrong model."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
import torch

from graphwright.tools import demo, demo_less, demo_run, sentences
from graphwright.tools.demo_outcome import Outcome


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps the demo from starting a process of its own, and few texts."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(demo_run, "QUICK_TEXTS", 40)


@pytest.fixture(scope="module")
def encoder() -> sentences.SentenceEncoder:
    return sentences.load_encoder()


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """A quick run's."""
    before = torch.get_num_threads()
    # Where tests run side by side, threads would wait for each other.
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo_run, "QUICK_TEXTS", 40)
            return demo_run.run(quick=True)
    finally:
        torch.set_num_threads(before)


def test_encoder_returns_what_sentence_transformers_does(encoder: sentences.SentenceEncoder) -> None:
    """Mean pooling leaves padding out: a text has the same embedding alone and in a batch, of length 1."""
    texts = ["Return the sum.", "A much longer text about compressing the files of an archive, one after the other."]
    (batch,) = sentences.batches(texts, size=2, max_tokens=256)
    with torch.inference_mode():
        together = encoder(**batch.inputs)
        alone = [encoder(**sentences.batches([texts[k]], size=1, max_tokens=256)[0].inputs)[0] for k in batch.rows]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))


def test_batches_hold_every_text_once_by_length() -> None:
    """Every text is in one batch, shorter texts come first, and long ones are cut."""
    made = sentences.batches(["one two three", "one", "word " * 50, "one two", "a b c d e"], size=2, max_tokens=16)
    assert sorted(k for batch in made for k in batch.rows) == [0, 1, 2, 3, 4]
    widths = [batch.inputs["input_ids"].shape[1] for batch in made]
    assert widths == sorted(widths)
    assert widths[-1] == 16
    for batch in made:
        assert batch.tokens == int(batch.inputs["attention_mask"].sum())
        assert bool((batch.inputs["input_ids"][batch.inputs["attention_mask"] == 0] == 0).all())


def test_quick_run_agrees(outcome: Outcome) -> None:
    """The compiled encoder embeds all texts as the original does, and finds the same."""
    assert outcome.docstrings == outcome.eager_docstrings == 40
    assert outcome.largest_difference < 1e-5
    assert 0.99999 < outcome.cosine_min <= outcome.cosine_mean < 1.00001
    assert outcome.kernels > 0
    assert outcome.steps["matmul"] == 24
    assert [latency.tokens for latency in outcome.latencies] == [32, 128]
    for answer in outcome.answers:
        assert answer.overlap == answer.compared == 10
        assert [hit.name for hit in answer.eager] == [hit.name for hit in answer.compiled]
        assert answer.eager[0].cosine >= answer.eager[1].cosine


def test_original_gets_a_sample_when_its_time_is_up(
    encoder: sentences.SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled model embeds everything all the same, and what both embedded is remembered."""
    monkeypatch.setattr(demo_run, "EAGER_BUDGET_S", 1e-9)
    batches = sentences.batches([f"number {k}" for k in range(6)], size=2, max_tokens=16)
    embedded = demo_run._Embedded(6)
    with torch.inference_mode():
        embedded.fill(encoder, encoder, batches, lambda text: None)
    assert len(embedded.by_both) == 2
    assert (len(embedded.eager_s), len(embedded.compiled_s)) == (1, 3)
    assert bool((embedded.compiled.norm(dim=-1) > 0.99).all())
    assert int((embedded.eager.norm(dim=-1) > 0.99).sum()) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells how resident memory grows")
def test_growth_is_what_a_call_fills() -> None:
    """Memory that is written counts while it is held, and not what is freed before."""
    torch.ones(64 << 20, dtype=torch.uint8)
    grown = demo_run.growth_bytes(lambda: torch.ones(32 << 20, dtype=torch.uint8))
    assert grown is not None
    assert 30 << 20 < grown < 48 << 20


def run_with(made: Outcome, monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    def run(**options: Any) -> Outcome:
        return made

    monkeypatch.setattr(demo_run, "run", run)
    monkeypatch.setattr(demo_less, "run", lambda **options: demo_less.Less([], [], "not here"))
    return demo.main(argv)


def test_main_shows_a_comparison(outcome: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The tables name both sides, the speeds, and every question."""
    assert run_with(outcome, monkeypatch, "--quick") == 0
    shown = capsys.readouterr().out
    assert shown.count("times as fast") == 3
    assert shown.count("10 of 10") == len(demo_run.QUERIES)
    assert "sample" not in shown


def test_main_prints_json(outcome: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json, standard output is one JSON object with the outcome and the machine."""
    assert run_with(outcome, monkeypatch, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["agree"] is True
    assert data["docstrings"] == 40
    assert "cpu" in data["machine"]


@pytest.mark.parametrize("change", [{"largest_difference": 0.1}, {"cosine_min": 0.9}, {"cosine_min": float("nan")}])
def test_main_fails_on_disagreement(
    change: dict[str, float], outcome: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Embeddings that differ are said, and the exit code is 1."""
    assert run_with(dataclasses.replace(outcome, **change), monkeypatch) == 1  # type: ignore[arg-type]
    assert "The embeddings differ" in capsys.readouterr().out


def test_main_says_that_it_compared_a_sample(
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the original embedded a part only, the output says of how many."""
    assert run_with(dataclasses.replace(outcome, eager_docstrings=32), monkeypatch) == 0
    assert "a sample of 32 docstrings" in capsys.readouterr().out


def test_environment_is_set_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment that it needs the demo runs itself in a process that has it, with the same arguments."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    ran: list[Any] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> Any:
        ran.append((command[1:], env["OMP_WAIT_POLICY"]))
        return type("Done", (), {"returncode": 7})

    monkeypatch.setattr(demo.subprocess, "run", run)
    assert demo.main(["--quick", "--json"]) == 7
    assert ran == [(["-m", "graphwright.tools.demo", "--quick", "--json"], "PASSIVE")]
