"""Caches of ONNX models in few bits: what they cost, what onnxruntime makes of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphwright
from graphwright import exporting_cached, static_caches
from graphwright.exporting_onnx import EXPORT_PASSES
from graphwright.ir import dialect
from graphwright.ir.errors import ExportError, OptionError
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context
from graphwright.pipeline import run_passes

onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def plain(captured: Any) -> Program:
    """A small decoder after the passes that every export runs."""
    return run_passes(captured("llama"), EXPORT_PASSES)


@pytest.fixture(scope="module")
def samples(families: Any) -> list[dict[str, Any]]:
    """Sample calls, one of them with padding."""
    ids, mask = families["llama"].sample(2, 30, 3)["input_ids"], torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    return [{"input_ids": ids}, {"input_ids": ids.flip(1), "attention_mask": mask}]


def test_fewer_bits_cost_more_and_the_model_s_own_cost_nothing(plain: Program, samples: Any) -> None:
    """16 bits leave the program as it is; 8 bits change predictions less than 4, and one layer of 4 less than both."""
    exact = exporting_cached.with_caches(plain, [], Context())
    given = [(sample["input_ids"], torch.ones(2, 30, dtype=torch.long)) for sample in samples]

    def error(bits: str) -> Any:
        made = exporting_cached.with_caches(plain, [f"quantize-cache:bits={bits}"], Context(tuple(samples)), check=False)
        return static_caches.compare_caches(exact, made, given)

    none, eight, mixed, four = (error(bits) for bits in ("16", "8", "16+4", "4"))
    assert (none.relative, none.divergence, none.agreement) == (0.0, 0.0, 1.0)
    assert 0 < eight.divergence < mixed.divergence < four.divergence
    assert eight.agreement > 0.95
    assert eight.relative < 0.05


def test_padding_of_the_calibration_counts_for_nothing(plain: Program, samples: Any) -> None:
    """Scales do not depend on what stands where the mask has 0."""
    changed = {**samples[1], "input_ids": torch.where(samples[1]["attention_mask"] == 0, 5, samples[1]["input_ids"])}
    found = [
        exporting_cached.with_caches(plain, ["quantize-cache:bits=8"], Context((sample,)), check=False).weights
        for sample in (samples[1], changed)
    ]
    names = [name for name in found[0] if name.endswith("_scale")]
    assert len(names) == 4
    for name in names:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_onnxruntime_reads_the_codes(plain: Program, samples: Any, bits: int, tmp_path: Path) -> None:
    """A window, a cap and a bias beside the codes; a loop step by step gives the scores of one call over all tokens."""
    from graphwright.codegen.onnx.past_inputs import with_past_inputs

    made = with_past_inputs(run_passes(plain, ["cached-decode"]))
    for node in calls(made.graph, dialect.attention):
        text = f"{node.kwargs['predicate']} & in1[b, k] - in0[b, q] + 3 >= 0"
        node.kwargs = {**node.kwargs, "predicate": text, "bias": "float(in1[b, k] - in0[b, q]) * 0.125", "softcap": 2.0}
    made = static_caches.quantised(made, {0: bits, 1: bits}, samples)
    path = tmp_path / "model.onnx"
    report = graphwright.export_onnx(made, path)
    assert report.operators["GroupQueryAttention"] == 2
    assert "Attention" not in report.operators
    assert [trial.sizes["past"] for trial in report.trials] == [5, 0, 63, 9]
    assert max(trial.error for trial in report.trials) < 1e-5
    assert report.inputs["past_key_values.0.key"] == ("batch", 2, "past", bits)
    assert any("keys and values are kept in" in note for note in report.notes)
    ids, mask = samples[1]["input_ids"], samples[1]["attention_mask"]
    session = onnxruntime.InferenceSession(path)
    dtype = np.int8 if bits == 8 else np.uint8
    past = {i.name: np.zeros((2, 2, 0, bits), dtype) for i in session.get_inputs() if "past" in i.name}
    rows = []
    for start, end in ((0, 9), *((at, at + 1) for at in range(9, 16))):
        feeds = {"input_ids": ids[:, start:end].numpy(), "attention_mask": mask[:, :end].numpy(), **past}
        scores, *present = session.run(None, feeds)
        past = dict(zip(past, present, strict=True))
        rows.append(torch.from_numpy(scores))
    empty = [torch.zeros(2, 2, 0, bits, dtype=torch.int8 if bits == 8 else torch.uint8)] * 4
    expected = made.module()(ids[:, :16], mask[:, :16], *empty)[0]
    there = mask[:, :16].bool()
    torch.testing.assert_close(torch.cat(rows, 1)[there], expected[there], rtol=1e-3, atol=1e-3)


def test_what_has_no_form_is_refused(plain: Program, samples: Any) -> None:
    """2 bits, no sample calls, and values that are not finite are refused, each with its reason."""
    with pytest.raises(ExportError, match=r"layer 0: caches in 2 bits have no form in ONNX: 8 and 4 bits have one"):
        exporting_cached.with_caches(plain, ["quantize-cache:bits=2"], Context(tuple(samples)), check=False)
    with pytest.raises(OptionError, match="found on sample calls, and there are none"):
        exporting_cached.with_caches(plain, ["quantize-cache:bits=8"], Context(), check=False)
    with pytest.raises(OptionError, match="calibration call 0 has no input_ids"):
        exporting_cached.with_caches(plain, ["quantize-cache:bits=8"], Context(({"pixels": 3},)), check=False)
    made = exporting_cached.with_caches(plain, [], Context(), check=False)
    name = next(name for name in made.weights if name.endswith("0.self_attn.v_proj.weight"))
    made.weights[name] = made.weights[name] / 0
    with pytest.raises(ExportError, match="layer 0: values of the calibration are not finite"):
        static_caches.quantised(made, {0: 8}, samples)
