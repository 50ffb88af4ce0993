"""Conversions of number types: every pattern of 16 bits both ways, and roundings that are easy to get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

ISAS = ("avx512", "avx2", "portable")
DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
    "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "i1": torch.bool,
}  # fmt: skip
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Cast:
    """Kernels of one operation each, applied to a whole tensor."""

    def __init__(self, kernel: type, target: str) -> None:
        self.kernel = kernel
        self.target = target

    def __call__(self, operation: str, x: torch.Tensor, source: str, result: str) -> torch.Tensor:
        """Apply `operation`; "{}" in it stands for the operand."""
        size = 1 << (x.numel() - 1).bit_length()
        padded = torch.zeros(size, dtype=DTYPES[source])
        padded[: x.numel()] = x
        out = torch.zeros(size, dtype=DTYPES[result])
        arrow = "to" if operation.startswith("arith.") else "->"
        text = f"""module {{
        tt.func public @k(%p: !tt.ptr<{source}>, %q: !tt.ptr<{result}>) {{
        %r = tt.make_range {{start = 0 : i32, end = {size} : i32}} : tensor<{size}xi32>
        %ps = tt.splat %p : !tt.ptr<{source}> -> tensor<{size}x!tt.ptr<{source}>>
        %pp = tt.addptr %ps, %r : tensor<{size}x!tt.ptr<{source}>>, tensor<{size}xi32>
        %qs = tt.splat %q : !tt.ptr<{result}> -> tensor<{size}x!tt.ptr<{result}>>
        %qq = tt.addptr %qs, %r : tensor<{size}x!tt.ptr<{result}>>, tensor<{size}xi32>
        %x = tt.load %pp : tensor<{size}x!tt.ptr<{source}>>
        %y = {operation.format("%x")} : tensor<{size}x{source}> {arrow} tensor<{size}x{result}>
        tt.store %qq, %y : tensor<{size}x!tt.ptr<{result}>>
        tt.return
        }}
        }}
        """
        self.kernel(text, target=self.target)(padded, out)
        return out[: x.numel()]


@pytest.fixture(params=ISAS)
def cast(request: pytest.FixtureRequest, ttir_kernel: type) -> Cast:
    """Return what applies a conversion, for every instruction set."""
    return Cast(ttir_kernel, request.param)


def assert_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare bit by bit; any NaN is as good as another."""
    is_nan = expected.isnan()
    assert torch.equal(found.isnan(), is_nan)
    kind = BITS[found.element_size()]
    different = (found.view(kind) != expected.view(kind)) & ~is_nan
    assert not different.any(), (found[different][:5], expected[different][:5])


def all_patterns(element: str) -> torch.Tensor:
    """Every number of a type of 16 bits."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(DTYPES[element])


@pytest.mark.parametrize("target", ["f32", "f64"])
@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_widening(cast: Cast, source: str, target: str) -> None:
    """Every pattern of 16 bits, denormals, infinities and NaNs included, widens to the same number."""
    x = all_patterns(source)
    assert_bits(cast("arith.extf {}", x, source, target), x.to(DTYPES[target]))


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_there_and_back(cast: Cast, element: str) -> None:
    """Every pattern of 16 bits comes back from fp32 unchanged."""
    x = all_patterns(element)
    assert_bits(cast("arith.truncf {}", x.to(torch.float32), "f32", element), x)


def near_ties(element: str) -> torch.Tensor:
    """For every number of a type, the fp32 numbers half way to the next one and on both sides of that."""
    x = all_patterns(element)
    x = x[x.isfinite()]
    following = (x.view(torch.int16) + 1).view(DTYPES[element]).to(torch.float64)
    low = x.to(torch.float64)
    # Beyond the largest number, the next one is where it would be with one more exponent.
    following = torch.where(following.isfinite(), following, low + (low - (x.view(torch.int16) - 1).view(x.dtype)))
    middle = ((low + following) / 2).to(torch.float32)
    bits = middle.view(torch.int32)
    return torch.cat([middle, (bits + 1).view(torch.float32), (bits - 1).view(torch.float32)])


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_rounding_to_nearest(cast: Cast, element: str) -> None:
    """Numbers half way between two neighbours go to the even one, others to the nearer one, large ones to infinity."""
    x = near_ties(element)
    assert_bits(cast("arith.truncf {}", x, "f32", element), x.to(DTYPES[element]))


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_narrowing_special_numbers(cast: Cast, element: str) -> None:
    """Infinities, NaNs of any payload and the ends of the fp32 range narrow as torch narrows them."""
    patterns = [
        0x7F800000,
        -0x800000,
        0x7F800001,
        0x7FFFFFFF,
        -1,
        0x7F7FFFFF,
        1,
        -0x7FFFFFFF,
        -0x80000000,
        0x33000000,
        0x33000001,
    ]
    x = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    assert_bits(cast("arith.truncf {}", x, "f32", element), x.to(DTYPES[element]))


def truncated(x: torch.Tensor, element: str) -> torch.Tensor:
    """The number of a type that is nearest to zero from `x`; infinities and NaN stay."""
    near = x.to(DTYPES[element])
    is_larger = near.to(torch.float64).abs() > x.to(torch.float64).abs()
    return torch.where(is_larger, (near.view(torch.int16) - 1).view(DTYPES[element]), near)


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_rounding_to_zero(cast: Cast, element: str) -> None:
    """Rounding to zero never enlarges a number, and what is too large becomes the largest finite number."""
    x = torch.cat([near_ties(element), all_patterns(element).to(torch.float32), torch.tensor([3e38, -3e38, 1e-45, -1e-30])])
    found = cast("tt.fp_to_fp {}, rounding = rtz", x, "f32", element)
    assert_bits(found, truncated(x, element))
    assert torch.equal(found.isinf(), x.isinf())


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_narrowing_from_double(cast: Cast, element: str) -> None:
    """fp64 is rounded once: a number just beside the middle of two neighbours does not become the middle on the way."""
    x = near_ties(element)[:65536].to(torch.float64)
    x = x[x.abs() > 1e-30]
    x = torch.cat([x, x * (1 + 2.0**-40), x * (1 - 2.0**-40)])
    if element == "f16":
        with np.errstate(over="ignore"):
            expected = torch.from_numpy(x.numpy().astype(np.float16))
    else:
        mantissa, exponent = np.frexp(x.numpy())
        expected = torch.from_numpy(np.ldexp(np.rint(mantissa * 256), exponent - 8)).to(torch.bfloat16)
    assert_bits(cast("arith.truncf {}", x, "f64", element), expected)


def test_double_to_single(cast: Cast) -> None:
    """fp64 narrows to the nearest fp32, and widens back exactly."""
    x = torch.cat([torch.randn(1000, dtype=torch.float64) * 10.0**e for e in (-45, -38, -3, 0, 3, 37, 39)])
    single = cast("arith.truncf {}", x, "f64", "f32")
    assert_bits(single, x.to(torch.float32))
    assert_bits(cast("arith.extf {}", single, "f32", "f64"), single.to(torch.float64))


@pytest.mark.parametrize("element", ["f16", "bf16"])
@pytest.mark.parametrize("source", ["i8", "i16", "i32", "i64"])
def test_integers_to_narrow_floats(cast: Cast, source: str, element: str) -> None:
    """Integers round once to 16 bits."""
    info = torch.iinfo(DTYPES[source])
    edges = [k + d for b in range(8, info.bits - 1) for k in (1 << b, (1 << b) + (1 << (b - 8))) for d in (-1, 0, 1)]
    x = torch.tensor([*range(max(info.min, -4000), min(info.max, 4000)), *[s * k for k in edges for s in (1, -1)]])
    x = x[(x >= info.min) & (x <= info.max) & (x.abs() < 2**53)].to(DTYPES[source])
    exact = x.numpy().astype(np.float64)
    with np.errstate(over="ignore"):
        if element == "f16":
            expected = torch.from_numpy(exact.astype(np.float16))
        else:
            mantissa, exponent = np.frexp(exact)
            expected = torch.from_numpy(np.ldexp(np.rint(mantissa * 256), exponent - 8)).to(torch.bfloat16)
    assert_bits(cast("arith.sitofp {}", x, source, element), expected)


@pytest.mark.parametrize("target", ["i8", "i16", "i32", "i64"])
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
def test_floats_to_integers(cast: Cast, source: str, target: str) -> None:
    """Floats are cut toward zero."""
    info = torch.iinfo(DTYPES[target])
    x = torch.cat([torch.linspace(-130, 130, 1041), torch.tensor([0.0, -0.0, -0.99, 1e-40])]).to(DTYPES[source])
    x = x[(x.double() > info.min - 1.0) & (x.double() < info.max + 1.0)]
    assert torch.equal(cast("arith.fptosi {}", x, source, target), x.double().to(DTYPES[target]))


@pytest.mark.parametrize(("operation", "signed"), [("arith.extsi {}", True), ("arith.extui {}", False)])
@pytest.mark.parametrize("source", ["i1", "i8", "i16"])
def test_widening_integers(cast: Cast, source: str, operation: str, signed: bool) -> None:
    """Integers widen with their sign or with zeros; a boolean with its sign is 0 or -1."""
    if source == "i1":
        x = torch.tensor([True, False] * 8)
        expected = x.to(torch.int32) * (-1 if signed else 1)
    else:
        info = torch.iinfo(DTYPES[source])
        x = torch.arange(info.min, info.max + 1, dtype=torch.int32)
        expected = x if signed else x % (1 << info.bits)
        x = x.to(DTYPES[source])
    assert torch.equal(cast(operation, x, source, "i32"), expected)


@pytest.mark.parametrize("target", ["i8", "i16", "i32"])
def test_narrowing_integers(cast: Cast, target: str) -> None:
    """Integers keep their low bits."""
    x = torch.randint(-(2**62), 2**62, (500,))
    assert torch.equal(cast("arith.trunci {}", x, "i64", target), x.to(DTYPES[target]))


@pytest.mark.parametrize(
    ("source", "target"), [("f32", "i32"), ("i32", "f32"), ("f16", "i16"), ("i16", "bf16"), ("bf16", "f16")]
)
def test_bitcasts(cast: Cast, source: str, target: str) -> None:
    """Bits stay as they are, those of NaNs included."""
    x = all_patterns("f16").view(torch.int16)
    x = (x.to(torch.int32) * 65537 if source.endswith("32") else x).view(DTYPES[source])
    found = cast("tt.bitcast {}", x, source, target)
    kind = BITS[x.element_size()]
    assert torch.equal(found.view(kind), x.view(kind))


CONSTANTS = [0.1, -0.0, 65504.0, 65520.0, 1e-8, 3.4e38, 1.00390625, 1 + 2**-8 + 2**-40, 1 - 2**-9 - 2**-40, 2.0**-25 + 2.0**-60]


@pytest.mark.parametrize(
    ("source", "target"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16"), ("f64", "f32")]
)
def test_constants(cast: Cast, source: str, target: str, ttir_kernel: Any) -> None:
    """A constant converts to the same bits as a number that is loaded."""
    x = torch.tensor(CONSTANTS, dtype=DTYPES[source])
    found = cast("arith.truncf {}", x, source, target)
    digits = {"f32": 8, "f64": 16}[source]
    lines = []
    for k, bits in enumerate(x.view(BITS[x.element_size()]).tolist()):
        lines += [
            f"%c{k} = arith.constant 0x{bits % (1 << (4 * digits)):0{digits}X} : {source}",
            f"%d{k} = arith.truncf %c{k} : {source} to {target}",
            f"%i{k} = arith.constant {k} : i32",
            f"%p{k} = tt.addptr %p, %i{k} : !tt.ptr<{target}>, i32",
            f"tt.store %p{k}, %d{k} : !tt.ptr<{target}>",
        ]
    body = "\n".join(lines)
    text = f"module {{\ntt.func public @k(%p: !tt.ptr<{target}>) {{\n{body}\ntt.return\n}}\n}}\n"
    out = torch.zeros(len(CONSTANTS), dtype=DTYPES[target])
    ttir_kernel(text, target=cast.target)(out)
    assert_bits(out, found)
