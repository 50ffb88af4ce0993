"""Which kernels a program becomes: what is computed together, and what has to be stored between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphwright.compiled import Compiled
from graphwright.runtime.schedule import CallStep, KernelStep, MatmulStep


def kinds(compiled: Compiled) -> list[str]:
    """Return the kinds of a compiled model's steps."""
    names = {KernelStep: "kernel", MatmulStep: "matmul", CallStep: "call"}
    return [names[type(step)] for step in compiled.schedule.steps]


def test_a_chain_is_one_kernel(check: Any) -> None:
    """Pointwise operations, a norm and a softmax over the same rows are one kernel that stores one result."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + y.exp(), (48,)).softmax(-1) * y

    compiled = check(function, (torch.randn(5, 48), torch.randn(5, 48)))
    assert kinds(compiled) == ["kernel"]
    assert len(compiled.schedule.buffers) == 3


def test_results_of_several_shapes_share_a_kernel(check: Any) -> None:
    """Rows, and what they are reduced to, come out of one pass over the input."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        total = x.sum(-1)
        return {
            "scaled": x * 2,
            "total": total,
            "kept": x.amax(-1, keepdim=True),
            "flat": (x - 1).flatten(),
            "softmax": x.softmax(-1),
        }

    for shape in ((4, 6, 70), (4, 6, 5), (1, 1, 70), (9, 20000)):
        compiled = check(function, (torch.randn(shape),))
        assert kinds(compiled) == ["kernel"]


def test_values_used_across_stages(check: Any) -> None:
    """A value that products and later kernels use is stored once, and read by all of them."""

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(x, (32,))
        up = F.silu(F.linear(h, a)) * 2
        down = F.linear(up, b)
        return F.layer_norm(x + down, (32,)) + h

    compiled = check(function, (torch.randn(3, 7, 32),), weights=[torch.randn(64, 32) / 6, torch.randn(32, 64) / 8])
    assert kinds(compiled) == ["kernel", "matmul", "kernel", "matmul", "kernel"]


def test_no_cycle_through_a_product(check: Any) -> None:
    """Kernels whose rows agree are not merged when a product lies between them, or when one waits for the other."""

    def function(x: torch.Tensor, w: torch.Tensor) -> dict[str, Any]:
        a = x.exp()
        b = F.linear(a, w)
        c = a + b
        d = F.linear(c.relu(), w)
        return {"a": a, "b": b, "c": c, "d": d, "e": a * d + c, "sum": (b + d).sum(-1)}

    compiled = check(function, (torch.randn(6, 24),), weights=[torch.randn(24, 24) / 5])
    order = {step.name: k for k, step in enumerate(compiled.schedule.steps)}
    written = {
        name: k for k, step in enumerate(compiled.schedule.steps) if isinstance(step, KernelStep) for name in step.writes
    }
    for k, step in enumerate(compiled.schedule.steps):
        if isinstance(step, KernelStep):
            assert all(written.get(name, -1) < k for name in step.reads if name not in step.writes)
    assert len(order) == len(compiled.schedule.steps)


def test_no_cycle_through_another_kernel(check: Any) -> None:
    """Two results over the same rows are in two kernels if a kernel of other rows reads one and makes the other."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        first = x.softmax(-1)
        turned = first.transpose(0, 1).softmax(-1)
        second = turned.transpose(0, 1).softmax(-1) + x
        third = (first * second).sum(-1)
        return {"first": first, "turned": turned, "second": second, "third": third}

    compiled = check(function, (torch.randn(11, 9),))
    assert kinds(compiled).count("kernel") >= 3
    check(function, (torch.randn(11, 9),), (torch.randn(5, 3),), dynamic={"args.0": {0: "a", 1: "b"}})


def test_a_reduction_over_other_rows_is_stored(check: Any) -> None:
    """What a kernel's rows cannot reduce is stored by a kernel of its own."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        return {
            "outer": x.softmax(-1)[:, None, :] * x.sum(-1)[None, :, None],
            "of_columns": x - x.mean(0),
            "both": x.softmax(0) + x.softmax(1),
            "all": x / x.abs().sum(),
        }

    check(function, (torch.randn(7, 12),))
    check(function, (torch.randn(7, 12),), (torch.randn(3, 12),), dynamic={"args.0": {0: "n"}})


def test_operations_without_a_loop_form_are_called(check: Any) -> None:
    """What no lowering makes, or only for other arguments, goes to PyTorch between kernels."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        i = (x * 4).to(torch.int64)
        values, at = x.topk(3, -1)
        return {
            "power": i ** (i % 3).abs(),
            "sorted": (x + 1).sort(-1).values * 2,
            "topk": values + at,
            "cumsum": x.exp().cumsum(-1) + 1,
            "argmax": (x * -1).argmax(-1),
            "one_hot": F.one_hot(x.argmax(-1), 12) * 2,
            "scatter": torch.zeros_like(x).scatter(1, at, values) + 1,
            "complex": torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (6, 2))) * 1j) + 1,
        }

    compiled = check(function, (torch.randn(5, 12),))
    assert {"kernel", "call"} <= set(kinds(compiled))


def test_a_result_may_be_anything(check: Any) -> None:
    """Inputs, weights, views of them and of each other, the same value twice, numbers and nothing are all returned."""

    def function(x: torch.Tensor, w: torch.Tensor) -> dict[str, Any]:
        y = x + 1
        return {
            "input": x,
            "input_view": x.t(),
            "input_part": x[1:, ::2],
            "input_turned": x.flip(0),
            "weight": w,
            "weight_view": w[2:],
            "value": y,
            "again": y,
            "value_view": y.reshape(-1),
            "value_part": y[0],
            "value_expanded": y[:, None, :1].expand(-1, 3, 5),
            "product": F.linear(x, w),
            "product_view": F.linear(x, w).t(),
            "none": None,
            "number": 3,
            "float": 0.5,
            "text": "a",
            "size": x.shape[0],
            "sizes": x.shape[0] * 2 + x.shape[1],
            "constant": torch.full((2,), 3.0),
            "range": torch.arange(4),
            "nested": [(y * 2,), {"z": y - 1}],
        }

    weights = [torch.randn(8, 8)]
    compiled = check(function, (torch.randn(4, 8),), weights=weights)
    check(function, (torch.randn(4, 8),), (torch.randn(3, 8),), weights=weights, dynamic={"args.0": {0: "n"}})
    x = torch.randn(4, 8)
    results = compiled(x)
    assert results["input"] is x


def test_results_are_not_overwritten_by_the_next_call(check: Any) -> None:
    """Results, and views among them, keep their values when the model is called again."""

    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        return y, y.t(), F.linear(y, w), w, y.sum(-1)

    compiled = check(function, (torch.randn(4, 8),), weights=[torch.randn(8, 8)])
    first = compiled(torch.ones(4, 8))
    kept = [t.clone() for t in first]
    second = compiled(torch.zeros(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not torch.equal(first[0], second[0])
    first[3].fill_(7.0)
    assert not compiled(torch.ones(4, 8))[3].eq(7.0).any()


class Layers(nn.Module):
    """Layers alike, one after the other."""

    def __init__(self, count: int, size: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(size, 4, 64, 0.0, batch_first=True) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_alike_share_kernels(check: Any) -> None:
    """Six layers take as many different kernels as two."""
    few, many = (check(Layers(n), (torch.randn(2, 9, 32),), dynamic=None, ulps=64) for n in (2, 6))
    assert len(few.schedule.kernels) == len(many.schedule.kernels)
    assert len(many.schedule.steps) - len(few.schedule.steps) == 2 * (len(few.schedule.steps) - 1)


@pytest.mark.parametrize("length", [100, 127, 1000, 20000])
def test_masked_pieces_and_long_rows(check: Any, length: int) -> None:
    """Rows are cut where a concatenation or a mask changes, and nothing past the end of a piece is used."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        at = torch.arange(x.shape[-1])
        turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        seen = torch.where(at < 37, x, -torch.inf)
        return {
            "turned": turned * 2,
            "sum": turned.abs().sum(-1),
            "softmax": seen.softmax(-1),
            "padded": F.pad(x, (3, 5)).amax(-1),
        }

    check(function, (torch.randn(3, length),))
    check(function, (torch.randn(3, length),), (torch.randn(2, length + 2),), dynamic={"args.0": {0: "n", 1: "m"}})
