"""What is measured: kernels, their inputs, what they are compared with, and how fast they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from graphwright.runtime.triton_cpu import prepare
from graphwright.tools.kernels import attention, decode, elementwise, gemv, matmul, norm, softmax

Result = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Rival:
    """Something that computes the same.

    Args:
        name: what is called.
        run: computes the result once.
        bar: the ratio of its time to ours that we want at least; None where there is no demand.
    """

    name: str
    run: Result
    bar: float | None = None


@dataclass(frozen=True)
class Case:
    """A kernel with one set of inputs.

    Args:
        name: sizes and dtypes.
        run: launches the kernel and returns its result.
        reference: computes the result independently of the kernel, as exactly as its inputs allow.
        tolerance: largest error allowed, relative to the reference's largest element.
        rivals: what the kernel is timed against.
        quick: whether the case is part of a quick run.
    """

    name: str
    run: Result
    reference: Result
    tolerance: float
    rivals: tuple[Rival, ...]
    quick: bool = False


Cases = Iterator[Callable[[], Case]]
"""Cases are built one at a time, since their inputs are large."""


def _attention(causal: bool) -> Cases:
    for dim, length, heads in [(64, 1024, 8), (64, 4096, 8), (128, 1024, 8), (128, 4096, 4)]:

        def case(dim: int = dim, length: int = length, heads: int = heads) -> Case:
            q, k, v = torch.randn(3, heads, length, dim)

            def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                # With a batch dimension PyTorch takes its fused CPU kernel; without, it would write out the scores.
                return functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]

            return Case(
                f"H={heads} S={length} D={dim}",
                lambda: attention.attention(q, k, v, causal=causal),
                lambda: sdpa(q.double(), k.double(), v.double()),
                1e-5,
                (Rival("scaled_dot_product_attention", lambda: sdpa(q, k, v), 1.2),),
                quick=length == 1024,
            )

        yield case


def _matmul() -> Cases:
    for size in (512, 1024, 2048):

        def case(size: int = size) -> Case:
            a, b = torch.randn(2, size, size)
            return Case(
                f"{size}",
                lambda: matmul.matmul(a, b),
                lambda: a.double() @ b.double(),
                1e-5,
                (Rival("torch.mm", lambda: torch.mm(a, b), 0.95),),
                quick=size == 512,
            )

        yield case


def _matmul_half(dtype: torch.dtype) -> Cases:
    for size in (512, 1024, 2048):

        def case(size: int = size) -> Case:
            a32, b32 = torch.randn(2, size, size)
            a, b = a32.to(dtype), b32.to(dtype)
            return Case(
                f"{size}",
                lambda: matmul.matmul(a, b),
                lambda: a.double() @ b.double(),
                4e-3 if dtype is torch.bfloat16 else 5e-4,
                (Rival("the same in float32", lambda: matmul.matmul(a32, b32), 0.9),),
                quick=size == 512,
            )

        yield case


_PRECISION = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _norm_sizes() -> list[tuple[int, int, torch.dtype]]:
    return [
        (2048, 2048, torch.float32),
        (512, 4096, torch.float32),
        (4096, 768, torch.float32),
        (2048, 2048, torch.bfloat16),
        (2048, 2048, torch.float16),
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rms_norm() -> Cases:
    for rows, n, dtype in _norm_sizes():

        def case(rows: int = rows, n: int = n, dtype: torch.dtype = dtype) -> Case:
            x, weight = torch.randn(rows, n).to(dtype), torch.randn(n).to(dtype)

            def eager() -> torch.Tensor:
                wide = x.float()
                return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)

            return Case(
                f"{rows}x{n} {_dtype_name(dtype)}",
                lambda: norm.rms_norm(x, weight),
                lambda: functional.rms_norm(x.double(), (n,), weight.double(), 1e-5),
                _PRECISION[dtype],
                (
                    Rival("eager, as in Llama", eager, 2.5),
                    Rival("F.rms_norm", lambda: functional.rms_norm(x, (n,), weight, 1e-5)),
                ),
                quick=n == 2048,
            )

        yield case


def _layer_norm() -> Cases:
    for rows, n, dtype in _norm_sizes():

        def case(rows: int = rows, n: int = n, dtype: torch.dtype = dtype) -> Case:
            x = torch.randn(rows, n).to(dtype)
            weight, bias = torch.randn(2, n).to(dtype).unbind()

            def eager() -> torch.Tensor:
                wide = x.float()
                distance = wide - wide.mean(-1, keepdim=True)
                scale = torch.rsqrt(distance.pow(2).mean(-1, keepdim=True) + 1e-5)
                return (distance * scale * weight + bias).to(dtype)

            return Case(
                f"{rows}x{n} {_dtype_name(dtype)}",
                lambda: norm.layer_norm(x, weight, bias),
                lambda: functional.layer_norm(x.double(), (n,), weight.double(), bias.double(), 1e-5),
                _PRECISION[dtype],
                (
                    Rival("eager", eager, 2.5),
                    Rival("F.layer_norm", lambda: functional.layer_norm(x, (n,), weight, bias, 1e-5)),
                ),
                quick=n == 2048,
            )

        yield case


def _softmax() -> Cases:
    for rows, n in [(4096, 1024), (1024, 4096), (64, 1024), (256, 32768), (4096, 1000)]:

        def case(rows: int = rows, n: int = n) -> Case:
            x = torch.randn(rows, n)
            return Case(
                f"{rows}x{n}",
                lambda: softmax.softmax(x),
                lambda: torch.softmax(x.double(), -1),
                2e-6,
                (Rival("torch.softmax", lambda: torch.softmax(x, -1), 1.0),),
                quick=rows == 4096,
            )

        yield case


def _cross_entropy() -> Cases:
    def case() -> Case:
        logits, target = torch.randn(256, 32000), torch.randint(32000, (256,))
        return Case(
            "256x32000",
            lambda: softmax.cross_entropy(logits, target),
            lambda: functional.cross_entropy(logits.double(), target, reduction="none"),
            2e-6,
            (Rival("F.cross_entropy", lambda: functional.cross_entropy(logits, target, reduction="none")),),
            quick=True,
        )

    yield case


def _quantize(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(-1).clamp_min(1e-12) / largest
    return (x / scale[..., None]).round().to(torch.int8), scale


def _pack(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (low + 8) | (high << 4)


@dataclass(frozen=True)
class _Cache:
    """A cache of `bits`-bit integers, and what they stand for."""

    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    wide_k: torch.Tensor
    wide_v: torch.Tensor


def _cache(heads: int, length: int, dim: int, bits: int) -> _Cache:
    parts = []
    for x in torch.randn(2, heads, length, dim):
        integers, scale = _quantize(x, (1 << (bits - 1)) - 1)
        wide = integers.float() * scale[..., None]
        if bits == 4:
            integers = _pack(*integers.chunk(2, -1))
        parts.append((integers, scale, wide))
    (k, k_scale, wide_k), (v, v_scale, wide_v) = parts
    return _Cache(k, k_scale, v, v_scale, wide_k, wide_v)


def _decode(bits: int) -> Cases:
    for heads, length, dim in [(8, 4096, 64), (32, 4096, 128), (1, 32768, 128)]:

        def case(heads: int = heads, length: int = length, dim: int = dim) -> Case:
            q = torch.randn(heads, dim)
            cache, other = _cache(heads, length, dim, bits), _cache(heads, length, dim, 8)

            def run(c: _Cache) -> torch.Tensor:
                return decode.decode(q, c.k, c.k_scale, c.v, c.v_scale)

            def sdpa() -> torch.Tensor:
                inputs = q[None, :, None], cache.wide_k[None], cache.wide_v[None]
                return functional.scaled_dot_product_attention(*inputs)[0, :, 0]

            def exact() -> torch.Tensor:
                scores = (cache.wide_k.double() @ q.double()[..., None])[..., 0] / math.sqrt(dim)
                return (torch.softmax(scores, -1)[:, None] @ cache.wide_v.double())[:, 0]

            rivals = [Rival("SDPA, float32 cache", sdpa, 2.0)]
            if bits == 4:
                rivals.append(Rival("the same with 8 bits", lambda: run(other), 1.0))
            return Case(f"H={heads} S={length} D={dim}", lambda: run(cache), exact, 1e-5, tuple(rivals), quick=heads == 8)

        yield case


def _gemv(bits: int) -> Cases:
    for n, k in [(4096, 4096), (16384, 4096)]:

        def case(n: int = n, k: int = k) -> Case:
            x, weight = torch.randn(k), torch.randn(n, k)
            eight, eight_scale = _quantize(weight, 127)
            four, four_scale = _quantize(weight, 7)
            packed = _pack(*four.chunk(2, 1))
            wide = (eight * eight_scale[:, None]) if bits == 8 else (four * four_scale[:, None])

            def run_int8() -> torch.Tensor:
                return gemv.gemv_int8(eight, eight_scale, x)

            def run_int4() -> torch.Tensor:
                return gemv.gemv_int4(packed, four_scale, x)

            rivals = [Rival("torch.mv, float32", lambda: torch.mv(wide, x))]
            if bits == 4:
                rivals.append(Rival("the same with 8 bits", run_int8, 1.0))
            return Case(
                f"N={n} K={k}",
                run_int8 if bits == 8 else run_int4,
                lambda: wide.double() @ x.double(),
                1e-5,
                tuple(rivals),
                quick=n == 4096,
            )

        yield case


def _add() -> Cases:
    for n in (1 << 16, 1 << 22):

        def case(n: int = n) -> Case:
            x, y = torch.randn(2, n)
            rival = Rival("torch.add", lambda: torch.add(x, y))
            return Case(f"{n}", lambda: elementwise.add(x, y), lambda: x + y, 0.0, (rival,), quick=True)

        yield case


def _swiglu() -> Cases:
    for dtype in (torch.float32, torch.bfloat16):

        def case(dtype: torch.dtype = dtype) -> Case:
            gate, up = torch.randn(2, 1024, 4096).to(dtype)
            return Case(
                f"1024x4096 {_dtype_name(dtype)}",
                lambda: elementwise.swiglu(gate, up),
                lambda: functional.silu(gate.double()) * up.double(),
                _PRECISION[dtype],
                (Rival("F.silu(gate) * up", lambda: functional.silu(gate) * up),),
                quick=dtype is torch.float32,
            )

        yield case


def _rotary() -> Cases:
    def case() -> Case:
        x = torch.randn(1024, 32, 128)
        cos, sin = torch.randn(2, 1024, 64)
        wide_cos, wide_sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))

        def eager(x: torch.Tensor = x) -> torch.Tensor:
            low, high = x.chunk(2, -1)
            return x * wide_cos + torch.cat((-high, low), -1) * wide_sin

        return Case(
            "S=1024 H=32 D=128",
            lambda: elementwise.rotary(x, cos, sin),
            lambda: eager(x.double()),
            2e-6,
            (Rival("eager, as in Llama", eager),),
            quick=True,
        )

    yield case


def _embedding() -> Cases:
    for dim in (128, 1024):

        def case(dim: int = dim) -> Case:
            table, index = torch.randn(32000, dim), torch.randint(32000, (4096,))
            rival = Rival("F.embedding", lambda: functional.embedding(index, table))
            return Case(
                f"4096 of 32000x{dim}",
                lambda: elementwise.embedding(index, table),
                lambda: table[index],
                0.0,
                (rival,),
                quick=dim == 128,
            )

        yield case


def _launch(prepared: bool) -> Cases:
    def case() -> Case:
        x, y, out = torch.randn(3, 1024).unbind()
        arguments = (x, y, out, 1024, 1024)
        launch = prepare(elementwise.add_kernel, (1,), *arguments) if prepared else None

        def run() -> torch.Tensor:
            if launch is None:
                elementwise.add_kernel[(1,)](*arguments)
            else:
                launch()
            return out

        return Case(
            "add of 1024 elements",
            run,
            lambda: x + y,
            0.0,
            (Rival("torch.add(out=)", lambda: torch.add(x, y, out=out)),),
            quick=True,
        )

    yield case


KERNELS: dict[str, Callable[[], Cases]] = {
    "attention": lambda: _attention(causal=False),
    "attention-causal": lambda: _attention(causal=True),
    "matmul": _matmul,
    "matmul-float16": lambda: _matmul_half(torch.float16),
    "matmul-bfloat16": lambda: _matmul_half(torch.bfloat16),
    "rms-norm": _rms_norm,
    "layer-norm": _layer_norm,
    "softmax": _softmax,
    "cross-entropy": _cross_entropy,
    "decode-int8": lambda: _decode(8),
    "decode-int4": lambda: _decode(4),
    "gemv-int8": lambda: _gemv(8),
    "gemv-int4": lambda: _gemv(4),
    "add": _add,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "embedding": _embedding,
    "launch": lambda: _launch(prepared=False),
    "launch-prepared": lambda: _launch(prepared=True),
}
"""Name on the command line -> the cases."""
