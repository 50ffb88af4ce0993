"""exp, exp2 and exp10.

All split x into n * log_b(2) + r with an integer n, take a polynomial in r and scale by 2**n. Results below the
smallest normal number are flushed to zero: the compare comes before the scaling, since denormal arithmetic costs tens
of times more.

Accuracy: f32 within 1 ulp (1.3 on a CPU without fused multiply-add), f64 within 1.3.

Coefficients: minimax fits of this project (Remez exchange in 200-bit arithmetic, then rounded).
"""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.runtime.triton_cpu.emit import Text
from graphwright.runtime.triton_cpu.literals import literal

from .body import Body
from .registry import function

INF = float("inf")


@dataclass(frozen=True, slots=True)
class Base:
    """Constants of b**x in one precision.

    Args:
        inverse: log2(b).
        high: leading bits of log_b(2), few enough that n * high is exact.
        low: log_b(2) - high.
        smallest: least x with a normal result.
        largest: greatest x with a finite result.
        linear: (high, low) parts of ln(b), the coefficient of r.
        coefficients: of r**2, r**3, ...
        short: coefficients of r, r**2 and r**3, enough for |r| <= log_b(2) / 32.
    """

    inverse: float
    high: float
    low: float
    smallest: float
    largest: float
    linear: tuple[float, float]
    coefficients: tuple[float, ...]
    short: tuple[float, float, float] = (0.0, 0.0, 0.0)


E_F32 = Base(
    1.44269504, 0.693359375, -0.00021219444170128554, -87.33654022216797, 88.72283172607422, (1.0, 0.0),
    (0.5, 0.1666666716337204, 0.04166620224714279, 0.008333072066307068, 0.0013950580032542348,
     0.00020050366583745927),
    (1.0, 0.5000163316726685, 0.16667155921459198),
)  # fmt: skip
TWO_F32 = Base(
    1.0, 1.0, 0.0, -126.0, 127.99999237060547, (0.6931471824645996, 0.0),
    (0.24022650718688965, 0.05550404265522957, 0.009618042968213558, 0.001333898864686489, 0.00015465468459296972,
     1.4018456568010151e-05),
    (0.6931471824645996, 0.2402343451976776, 0.05550573766231537),
)  # fmt: skip
TEN_F32 = Base(
    3.32192809, 0.301025390625, 4.605039066518657e-06, -37.929779052734375, 38.531837463378906,
    (2.3025851249694824, 0.0),
    (2.6509487628936768, 2.034654140472412, 1.1712950468063354, 0.5418804287910461, 0.20619116723537445),
    (2.3025851249694824, 2.6510355472564697, 2.034738302230835),
)  # fmt: skip
E_F64 = Base(
    1.4426950408889634, 0.6931471805592082, 7.371002565167799e-13, -708.3964185322641, 709.782712893384, (1.0, 0.0),
    (0.5000000000000009, 0.16666666666666427, 0.041666666666545525, 0.008333333333490421, 0.001388888894007181,
     0.00019841269506948276, 2.480149642316788e-05, 2.7557591438787485e-06, 2.762916232773101e-07,
     2.499717505564721e-08),
)  # fmt: skip
TWO_F64 = Base(
    1.0, 1.0, 0.0, -1022.0, 1023.9999999999999, (0.6931471805599453, 2.3190468138462996e-17),
    (0.24022650695910117, 0.05550410866482076, 0.009618129107598707, 0.001333355814668331, 0.00015403530452173512,
     1.5252733546739814e-05, 1.3215437449886823e-06, 1.0178185639050142e-07, 7.0734485801679475e-09,
     4.4360492455096006e-10),
)  # fmt: skip
TEN_F64 = Base(
    3.321928094887362, 0.30102999566361177, 3.694239077158931e-13, -307.6526555685887, 308.2547155599167,
    (2.302585092994046, -2.1707562233822494e-16),
    (2.650949055239201, 2.0346785922934534, 1.1712551489099463, 0.539382929204648, 0.20699584931651727,
     0.06808936396344649, 0.019597630256621867, 0.005013979883817916, 0.0011573761970463965, 0.00024106871676158516),
)  # fmt: skip

E_F64_SHORT = (0.500000006272472, 0.16666665862027197, 0.04166630722384341, 0.008333501046593087, 0.0013943962026955433,
               0.00019787325161172887)  # fmt: skip
"""exp in f64 arithmetic to 2**-34: enough for results rounded to f32."""


def split(b: Body, x: Text, base: Base) -> tuple[Text, Text, Text]:
    """Return (n, 2**n as a pattern to add to a float's bits, r)."""
    if b.element == "f32":
        n = b.intrinsic("rint", x if base.high == 1.0 else b.mul(x, base.inverse))
        # Out of range, the conversion yields a value that the callers' selects discard.
        bits = b.ints("shl", b.cast("fptosi", n, "f32", "i32"), 23)
    else:
        # Below AVX-512 there is no conversion of f64 to i64: adding 1.5 * 2**52 leaves the integer in the low bits.
        shifter = 6755399441055744.0
        t = b.mul_add(x, base.inverse, shifter)
        n = b.sub(t, shifter)
        bits = b.ints("shl", b.to_bits(t), 52)
    if base.high == 1.0:
        return n, bits, b.sub(x, n)
    return n, bits, b.mul_add(n, -base.low, b.mul_add(n, -base.high, x))


def power(b: Body, r: Text, base: Base) -> Text:
    """Return b**r for |r| <= log_b(2) / 2."""
    high, low = base.linear
    if high == 1.0:
        if b.element == "f32":
            return b.polynomial(r, (1.0, 1.0, *base.coefficients))
        tail = b.polynomial(r, base.coefficients)
        return b.add(b.mul_add(b.mul(r, r), tail, r), 1.0)
    if low == 0.0:
        return b.polynomial(r, (1.0, high, *base.coefficients))
    tail = b.mul_add(r, b.polynomial(r, base.coefficients), b.const(low))
    return b.add(b.mul_add(r, high, b.mul(r, tail)), 1.0)


def scale(b: Body, value: Text, bits: Text) -> Text:
    """Multiply a positive normal `value` by a power of two, the result being normal."""
    return b.from_bits(b.ints("add", b.to_bits(value), bits))


def scalef(b: Body, value: Text, n: Text, kept: Text | None = None) -> Text:
    """Return value * 2**floor(n) by the AVX-512 instruction, for 16 lanes of f32; zero where the i1 `kept` is false."""
    mask = "-1" if kept is None else b.emitter.op(f"bitcast {b.of('i1')} {kept} to i16")
    operands = [(b.type, value), (b.type, n), (b.type, "zeroinitializer"), ("i16", mask), ("i32", "4")]
    return b.emitter.call(b.type, "llvm.x86.avx512.mask.scalef.ps.512", operands)


def from_table(b: Body, x: Text, base: Base) -> Text:
    """Return b**x for 16 lanes of f32 by AVX-512, where one permutation looks up 2**(i / 16) in a register.

    What is left of x is small enough for a cubic. In softmax kernels the arithmetic ports are the bottleneck, and this takes
    three quarters of the instructions of a longer polynomial.
    """
    # The instruction overflows by itself; the bound only keeps inf - inf out of the reduction.
    bounded = b.at_most(x, 2.0 * base.largest)
    # The unit of the last place of 1.5 * 2**19 is 1/16.
    shifter = 1.5 * 2.0**19
    t = b.add(bounded, shifter) if base.high == 1.0 else b.mul_add(bounded, base.inverse, shifter)
    n = b.sub(t, shifter)
    r = b.sub(bounded, n) if base.high == 1.0 else b.mul_add(n, -base.low, b.mul_add(n, -base.high, bounded))
    entries = ", ".join(f"float {literal(2.0 ** (i / 16), 'f32')}" for i in range(16))
    indices = b.to_bits(t)
    root = b.emitter.call(b.type, "llvm.x86.avx512.permvar.sf.512", [(b.type, f"<{entries}>"), (b.of("i32"), indices)])
    fraction = b.mul_add(b.mul(root, r), b.polynomial(r, base.short), root)
    return scalef(b, fraction, n, b.cmp("uge", x, base.smallest))


def exponential(b: Body, x: Text, base: Base) -> Text:
    """Return b**x: +inf above the largest argument, 0 below the smallest."""
    if b.isa.name == "avx512" and b.element == "f32" and b.lanes == 16:
        return from_table(b, x, base)
    _, bits, r = split(b, x, base)
    result = scale(b, power(b, r, base), bits)
    result = b.select(b.cmp("ogt", x, base.largest), INF, result)
    if b.element == "f64":
        # The payload of a NaN would leak into the exponent bits.
        result = b.select(b.cmp("uno", x, x), x, result)
    return b.select(b.cmp("olt", x, base.smallest), 0.0, result)


@function("exp", "f32", "f64")
def exp(b: Body, x: Text) -> Text:
    """Return e**x."""
    return exponential(b, x, E_F32 if b.element == "f32" else E_F64)


@function("exp2", "f32", "f64")
def exp2(b: Body, x: Text) -> Text:
    """Return 2**x."""
    return exponential(b, x, TWO_F32 if b.element == "f32" else TWO_F64)


@function("exp10", "f32", "f64")
def exp10(b: Body, x: Text) -> Text:
    """Return 10**x."""
    return exponential(b, x, TEN_F32 if b.element == "f32" else TEN_F64)
