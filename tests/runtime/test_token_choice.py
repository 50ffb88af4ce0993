"""Choosing tokens as transformers does."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.errors import OptionError
from graphwright.runtime.token_choice import Chooser, Sampling, filtered


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.1, 0.8, 1.0])
def test_the_same_tokens_are_left_as_in_transformers(temperature, top_k, top_p) -> None:
    """Temperature, then the k likeliest, then the nucleus; scores of equal size included."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature != 1.0 else [])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    scores = torch.randn(4, 33).mul(3).round(decimals=1)
    got = filtered(scores, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(got, warpers(None, scores), rtol=0, atol=0)


def test_what_is_drawn_is_as_likely_as_it_should_be() -> None:
    """Of many draws each token has its share, and what is left out never comes."""
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    tokens = Chooser(Sampling(top_p=0.9, seed=0), torch.device("cpu"))(scores)
    shares = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.03, rtol=0)


@pytest.mark.parametrize(("option", "value"), [("temperature", 0.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)])
def test_options_out_of_range_are_refused(option, value) -> None:
    """The message names the option."""
    with pytest.raises(OptionError, match=option):
        Sampling(**{option: value})
