"""The kernel demo: its attention against PyTorch's, and what it prints."""

from __future__ import annotations

import pytest
import torch

from graphwright.tools import demo_kernel as demo


@pytest.mark.parametrize("length", [1, 63, 64, 129])
def test_flash_attention_matches_pytorch(length: int) -> None:
    """The kernel agrees with PyTorch at lengths on, below and above its block size."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, length, 32, generator=generator)
    torch.testing.assert_close(demo.flash_attention(q, k, v), demo.reference(q, k, v), rtol=0, atol=demo.TOLERANCE)


def test_main_reports_agreement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the error and both times, and exits with 0."""
    monkeypatch.setattr(demo, "LENGTH", 100)
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert "within" in shown
    assert shown.count(" ms") == 2


def test_main_fails_on_disagreement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong result is said in the table and by exit code 1."""
    monkeypatch.setattr(demo, "LENGTH", 100)
    monkeypatch.setattr(demo, "flash_attention", lambda q, k, v: demo.reference(q, k, v) + 1)
    assert demo.main() == 1
    assert "OVER" in capsys.readouterr().out
