"""Windows of keys in ONNX models: blocks of queries that give what the mask over all keys gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.codegen.onnx import windows
from graphwright.codegen.onnx.windows import Window, find_windows, long_sizes
from graphwright.comparing_onnx import not_compared
from graphwright.ir import dialect
from graphwright.ir.program import Program, replace

aten = torch.ops.aten
HEADS, KEY_HEADS, WIDTH = 4, 2, 8
BACK = "q - k >= 0 & k - q + 6 >= 0"
SINKS = "q - k >= 0 & (-k + 2 >= 0 | k - q + 4 >= 0)"


class Zoo(nn.Module):
    """A module whose multiplication marks the place of an attention."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
        return {"out": q * 2.0, "rest": k.sum() + v.sum() + mask.sum()}


def program_of(*, keys: str = "tokens", sink: bool = False, **options: Any) -> Program:
    """Return a program of one attention over q, k, v and a mask; an attention over itself unless `keys` says otherwise."""
    count = 7 if keys == "tokens" else 9
    q, k = torch.randn(2, HEADS, 7, WIDTH), torch.randn(2, KEY_HEADS, count, WIDTH)
    dynamic = {"q": {0: "batch", 2: "tokens"}, **{name: {0: "batch", 2: keys} for name in "kv"}, "mask": {0: "batch", 1: keys}}
    made = graphwright.capture(Zoo(), q, k, k, torch.ones(2, count, dtype=torch.long), dynamic=dynamic, check=False)
    node = next(node for node in made.graph.nodes if node.target is aten.mul.Tensor)
    q, k, v, mask = made.inputs
    with made.graph.inserting_before(node):
        last = made.weight("sink", torch.randn(HEADS)) if sink else None
        replace(node, made.call(dialect.attention, q, k, v, [mask], last, **{"scale": 0.3, **options}))
    made.drop_unused()
    return made


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"predicate": BACK}, Window(6, 0, 0)),
        ({"predicate": "k - q + 4 >= 0 & q - k + 3 >= 0"}, Window(4, 3, 0)),
        ({"predicate": SINKS}, Window(4, 0, 3)),
        ({"predicate": "q - k >= 0 & q // 8 == k // 8"}, Window(7, 0, 0)),
        ({"predicate": f"not (in0[b, k] == 0) & {BACK}"}, Window(6, 0, 0)),
        ({"predicate": "q - k >= 0"}, None),
        ({"predicate": "q - k + 3 >= 0"}, None),
        ({"predicate": BACK, "keys": "others"}, None),
        ({"predicate": f"sum(j <= k, in0[b, j]) >= 1 & {BACK}"}, None),
        ({}, None),
    ],
)
def test_windows_are_found(options: dict[str, Any], expected: Window | None) -> None:
    """A bound on both sides makes a window; one side, other keys than the sequence's own, and sums over keys make none."""
    found = list(find_windows(program_of(**options)).values())
    assert found == ([expected] if expected else [])


def test_a_window_as_wide_as_the_longest_sequence_is_none() -> None:
    """Where no sequence can be longer than twice the window, there are no blocks."""
    program = program_of(predicate=BACK)
    sizes = long_sizes(program)
    assert sizes["tokens"] > Window(6, 0, 0).short + Window(6, 0, 0).block
    program.dimensions["tokens"] = dataclasses.replace(program.dimensions["tokens"], high=14)
    assert not find_windows(program)
    assert not long_sizes(program)


def test_a_window_too_long_to_be_compared_is_named() -> None:
    """Comparing several blocks of a wide window would take minutes: what is not compared is said."""
    assert not not_compared(program_of(predicate=BACK))
    wide = program_of(predicate="q - k >= 0 & k - q + 1500 >= 0")
    assert "in several blocks is not compared: that takes 4505 tokens, and 2048 are the most" in not_compared(wide)


def check(program: Program, path: Path) -> None:
    """Compare the program's file with the program at lengths around those where something changes."""
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    report = graphwright.export_onnx(program, path)
    assert report.operators["Attention"] == 1
    assert "Gather" in report.operators
    assert report.trials[-1].sizes["tokens"] > 40
    session = onnxruntime.InferenceSession(path)
    for tokens in (1, 2, 14, 15, 16, 17, 28, 29, 31, 32, 33, 48, 63, 64, 200):
        q = torch.randn(2, HEADS, tokens, WIDTH)
        k, v = (torch.randn(2, KEY_HEADS, tokens, WIDTH) for _ in "kv")
        mask = torch.ones(2, tokens, dtype=torch.long)
        mask[1, tokens // 2 : tokens - 1] = 0
        found = session.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "mask": mask.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), program.module()(q, k, v, mask)[0], rtol=1e-4, atol=1e-5)


def test_blocks_give_what_the_mask_gives(tmp_path: Path) -> None:
    """First keys, padding, a bias, a cap and a sink at once, at lengths of less than a block, of whole blocks and between."""
    predicate = f"not (in0[b, k] == 0) & {SINKS}"
    made = program_of(predicate=predicate, bias="float(k - q) * 0.125", softcap=2.0, sink=True)
    check(made, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("predicate", [BACK, "k - q + 4 >= 0 & q - k + 3 >= 0", SINKS, "q // 8 == k // 8"])
def test_every_kind_of_window(predicate: str, tmp_path: Path) -> None:
    """Windows backwards and both ways, first keys, and chunks."""
    check(program_of(predicate=predicate), tmp_path / "model.onnx")


@pytest.mark.slow
def test_time_falls_with_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2048 tokens a window of 32 takes less than half the time of the mask over all keys; at 64 tokens not twice."""
    import time

    onnxruntime: Any = pytest.importorskip("onnxruntime")
    program = program_of(predicate="q - k >= 0 & k - q + 31 >= 0")
    graphwright.export_onnx(program, tmp_path / "blocks.onnx", check=False)
    monkeypatch.setattr(windows, "SHORT", 10**9)
    program.dimensions["tokens"] = dataclasses.replace(program.dimensions["tokens"], high=4096)
    graphwright.export_onnx(program, tmp_path / "full.onnx", check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", options) for name in ("blocks", "full")]
    for tokens, limit in ((2048, 0.5), (64, 2.0)):
        q = torch.randn(1, HEADS, tokens, WIDTH).numpy()
        k = torch.randn(1, KEY_HEADS, tokens, WIDTH).numpy()
        given = {"q": q, "k": k, "v": k, "mask": torch.ones(1, tokens, dtype=torch.long).numpy()}
        times: list[list[float]] = [[], []]
        for _ in range(9):
            for session, found in zip(sessions, times, strict=True):
                started = time.thread_time()
                session.run(None, given)
                found.append(time.thread_time() - started)
        assert sorted(times[0])[4] < limit * sorted(times[1])[4]
