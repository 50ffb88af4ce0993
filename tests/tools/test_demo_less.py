"""The demo's second half: a small run of it, what it prints, and that the recipes in the documents are what it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphwright.ir.errors import InputError
from graphwright.passes.registry import parse_pass
from graphwright.recipe import read_recipe
from graphwright.tools import demo_less, reference
from graphwright.tools.demo_less import PLAIN, PYTORCH, DecoderWay, EncoderWay, Less
from graphwright.tools.output import console

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


@pytest.fixture
def less() -> Less:
    """What a run might have found."""
    encoder = [EncoderWay(label, (), 10.0, 1.0, 1.0, 1.0) for label in (PYTORCH, PLAIN, "merged")]
    decoder = [DecoderWay(label, (), 10.0, 1.0, 99.0, 1.0, 640.0, 0.0, 2.0, 1.0) for label in (PYTORCH, PLAIN, "small")]
    return Less(encoder, decoder)


@pytest.fixture(scope="module")
def ran() -> Less:
    """A run with short texts, and one pass for each model."""
    before = torch.get_num_threads()
    # Where tests run side by side, threads would wait for each other.
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"TOKENS": 48, "PROMPT": 400, "NEW": 6, "QUICK_FORCED": 8, "QUICK_ROUNDS": 1}.items():
                patch.setattr(demo_less, name, value)
            patch.setattr(demo_less, "ENCODER_WAYS", {PLAIN: (), "merged": ("merge-tokens:ratio=0.8",)})
            patch.setattr(demo_less, "DECODER_WAYS", {PLAIN: (), "small": ("quantize-cache:bits=4",)})
            return demo_less.run(quick=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_encoder_is_itself_until_tokens_are_merged(ran: Less) -> None:
    """As it is, embeddings are PyTorch's; with a fifth of the tokens merged they are near, and not the same."""
    found = {way.label: way for way in ran.encoder}
    assert list(found) == [PYTORCH, PLAIN, "merged"]
    assert found[PLAIN].cosine > 0.99999
    assert found[PLAIN].overlap == 1
    assert 0.6 < found["merged"].cosine < 0.9999
    assert found[PYTORCH].ratio == 1


@pytest.mark.slow
def test_decoder_is_itself_but_for_its_cache(ran: Less) -> None:
    """As it is, loss and tokens are those of transformers; in 4 bits the loss is near and bytes are fewer."""
    found = {way.label: way for way in ran.decoder}
    assert found[PLAIN].same_tokens == 1
    assert abs(found[PLAIN].loss - found[PYTORCH].loss) < 1e-4
    assert 0 < abs(found["small"].loss - found[PYTORCH].loss) < 0.1
    assert found[PLAIN].cache_bytes_per_token == found[PYTORCH].cache_bytes_per_token == 4096
    assert found["small"].cache_bytes_per_token == 640


def test_tables_have_a_row_for_each_way(less: Less) -> None:
    """Both tables are shown in 80 columns without losing a label."""
    shown = console()
    with shown.capture() as captured:
        for part in demo_less.tables(less):
            shown.print(part)
    text = captured.get()
    assert text.count(PLAIN) == 2
    assert "merged" in text
    assert "640" in text


def test_language_model_may_be_missing(less: Less, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a checkout the encoder is shown all the same, and what is missing is said."""

    def missing() -> Path:
        raise InputError("the language model is not there")

    monkeypatch.setattr(reference, "language_model_folder", missing)
    monkeypatch.setattr(demo_less, "_encoder", lambda quick, tell: less.encoder)
    found = demo_less.run(quick=True)
    assert found.decoder == []
    assert demo_less.tables(found)[-1] == "the language model is not there"


@pytest.mark.parametrize(("name", "ways"), [("sentence-encoder", "ENCODER_WAYS"), ("language-model", "DECODER_WAYS")])
def test_recipes_are_what_the_demo_runs(name: str, ways: str) -> None:
    """The last row of each table follows the recipe in the documents."""
    *_, last = getattr(demo_less, ways).values()
    assert read_recipe(RECIPES / f"{name}.toml").passes == tuple(parse_pass(text) for text in last)
