"""Attention in compiled models against eager: masks, biases, layouts, sizes and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graphwright.compiled import Compiled
from graphwright.runtime.schedule import CallStep, KernelStep

NAMES = {"args.0": {0: "batch", 2: "queries"}, "args.1": {0: "batch", 2: "keys"}, "args.2": {0: "batch", 2: "keys"}}
SAME = {f"args.{k}": {0: "batch", 2: "tokens"} for k in range(3)}


def draw(
    batch: int = 2,
    heads: int = 4,
    queries: int = 9,
    keys: int = 9,
    size: int = 16,
    key_heads: int | None = None,
    dv: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values."""
    shapes = [(heads, queries, size), (key_heads or heads, keys, size), (key_heads or heads, keys, dv or size)]
    q, k, v = (torch.randn(batch, *shape) for shape in shapes)
    return q, k, v


def is_one_kernel(compiled: Compiled) -> bool:
    """Whether a compiled model runs one attention kernel and calls nothing."""
    steps = compiled.schedule.steps
    names = [step.kernel for step in steps if isinstance(step, KernelStep)]
    return sum(name.startswith("attention") for name in names) == 1 and not any(isinstance(s, CallStep) for s in steps)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    at, to = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(to <= at) & (to > at - 4))


def band(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    at, to = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(at - to).abs() < 3)


def blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    at, to = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(at // 4) == (to // 4))


def last_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    at, to = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=to <= at + (k.shape[2] - q.shape[2]))


def distance(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    at, to = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=-slopes * (at - to).abs())


def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / 4.0
    at = torch.arange(q.shape[2])
    scores = scores.masked_fill(at[None, :] > at[:, None], float("-inf"))
    return torch.matmul(scores.softmax(-1), v)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) * 0.25 / 5.0) * 5.0
    return torch.matmul(scores.softmax(-1), v)


MASKED = {f.__name__: f for f in (causal, window, band, blocks, distance, written, capped)}


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_positions(check: Any, name: str) -> None:
    """A mask that follows from positions is computed in the kernel, at any length."""
    calls = [draw(batch=b, queries=n, keys=n) for b, n in ((2, 9), (1, 1), (3, 70), (1, 130))]
    compiled = check(MASKED[name], *calls, dynamic=SAME, ulps=64)
    assert is_one_kernel(compiled)


def test_more_keys_than_queries(check: Any) -> None:
    """Queries and keys have lengths of their own."""
    calls = [draw(queries=s, keys=t) for s, t in ((9, 13), (1, 77), (65, 66))]
    assert is_one_kernel(check(F.scaled_dot_product_attention, *calls, dynamic=NAMES, ulps=64))
    assert is_one_kernel(check(last_keys, *calls, dynamic=NAMES, ulps=64))


@pytest.mark.parametrize(("size", "dv"), [(1, 1), (8, 24), (40, 40), (80, 96), (128, 64)])
def test_head_sizes(check: Any, size: int, dv: int) -> None:
    """Heads of any size, and values of another one than keys, are computed."""
    compiled = check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), draw(size=size, dv=dv), ulps=64)
    assert is_one_kernel(compiled)


def test_very_large_heads_and_double_precision(check: Any) -> None:
    """What the kernel does not take is computed all the same."""
    check(causal, draw(size=300), ulps=64)
    check(causal, tuple(t.double() for t in draw()), ulps=64)


def test_shared_key_heads(check: Any) -> None:
    """Query heads share key heads by groups, by `enable_gqa` or by repeating."""

    def shared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)

    def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t[:, :, None].expand(-1, -1, 3, -1, -1).reshape(t.shape[0], -1, *t.shape[2:]) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.1)

    for function in (shared, repeated):
        check(
            function, draw(heads=6, key_heads=2), draw(batch=1, heads=6, key_heads=2, queries=5, keys=5), dynamic=SAME, ulps=64
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(check: Any, dtype: torch.dtype) -> None:
    """Scores and sums are float32 whatever the operands are."""
    check(causal, tuple(t.to(dtype) for t in draw(queries=33, keys=33)))


def test_masks_of_the_call(check: Any) -> None:
    """Masks that a call brings, boolean or added, of any shape that broadcasts, hide and weigh keys."""
    q, k, v = draw(queries=7, keys=11)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, bias: torch.Tensor) -> dict[str, Any]:
        return {
            "padding": F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :]),
            "bias": F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
            "both": F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~seen[:, None, None, :], -torch.inf)),
        }

    seen = torch.rand(2, 11) < 0.7
    seen[:, 0] = True
    check(function, (q, k, v, seen, torch.randn(2, 4, 7, 11)), ulps=64)
    check(function, (q, k, v, seen, torch.randn(4, 7, 11)), ulps=64)
    check(function, (q, k, v, seen, torch.randn(7, 1)), ulps=64)


def test_a_query_that_sees_nothing(check: Any) -> None:
    """It gets zeros, as in eager, and no NaN reaches the others."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    q, k, v = draw()
    seen = torch.rand(9, 9) < 0.5
    seen[4] = False
    seen[5:, 0] = True
    compiled = check(function, (q, k, v, seen), ulps=64)
    assert (compiled(q, k, v, seen)[:, :, 4] == 0).all()


def test_layouts(check: Any) -> None:
    """Heads are read where projections leave them, from one joint tensor too, and written where the next one reads them."""

    def function(x: torch.Tensor, joint: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = F.linear(x, joint).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return F.linear(mixed.transpose(1, 2).reshape(b, n, 32), out)

    weights = [torch.randn(96, 32) / 6, torch.randn(32, 32) / 6]
    calls = [(torch.randn(b, n, 32),) for b, n in ((2, 9), (1, 1), (3, 40))]
    compiled = check(function, *calls, weights=weights, dynamic={"args.0": {0: "batch", 1: "tokens"}}, ulps=64)
    assert [type(s).__name__ for s in compiled.schedule.steps] == ["MatmulStep", "KernelStep", "MatmulStep"]


def test_operands_that_kernels_make(check: Any) -> None:
    """Rotated queries, turned values and heads last in memory are brought into a form that the kernel reads."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
        half = q.shape[-1] // 2
        turned = torch.cat([-q[..., half:], q[..., :half]], -1)
        return {
            "turned": F.scaled_dot_product_attention(turned, k * 2, v),
            "flipped": F.scaled_dot_product_attention(q.flip(2), k, v.flip(-1)),
            "columns": F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)),
            "steps": F.scaled_dot_product_attention(q[..., ::2], k[..., ::2], v[..., 1::2]),
            "tokens": F.scaled_dot_product_attention(q[:, :, 1::2], k[:, :, ::3], v[:, :, ::3]),
            "expanded": F.scaled_dot_product_attention(q, k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1)),
        }

    check(function, draw(), ulps=64)
