"""Recipes: passes with their options as TOML, read, written, carried by artifacts, refused for other models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright
from graphwright.ir.errors import OptionError
from graphwright.passes.fusing.projections import FuseProjections
from graphwright.passes.registry import parse_pass
from graphwright.recipe import Mark, Recipe, mark_of, parse_recipe, read_recipe, recipe_of

TEXT = """
[[pass]]
name = "fuse-projections"
minimum = 3

[[pass]]
name = "drop-layers"
keep_ratio = 0.75
unit = "feed-forward"
greedy = true
"""


class Three(nn.Module):
    """Three projections of one value."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two, three = (part(x) for part in self.parts)
        return one * two + three


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_passes_are_read_in_order(tmp_path) -> None:
    """Each [[pass]] is a pass with its options; the file's text and its path give the same."""
    path = tmp_path / "some.toml"
    path.write_text(TEXT)
    recipe = read_recipe(path)
    assert recipe.passes == (
        FuseProjections(minimum=3),
        parse_pass("drop-layers:keep_ratio=0.75,unit=feed-forward,greedy=true"),
    )
    assert recipe.model is None
    assert parse_recipe(TEXT).passes == recipe.passes
    assert parse_recipe("").passes == ()


def test_what_is_written_is_read_back() -> None:
    """Passes with options that are not at their defaults, and the model, come back equal."""
    passes = tuple(map(parse_pass, ("fuse-projections:minimum=4", "dead-code", "drop-layers:drop=2,score=leave-one-out")))
    recipe = Recipe(passes, Mark('a "quoted" ünï\\code\nname', "sha256:12"))
    found = parse_recipe(recipe.to_toml())
    assert (found.passes, found.model) == (recipe.passes, recipe.model)
    assert 'name = "drop-layers"\ndrop = 2\nscore = "leave-one-out"' in recipe.to_toml()


def test_further_passes_come_after() -> None:
    """Passes given beside a recipe run after its own."""
    recipe = recipe_of(parse_recipe(TEXT), ["dead-code"])
    assert [step.name for step in recipe.passes] == ["fuse-projections", "drop-layers", "dead-code"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[pass]]\nname = "drop-layer"\ndrop = 2',
            r"x\.toml, pass 1: there is no pass 'drop-layer'. Did you mean 'drop-layers'",
        ),
        ('[[pass]]\nname = "drop-layers"\ndorp = 2', r"x\.toml, pass 1: .*there is no option 'dorp'. Did you mean 'drop'"),
        ('[[pass]]\nname = "dead-code"\n[[pass]]\nname = "drop-layers"\ndrop = 1.5', r"pass 2: .*drop must be an integer"),
        ('[[pass]]\nname = "drop-layers"\ndrop = 1979-05-27', "pass 1: drop must be a number, true or false, text"),
        ('[[pass]]\nname = "drop-layers"\nunit = "block,drop=3"', "there is no comma in any value"),
        ("[[pass]]\ndrop = 2", r"x\.toml, pass 1 has no name"),
        ('[pass]\nname = "drop-layers"', r"passes are written \[\[pass\]\], in double brackets"),
        ('[[passes]]\nname = "drop-layers"', "there is no part 'passes'. Did you mean 'pass'"),
        ('[model]\nwieghts = "a"', "there is no key 'wieghts'. Did you mean 'weights'"),
        ('[model]\nname = "a"', r"\[model\] has no weights"),
        ("[model]\nweights = 3", "both text"),
        ("drop = = 2", r"x\.toml is not TOML: .*line 1"),
    ],
)
def test_mistakes_are_named(text, message) -> None:
    """Errors say where, what, and what was meant."""
    with pytest.raises(OptionError, match=message):
        parse_recipe(text, "x.toml")


def test_what_is_not_text_is_refused(tmp_path) -> None:
    """A file of other bytes is named."""
    path = tmp_path / "some.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match=r"some\.toml is not text"):
        read_recipe(path)


def test_compiled_models_carry_their_recipe(tmp_path) -> None:
    """`compile` follows a file; the artifact holds the recipe, which compiles the model the same again."""
    path, saved = tmp_path / "some.toml", tmp_path / "three.gw"
    path.write_text('[[pass]]\nname = "fuse-projections"\nminimum = 3\n')
    compiled = graphwright.compile(Three(), X, recipe=path, passes=["dead-code"])
    assert [record.options for record in compiled.report.records[-2:]] == ["fuse-projections:minimum=3", "dead-code"]
    compiled.save(saved)
    loaded = graphwright.load(saved)
    assert loaded.recipe == compiled.recipe
    recipe = parse_recipe(loaded.recipe)
    assert [step.name for step in recipe.passes] == ["fuse-projections", "dead-code"]
    assert recipe.model == mark_of(graphwright.capture(Three(), X), "Three")
    assert graphwright.compile(Three(), X, recipe=recipe).recipe == loaded.recipe


def test_recipes_of_other_models_are_refused() -> None:
    """The hash is of the weights' names, dtypes and shapes: other values fit, another width does not, before any pass runs."""
    recipe = Recipe((), mark_of(graphwright.capture(Three(), X), "Three"))
    other = Three()
    with torch.no_grad():
        other.parts[0].weight.zero_()
    recipe.check(mark_of(graphwright.capture(other, X)))
    wide = graphwright.capture(Three(16), torch.randn(4, 16))
    with pytest.raises(OptionError, match=r"was made for another model: for Three with weights sha256:.*\[model\]"):
        graphwright.compile(wide, recipe=recipe)
    with pytest.raises(OptionError, match="was made for another model"):
        recipe.check(mark_of(graphwright.capture(Three().half(), X.half())))
