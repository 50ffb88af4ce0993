"""Compiled models: what can be done with them, to them, and to the model they came from."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import graphwright
from graphwright.ir.errors import InputError
from graphwright.runtime.executable import MOST_PLANS


class Block(nn.Module):
    """A normed feed-forward; what is added, and a factor that is no tensor, are optional."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x, y=None, *, scale=1.0):
        hidden = self.down(nn.functional.gelu(self.up(self.norm(x)))) * scale
        return hidden if y is None else hidden + y


class Function(nn.Module):
    """A module whose forward is a function of itself and the arguments."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.register_buffer("bytes", torch.randint(-127, 127, (16,), dtype=torch.int8))
        self.function = function

    def forward(self, *args):
        return self.function(self, *args)


def made(seed=0):
    torch.manual_seed(seed)
    model = Block().eval()
    return model, graphwright.compile(model, torch.randn(2, 5, 16), torch.randn(2, 5, 16))


@pytest.fixture(scope="module")
def pair():
    """A model and what was compiled of it; neither may be changed."""
    return made()


def assert_same(compiled, model, *args):
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-5, atol=1e-5)


def test_arguments_by_position_and_by_name(pair):
    """Any mixture that the model takes is taken, with constants as they were at capture."""
    model, compiled = pair
    x, y = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    expected = model(x, y).detach()
    for found in (compiled(x, y), compiled(x=x, y=y), compiled(y=y, x=x), compiled(x, y=y, scale=1.0)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="captured without 'scale'"):
        compiled(x, y, scale=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), "x: wrong dtype: expected float32"),
        (lambda x: x[..., :15], "x: dimension 2 must be 16"),
        (lambda x: x[0], "x: wrong rank"),
        (lambda x: x[:, :3], "'tokens' is 3 in x"),
        (lambda x: x.to("meta"), "x: wrong device: .*found float32.* on meta"),
        (lambda x: x.numpy(), "x: expected a tensor, .*found ndarray"),
        (lambda x: x.tolist(), "x: expected a tensor, .*found list"),
        (lambda x: None, "x: expected a tensor, .*found NoneType"),
        (lambda x: x.to_sparse(), "x: expected a tensor with memory of its own, and found .*sparse_coo"),
    ],
    ids=["dtype", "width", "rank", "unequal", "device", "numpy", "list", "none", "sparse"],
)
def test_unfit_arguments_are_refused_by_name(pair, change, message):
    """The error says which argument, what was expected and what was found; the next call works."""
    model, compiled = pair
    x = torch.randn(2, 5, 16)
    with pytest.raises(InputError, match=message):
        compiled(change(x), x)
    with pytest.raises(InputError, match="'tokens' must be at least 1"):
        compiled(x[:, :0], x[:, :0])
    assert_same(compiled, model, x, x)


def test_vmap_is_refused(pair):
    """Under vmap there is no memory to read, which is said."""
    with pytest.raises(InputError, match="outside of vmap"):
        torch.func.vmap(pair[1])(torch.randn(3, 2, 5, 16), torch.randn(3, 2, 5, 16))


def test_tensors_that_lie_in_other_ways(pair):
    """Transposed, offset, expanded, flipped, strided, aliased, inference tensors, parameters: as in PyTorch."""
    model, compiled = pair
    y = torch.randn(2, 5, 16)
    with torch.inference_mode():
        inference = torch.randn(2, 5, 16)
    for x in (
        torch.randn(5, 2, 16).transpose(0, 1),
        torch.randn(161)[1:].view(2, 5, 16),
        torch.randn(1, 1, 16).expand(2, 5, 16),
        torch.randn(2, 5, 32)[..., ::2].flip(1),
        y,
        inference,
        nn.Parameter(torch.randn(2, 5, 16)),
    ):
        assert_same(compiled, model, x, y)
        assert not compiled(x, y).requires_grad


def test_values_that_are_not_numbers(pair):
    """NaN and infinities reach what they reach in PyTorch."""
    model, compiled = pair
    x = torch.randn(2, 5, 16)
    x[0, 0, 0], x[0, 1, 2], x[1, 0, 3] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x), model(x, x), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_more_sizes_than_plans_are_kept(pair):
    """Large and small calls in any order, more of them than are remembered, leave no trace in one another."""
    model, compiled = pair
    for batch in (200, 1, 0, *range(1, MOST_PLANS + 3), 200, 2):
        x = torch.randn(batch, 3, 16)
        assert_same(compiled, model, x, x)


def test_a_changed_weight_is_an_error():
    """Changed in place after compiling, neither the old nor the new state is computed: an error names the weight."""
    model, compiled = made()
    x = torch.randn(2, 5, 16)
    compiled(x, x)
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    for call in (compiled, compiled.profile):
        with pytest.raises(InputError, match=r"the weight '.*' was changed after .*What to do: compile the model again"):
            call(x, x)
    again = graphwright.compile(model, x, x)
    assert_same(again, model, x, x)


def test_the_model_may_go_and_is_left_as_it_was():
    """Compiling changes no weight, and a compiled model works when the model is gone."""
    model = Block().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 4, 16)
    expected = model(x).detach()
    compiled = graphwright.compile(model, torch.randn(2, 5, 16))
    compiled(x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_are_refused(pair):
    """The error says to save and to load."""
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"`save`, and `graphwright\.load`"):
            attempt(pair[1])


def test_a_compiled_model_says_what_it_takes(pair):
    """Its text names the arguments with their types, and counts what it is made of."""
    assert repr(pair[1]).startswith("<Compiled: takes x float32[batch, tokens, 16] on cpu, y float32[")


def test_two_compiled_models_in_threads(pair):
    """Models compiled of one model, and of two, run side by side."""
    model, compiled = pair
    other, compiled_other = made(seed=1)
    again = graphwright.compile(model, torch.randn(2, 5, 16), torch.randn(2, 5, 16))
    wrong = []

    def work(number, callee, original):
        draw = torch.Generator().manual_seed(number)
        for step in range(30):
            x = torch.randn(1 + step * number % 7, 4, 16, generator=draw)
            with torch.no_grad():
                if not torch.allclose(callee(x, x), original(x, x), rtol=1e-5, atol=1e-5):
                    wrong.append((number, step))

    calls = [(compiled, model), (again, model), (compiled_other, other), (compiled, model)]
    threads = [threading.Thread(target=work, args=(number, *call)) for number, call in enumerate(calls, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_calls_in_a_forked_process(pair):
    """A child process of a compiled model computes the same on one thread."""
    x = torch.randn(2, 5, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = pair[1](x, x)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(pair[1](x, x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x,
        lambda m, x: (x, x + 1, x),
        lambda m, x: (m.bytes, x * m.bytes),
        lambda m, x: (x[:, :1], x.transpose(1, 2)),
        lambda m, x: None,
        lambda m, x: (None, 3, [x * 2], {"size": x.shape[0], "flags": (True, 1.5)}),
        lambda m, x: torch.softmax(x, -1),
        lambda m, x: m.linear(x).exp().sum(),
        lambda m, x: torch.fft.rfft(x).abs(),
    ],
    ids=["argument", "arguments", "weight", "views", "none", "nested", "no-weights", "scalar", "complex"],
)
def test_results_of_every_kind(function):
    """Arguments, weights, views, None, numbers and nested containers come back as the model returns them."""
    model = Function(function).eval()
    compiled = graphwright.compile(model, torch.randn(2, 5, 16))
    for x in (torch.randn(2, 5, 16), torch.randn(3, 4, 16)):
        expected, found = model(x), compiled(x)
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_arguments_in_containers():
    """Tensors in dicts in dicts and lists are found by key, in any order."""
    model = Function(lambda m, given: {"out": m.linear(given["a"]["x"]), "rest": [given["b"][0] * 2]}).eval()
    compiled = graphwright.compile(model, {"a": {"x": torch.randn(2, 5, 16)}, "b": [torch.randn(2, 5, 16)]})
    given = {"b": [torch.randn(3, 4, 16)], "a": {"x": torch.randn(3, 4, 16)}}
    assert_same(compiled, model, given)
    with pytest.raises(InputError, match=r"given\.a|args\.0\.a"):
        compiled({"b": given["b"], "a": {"y": given["a"]["x"]}})


def test_models_in_float64():
    """Attention, norms, GELU and softmax keep the precision of float64."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
    model = nn.Sequential(layer, nn.Softmax(-1)).double().eval()
    compiled = graphwright.compile(model, torch.randn(2, 5, 16, dtype=torch.float64))
    x = torch.randn(3, 63, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-13)
