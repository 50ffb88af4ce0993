"""Merging tokens in ONNX: the written form is the reference, and onnxruntime computes it at any number of tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import graphwright
from graphwright.codegen.onnx.merge import LOWERINGS
from graphwright.ir import dialect
from graphwright.pipeline import DEFAULT_PASSES, run_passes


@pytest.mark.parametrize("protect", [0, 1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 17, 64])
def test_the_written_form_is_the_reference(tokens, protect) -> None:
    """Scores, partners and ranks are the reference's, for padding, equal tokens and protected ones too."""
    metric, size = functional.normalize(torch.randn(3, tokens, 5), dim=-1), torch.randint(0, 3, (3, tokens)).float()
    metric[:, tokens // 2 :] = metric[:, :1]
    size[0] = 0
    expected = dialect.merge_match(metric, size, protect)
    score, partner = LOWERINGS[dialect.merge_match](metric, size, protect)
    torch.testing.assert_close(score, expected[0], rtol=0, atol=1e-6)
    assert torch.equal(partner, expected[1])
    distinct = torch.randperm(3 * tokens).reshape(3, tokens).float()
    assert torch.equal(LOWERINGS[dialect.merge_rank](distinct), dialect.merge_rank(distinct))


@pytest.mark.parametrize("name", [pytest.param("bert", marks=pytest.mark.slow), "vit"])
def test_onnxruntime_merges(name, built, families, tmp_path) -> None:
    """A model that merges gives in onnxruntime what the program computes, at one token and at many, with padding or not."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "merged.onnx"
    sample = families[name].sample
    options = "merge-tokens:r=4" if name == "vit" else "merge-tokens:ratio=0.6,metric=tokens,protect=1"
    report = graphwright.export_onnx(built(name), path, passes=[options], **sample(2, 19, 0))
    assert len(report.trials) == 3
    assert report.operators["ScatterElements"]
    assert report.operators["TopK"]
    if name == "vit":
        return
    program = run_passes(graphwright.capture(built(name), check=False, **sample(2, 19, 0)), [*DEFAULT_PASSES, options])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, tokens in ((1, 2), (2, 5), (3, 50)):
        given = sample(batch, tokens, 7)
        (expected,) = dict(program.reference(**given)).values()
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        assert (torch.from_numpy(found) - expected).norm() <= 1e-5 * expected.norm()
