"""Every family of models is captured, and its program computes what the model does."""

from __future__ import annotations

import torch


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_of(item)] if isinstance(value, list | tuple) else []


def assert_equal(found, expected, tolerance):
    assert type(found) is type(expected)
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        gap = float((a.double() - b.double()).abs().max())
        assert gap <= tolerance * float(b.double().abs().max())


def test_programs_compute_what_the_model_does(family, families, built, captured):
    """The reference run of a captured family equals eager at the sample's sizes, at others, and at one token."""
    program, model, sample = captured(family), built(family), families[family].sample
    for batch, tokens in ((2, 7), (3, 21), (1, 1)):
        kwargs = sample(batch, tokens, tokens)
        with torch.no_grad():
            expected = model(**kwargs)
        assert_equal(program.reference(**kwargs), expected, 1e-5)
