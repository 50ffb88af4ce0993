"""Exporting decoders to ONNX with past keys and values: what a loop around onnxruntime generates."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphwright
from graphwright import exporting_cached
from graphwright.ir.errors import ExportError, OptionError, PassError

onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DECODERS = ("llama", "gpt2", "qwen3", "mistral", "gemma3", "phi3", "opt", "llama-mask")
QUICK = ("llama",)
NEW = 12


def greedy(path: Path, ids: torch.Tensor, mask: torch.Tensor, count: int, *, first: int = 0) -> torch.Tensor:
    """Return the tokens that a loop around onnxruntime adds, [batch, count]; `first` tokens of the prompt go in alone."""
    session = onnxruntime.InferenceSession(path)
    given = session.get_inputs()
    past = {i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32) for i in given if "past" in i.name}
    parts = [ids[:, :first], ids[:, first:]] if first else [ids]
    seen, found = 0, []
    for step in range(count + len(parts) - 1):
        tokens = parts[step] if step < len(parts) else found[-1]
        seen += tokens.shape[1]
        mask = torch.cat((mask, torch.ones(len(ids), max(seen - mask.shape[1], 0), dtype=torch.long)), 1)
        feeds = {"input_ids": tokens.numpy(), "attention_mask": mask[:, :seen].numpy(), **past}
        logits, *present = session.run(None, feeds)
        past = dict(zip(past, present, strict=True))
        if step >= len(parts) - 1:
            found.append(torch.from_numpy(logits[:, -1:].argmax(-1)))
    return torch.cat(found, 1)


def alone(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what transformers adds to each prompt without its padding."""
    rows = [row[there.bool()][None] for row, there in zip(ids, mask, strict=True)]
    options = {"max_new_tokens": NEW, "do_sample": False}
    return torch.cat([model.generate(row, attention_mask=torch.ones_like(row), **options)[:, -NEW:] for row in rows])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in DECODERS])
def test_a_loop_generates_what_transformers_does(name: str, built: Any, families: Any, tmp_path: Path) -> None:
    """Ragged prompts, padded on the left or on the right, at once and in two parts; names are those that loaders look for."""
    path = tmp_path / "model.onnx"
    report = graphwright.export_onnx(built(name), path, **families[name].sample(2, 7, 0), generate=True)
    heads = 4 if name in ("gpt2", "opt") else 2
    cache = ("batch", heads, "past", 8)
    assert list(report.inputs) == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")),
    ]
    assert report.inputs["attention_mask"] == ("batch", "past + tokens")
    assert report.inputs["past_key_values.1.value"] == cache
    assert report.outputs["logits"] == ("batch", "tokens", 97)
    assert report.outputs["present.0.key"] == ("batch", heads, "past + tokens", 8)
    assert [trial.sizes["past"] for trial in report.trials] == [5, 0, 63]
    assert report.operators["Attention"] == 2
    # Attention itself puts past and new keys together: no other operator copies caches.
    assert report.operators.get("Transpose", 0) <= 1
    ids = families[name].sample(3, 9, 5)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = alone(built(name), ids, mask)
    assert torch.equal(greedy(path, ids, mask, NEW), expected)
    assert torch.equal(greedy(path, ids, mask, NEW, first=6), expected)
    assert len(set(expected.flatten().tolist())) > 1


@pytest.fixture(scope="module")
def plain(captured: Any) -> Any:
    """A small decoder's program after the passes that every export runs."""
    from graphwright.exporting_onnx import EXPORT_PASSES
    from graphwright.pipeline import run_passes

    return run_passes(captured("llama"), EXPORT_PASSES)


def test_right_padding_counts_for_nothing_either(plain: Any) -> None:
    """A token's position is the number of tokens before it, so that gaps in the mask change nothing for what follows."""
    from graphwright.passes.base import Context

    made = exporting_cached.with_caches(plain, [], Context())
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    empty = torch.zeros(2, 2, 0, 8)
    module = made.module()
    _, *present = module(ids, mask, *[empty] * 4)
    new = torch.tensor([[5], [6]])
    found = module(new, torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1), *present)[0]
    whole = torch.cat((ids[0, :4], new[0]))[None]
    expected = plain.module()(whole)[0]
    torch.testing.assert_close(found[0, 0], expected[0, -1], rtol=1e-5, atol=1e-5)


def test_a_wrong_rewriting_is_noticed(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for ONNX that computes something else than the one with caches is not handed out."""
    from graphwright.codegen.onnx import past_inputs
    from graphwright.passes.base import Context

    monkeypatch.setattr(past_inputs, "HIDDEN", 0)
    with pytest.raises(ExportError, match="computes something else: sequence 1"):
        exporting_cached.with_caches(plain, [], Context())


def test_what_cannot_generate_is_refused(captured: Any, plain: Any, tmp_path: Path) -> None:
    """An encoder has no form that continues sequences, and a pass for caches needs them."""
    from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Stage

    class Caches(Pass):
        name, fidelity, stage = "caches", Fidelity.EXACT, Stage.DECODE

        def plan(self, program: Any, context: Context) -> Plan:
            return Plan(self.name, (Decision("output", "keep a state of its own", ""),), ())

        def apply(self, program: Any, plan: Plan) -> Any:
            result = program.copy()
            specs = list(result.signature.tensors)
            named = next(at for at, spec in enumerate(specs) if "cache" in spec.name)
            specs[named] = dataclasses.replace(specs[named], name="codes_0")
            result.signature = dataclasses.replace(result.signature, tensors=tuple(specs))
            return result

    with pytest.raises(PassError, match=r"cannot be run token by token: .*no attention"):
        graphwright.export_onnx(captured("bert"), tmp_path / "m.onnx", generate=True)
    with pytest.raises(OptionError, match=r"caches: .*only with generate=True"):
        graphwright.export_onnx(plain, tmp_path / "m.onnx", passes=[Caches()])
    with pytest.raises(ExportError, match="keeps codes_0, which has no form in ONNX"):
        graphwright.export_onnx(plain, tmp_path / "m.onnx", passes=[Caches()], generate=True)
    with pytest.raises(ExportError, match="takes last, which a file with past keys and values has no input for"):
        exporting_cached.with_caches(plain, ["last-token"], Context())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_language_model(tmp_path: Path) -> None:
    """Trained weights: a loop generates what transformers does, and 8 bits leave nearly all predictions as they are."""
    from graphwright.tools.reference import held_out_ids, load_language_model

    model, ids = load_language_model().eval(), held_out_ids(1200).reshape(1, -1)
    sample = {"input_ids": ids[:, :33]}
    graphwright.export_onnx(model, tmp_path / "exact.onnx", **sample, generate=True)
    prompts = torch.cat([ids[:, start : start + 24] for start in (100, 400, 700)])
    mask = torch.ones_like(prompts)
    mask[0, :9] = 0
    assert torch.equal(greedy(tmp_path / "exact.onnx", prompts, mask, NEW), alone(model, prompts, mask))
    calls = [{"input_ids": ids[:, 200:712]}]
    options = {"generate": True, "passes": ["quantize-cache:bits=8"], "calibration": calls}
    report = graphwright.export_onnx(model, tmp_path / "codes.onnx", **sample, **options)
    (note,) = [note for note in report.notes if "are kept in 8, 8" in note]
    found = re.search(r"change by (\S+) nats per token, (\S+)% of", note)
    assert found is not None
    assert float(found[1]) < 1e-3
    assert float(found[2]) > 98
