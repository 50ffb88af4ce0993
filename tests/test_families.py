"""Every family of models compiles, and does what the model does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiled import Compiled
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep

TOLERANCE = 1e-5
"""Largest difference from eager in float32, relative to the largest element of the output."""

SIZES = ((2, 7), (1, 1), (3, 63), (1, 20))
"""(batch, tokens) of the calls that are compared; the first is the sample's."""

ATTENTIONS = {
    "llama": 2,
    "llama-mask": 2,
    "qwen3": 2,
    "mistral": 2,
    "gemma3": 2,
    "phi3": 2,
    "gpt2": 2,
    "opt": 2,
    "mixtral": 2,
    "qwen3-moe": 2,
    "mamba2": 0,
    "bert": 2,
    "deberta-v2": 2,
    "vit": 2,
    "dinov2": 2,
    "clip-vision": 2,
    "swin": 4,
    "t5": 6,
    "whisper": 6,
    "encoder-post-norm": 2,
    "encoder-pre-norm": 2,
    "convnet": 0,
    "attention": 1,
    "attention-causal": 1,
    "attention-window": 1,
    "attention-bias": 1,
    "attention-lengths": 1,
}
"""How many attentions each family has."""

SHARP = {"t5"}
"""Random weights make these so sensitive that eager itself is further than TOLERANCE from float64."""

HALVES = {
    "llama": torch.bfloat16,
    "gpt2": torch.float16,
    "bert": torch.bfloat16,
    "vit": torch.float16,
    "encoder-pre-norm": torch.bfloat16,
    "attention-causal": torch.float16,
    "gemma3": torch.bfloat16,
    "whisper": torch.bfloat16,
}
"""The families that are run in half precision too."""

QUICK = {
    "llama",
    "phi3",
    "gpt2",
    "opt",
    "bert",
    "vit",
    "dinov2",
    "encoder-post-norm",
    "encoder-pre-norm",
    "convnet",
    *(name for name in ATTENTIONS if name.startswith("attention")),
}
"""Compiled in seconds; the others are slow."""

WITHOUT_IDS = ("vit", "dinov2", "clip-vision", "swin", "encoder-post-norm", "encoder-pre-norm", "convnet", "attention")
"""Families whose inputs are floats only and whose attention is not masked: a NaN reaches whatever it reaches in eager."""


def each(names: Iterable[str], quick: Container[str] = QUICK) -> pytest.MarkDecorator:
    """Run a test once for each of these families, by default for those that are quick."""
    marked = [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]
    return pytest.mark.parametrize("name", marked)


def tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = list(value.values()) if isinstance(value, Mapping) else value
    return [t for item in values for t in tensors(item)] if isinstance(values, list | tuple) else []


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest element, over all tensors; it is NaN if any is."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs
    ratios = [(a.double() - b.double()).abs().max() / b.double().abs().max() for a, b in pairs]
    return float(torch.stack(ratios).max())


def assert_alike(found: Any, expected: Any) -> None:
    """Assert that two outputs are of one type and hold tensors of the same dtypes and shapes."""
    assert type(found) is type(expected)
    if isinstance(expected, Mapping):
        assert list(found) == list(expected)
    described = [[(t.dtype, t.shape) for t in tensors(value)] for value in (found, expected)]
    assert described[0] == described[1]


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments with tensors of floats as another dtype."""
    floats = {key for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return {key: value.to(dtype) if key in floats else value for key, value in inputs.items()}


@pytest.fixture(scope="module")
def eager(built: Callable[[str], nn.Module]) -> Callable[..., Any]:
    """Return what a family's model returns, on request computed in another dtype from the same weights and inputs."""

    @functools.cache
    def model(name: str, dtype: torch.dtype) -> nn.Module:
        return built(name) if dtype is torch.float32 else copy.deepcopy(built(name)).to(dtype)

    def run(name: str, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
        with torch.no_grad():
            return model(name, dtype)(**cast(inputs, dtype))

    return run


@pytest.fixture(scope="module")
def compiled(captured: Callable[[str], Program]) -> Callable[[str], Compiled]:
    """Return a family's compiled model, made once."""
    return functools.cache(lambda name: graphwright.compile(captured(name)))


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are compiled during a test."""
    from graphwright.runtime.triton_cpu import prepared

    made: list[str] = []
    prepare = prepared.prepare

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(kernel.__name__)
        return prepare(kernel, *args, **kwargs)

    monkeypatch.setattr(prepared, "prepare", counted)
    return made


def test_table_is_complete(families: dict[str, Any]) -> None:
    """No family is left out."""
    assert list(ATTENTIONS) == list(families)


@each(ATTENTIONS)
def test_computes_what_the_model_does(
    name: str, families: dict[str, Any], compiled: Callable[[str], Compiled], eager: Callable[..., Any]
) -> None:
    """Values, types, dtypes and shapes are eager's at every size; where float32 itself is loose, float64 decides."""
    for batch, tokens in SIZES:
        inputs = families[name].sample(batch, tokens, tokens)
        found, expected = compiled(name)(**inputs), eager(name, inputs)
        assert_alike(found, expected)
        if name in SHARP:
            exact = eager(name, inputs, torch.float64)
            assert distance(found, exact) <= 2 * distance(expected, exact)
        else:
            assert distance(found, expected) <= TOLERANCE


@each(ATTENTIONS)
def test_attention_is_recognised(name: str, compiled: Callable[[str], Compiled]) -> None:
    """All attentions of a family run as such, none as products and a softmax."""
    made = compiled(name)
    assert made.graph.count("graphwright.attention") == ATTENTIONS[name]
    kernels = [step.kernel for step in made.schedule.steps if isinstance(step, KernelStep)]
    assert sum(kernel.startswith("attention") for kernel in kernels) == ATTENTIONS[name]


@each(ATTENTIONS)
def test_other_sizes_compile_nothing(
    name: str, families: dict[str, Any], compiled: Callable[[str], Compiled], compilations: list[str]
) -> None:
    """Kernels compiled for one call serve calls of other sizes; only 1 and multiples of 16 are compiled for apart."""
    made, sample = compiled(name), families[name].sample
    made(**sample(2, 7, 0))
    made(**sample(3, 19, 0))
    compilations.clear()
    for batch, tokens in ((3, 21), (5, 9), (2, 37)):
        made(**sample(batch, tokens, 0))
    assert compilations == []


@each(ATTENTIONS)
def test_calls_leave_inputs_and_repeat(name: str, families: dict[str, Any], compiled: Callable[[str], Compiled]) -> None:
    """A call changes no input, a second one gives the same bits, and neither touches what the first returned."""
    inputs = families[name].sample(3, 11, 5)
    before = copy.deepcopy(inputs)
    first = compiled(name)(**inputs)
    kept = copy.deepcopy(tensors(first))
    compiled(name)(**families[name].sample(2, 13, 6))
    second = compiled(name)(**inputs)
    for a, b in zip(tensors(inputs), tensors(before), strict=True):
        assert torch.equal(a, b)
    for a, b, c in zip(tensors(first), kept, tensors(second), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def poisoned(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with one NaN in the first element of the batch."""
    result = copy.deepcopy(inputs)
    (x,) = (t for t in result.values() if isinstance(t, torch.Tensor) and t.is_floating_point())
    x[(0, *(n // 2 for n in x.shape[1:]))] = torch.nan
    return result


@each(WITHOUT_IDS)
def test_nan_reaches_what_it_reaches_in_eager(
    name: str, families: dict[str, Any], compiled: Callable[[str], Compiled], eager: Callable[..., Any]
) -> None:
    """A NaN in an input makes NaN of the same outputs as in eager, and no others."""
    inputs = poisoned(families[name].sample(2, 21, 0))
    found, expected = compiled(name)(**inputs), eager(name, inputs)
    assert any(bool(t.isnan().any()) for t in tensors(expected))
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@each(("attention-causal", "attention-window"))
def test_nan_stays_where_masks_keep_it(
    name: str, families: dict[str, Any], compiled: Callable[[str], Compiled], eager: Callable[..., Any]
) -> None:
    """A NaN reaches all queries that see its token; a query that may not see it gets NaN as in eager, or its clean value."""
    clean = families[name].sample(2, 21, 0)
    inputs, place = poisoned(clean), 10
    found, expected, unharmed = compiled(name)(**inputs), eager(name, inputs), eager(name, clean)
    rows = torch.arange(21)
    sees = rows >= place if name == "attention-causal" else (rows - place).abs() <= 3
    assert found[0, sees].isnan().all()
    assert torch.equal(found.isnan() & expected.isnan(), found.isnan())
    assert distance(torch.where(found.isnan(), unharmed, found), unharmed) <= TOLERANCE


@each(HALVES, quick=("gpt2", "encoder-pre-norm", "attention-causal"))
def test_half_precision(name: str, families: dict[str, Any]) -> None:
    """In half precision, outputs are no further from float64, with the same weights, than twice what eager's are."""
    dtype, family = HALVES[name], families[name]
    model = family.build().to(dtype)
    exact_model = copy.deepcopy(model).double()

    def inputs(batch: int, tokens: int) -> dict[str, Any]:
        return cast(family.sample(batch, tokens, tokens), dtype)

    made = graphwright.compile(model, **inputs(2, 7))
    for batch, tokens in SIZES:
        given = inputs(batch, tokens)
        with torch.no_grad():
            expected, exact = model(**given), exact_model(**cast(given, torch.float64))
        found = made(**given)
        assert_alike(found, expected)
        assert distance(found, exact) <= 2 * distance(expected, exact)
