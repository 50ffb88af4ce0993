"""Products, lookups and calls of PyTorch in compiled models, against eager."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from graphwright.runtime.schedule import CallStep, KernelStep, MatmulStep

TOKENS = {"args.0": {0: "batch", 1: "tokens"}}


def steps(compiled: Any) -> list[str]:
    """Return the kinds of a compiled model's steps."""
    names = {KernelStep: "kernel", MatmulStep: "matmul", CallStep: "call"}
    return [names[type(step)] for step in compiled.schedule.steps]


def test_products_with_weights(check: Any) -> None:
    """Products read rows where they lie: in parts of wider rows, at every other token, and in tensors of any rank."""

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, tall: torch.Tensor) -> dict[str, Any]:
        return {
            "plain": F.linear(x, w),
            "bias": F.linear(x, w, b),
            "transposed": x @ tall,
            "part": F.linear(x[..., 3:8], w[:, :5]),
            "tokens": F.linear(x[:, ::2], w),
            "last": F.linear(x[:, -1], w),
            "first": F.linear(x[0], w),
            "turned": F.linear(x.transpose(0, 1), w),
            "columns": F.linear(x.transpose(1, 2)[:, :, :2], w[:, :2]),
            "vector": F.linear(x[0, 0], w),
            "number": x[0, 0] @ w[0],
            "activated": F.gelu(F.linear(x, w, b)) + 1,
            "twice": F.linear(F.linear(x, w), w.t()),
            "batched": torch.bmm(x, x.transpose(1, 2)),
            "scaled": torch.matmul(x * 0.1, x.mT) * 0.5,
            "einsum": torch.einsum("btd,hd->bht", x, w),
        }

    weights = [torch.randn(7, 12) / 3, torch.randn(7), torch.randn(12, 9) / 3]
    calls = [(torch.randn(shape),) for shape in ((3, 6, 12), (2, 9, 12), (1, 2, 12))]
    check(function, calls[0], weights=weights, ulps=64)
    check(function, *calls, weights=weights, dynamic=TOKENS, ulps=64)


def test_products_of_sizes_that_are_products(check: Any) -> None:
    """Rows whose number is a polynomial of the sizes are still rows."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        pairs = (x[:, :, None] * F.pad(x, (0, 0, 0, 1))[:, None]).flatten(1, 2)
        return F.linear(pairs, w)

    calls = [(torch.randn(shape),) for shape in ((3, 6, 12), (2, 9, 12))]
    compiled = check(function, *calls, weights=[torch.randn(7, 12)], dynamic=TOKENS, ulps=64)
    assert steps(compiled).count("matmul") == 1


def test_columns_that_are_a_polynomial(check: Any) -> None:
    """Rows as long as a product of sizes are walked over row by row."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        wide = F.pad(x @ x.mT, (0, 0, 0, 1)).flatten(1)
        return {"wide": wide, "softmax": wide.softmax(-1), "sum": wide.sum(-1)}

    calls = [(torch.randn(shape),) for shape in ((5, 6, 12), (7, 9, 12), (1, 2, 12))]
    check(function, *calls, dynamic=TOKENS, ulps=64)


def test_half_precision_products(check: Any) -> None:
    """Products of half precision round once."""
    for dtype in (torch.bfloat16, torch.float16):
        weights = [(torch.randn(24, 32) / 6).to(dtype), torch.randn(24).to(dtype)]
        check(lambda x, w, b: F.silu(F.linear(x, w, b)), (torch.randn(3, 5, 32).to(dtype),), weights=weights)


def test_embeddings(check: Any) -> None:
    """Rows of a table are looked up by ids of any shape, and positions are read without a lookup."""

    def function(ids: torch.Tensor, table: torch.Tensor, places: torch.Tensor) -> dict[str, Any]:
        at = torch.arange(ids.shape[1])
        return {
            "words": F.embedding(ids, table),
            "with_places": F.embedding(ids, table) + F.embedding(at, places),
            "shifted": F.embedding(ids[:, 1:], table) * 2,
            "turned": F.embedding(ids.t(), table),
            "padding": F.embedding(ids, table, padding_idx=0),
            "clamped": F.embedding(at.clamp(max=3), places),
            "norm": F.layer_norm(F.embedding(ids, table), (16,)),
            "scaled": F.embedding((ids * 2) % 10, table),
        }

    weights = [torch.randn(10, 16), torch.randn(20, 16)]
    calls = [(torch.randint(0, 10, shape),) for shape in ((2, 6), (3, 20), (1, 2))]
    check(function, *calls, weights=weights, dynamic=TOKENS)
    check(function, (calls[0][0].int(),), weights=weights)


def test_calls_with_several_results(check: Any) -> None:
    """Results that are used are kept, and those that are not are dropped."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        top, at = (x * 2).topk(3, -1)
        lowest, _ = x.sort(-1)
        mean = torch.var_mean(x, dim=0)[1]
        return {
            "top": top + 1,
            "at": at,
            "lowest": lowest[:, :2],
            "mean": mean * 2,
            "max": x.max(0).indices,
            "median": x.median(1)[0],
        }

    check(function, (torch.randn(7, 12),))
    check(function, (torch.randn(7, 12),), (torch.randn(3, 12),), dynamic={"args.0": {0: "n"}})


def test_convolutions(check: Any) -> None:
    """Convolutions, pools and norms over channels stand between kernels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=4)
            self.norm, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
            self.norm.running_mean = torch.randn(8)
            self.down = nn.Conv1d(8, 4, 5)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            y = F.relu(self.norm(self.first(x)))
            z = self.group(self.second(F.max_pool2d(y, 2)))
            return {
                "y": y,
                "z": z,
                "pooled": F.adaptive_avg_pool2d(z, 1),
                "line": self.down(z.flatten(2)),
                "up": F.interpolate(z, scale_factor=2),
            }

    check(Net(), (torch.randn(2, 3, 14, 14),), (torch.randn(1, 3, 14, 14),), dynamic={"x": {0: "n"}}, ulps=64)


def test_sizes_among_arguments(check: Any) -> None:
    """Sizes of the call reach the calls of PyTorch."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        n = x.shape[0]
        return {
            "chosen": x.index_select(0, torch.arange(n - 1, -1, -1)),
            "one_hot": F.one_hot(x.argmax(1), 12),
            "roll": x.cumsum(0).roll(n // 2, 0),
        }

    check(function, *((torch.randn(n, 12),) for n in (7, 3, 9)), dynamic={"args.0": {0: "n"}})
