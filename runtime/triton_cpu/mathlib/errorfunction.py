"""erf.

Near zero x + x * P(x**2); elsewhere 1 - exp(-|x| * (1 + Q(|x|))). Both are evaluated and one is selected.

Accuracy: within 1.1 ulp (1.3 without fused multiply-add).

Coefficients: minimax fits of this project (Remez exchange in 200-bit arithmetic, then rounded).
"""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import Text

from .body import Body
from .exponential import E_F32, power, scale, scalef, split
from .registry import function

ERF_EDGE = 0.9375
ERF_NEAR = (
    0.12837916612625122, -0.3761262893676758, 0.11283625662326813, -0.02685573697090149, 0.005192438140511513,
    -0.0008050384349189699, 8.00027119112201e-05,
)  # fmt: skip
ERF_FAR = (
    0.12864848971366882, 0.6351513266563416, 0.10623688250780106, -0.023762064054608345, 0.0036424596328288317,
    -0.00032280400046147406, 1.123132369684754e-05,
)  # fmt: skip


def exp_inside(b: Body, x: Text) -> Text:
    """exp(x) in f32 for x known to lie well inside the range of normal results."""
    n, bits, r = split(b, x, E_F32)
    value = power(b, r, E_F32)
    return scalef(b, value, n) if b.isa.name == "avx512" and b.lanes == 16 else scale(b, value, bits)


@function("erf", "f32")
def erf(b: Body, x: Text) -> Text:
    """Error function in f32."""
    near = b.mul_add(x, b.polynomial(b.mul(x, x), ERF_NEAR), x)
    # From 3.92 on, erf rounds to 1.
    t = b.at_most(b.abs(x), 3.9375)
    exponent = b.mul_add(t, b.polynomial(t, ERF_FAR), t)
    far = b.sub(b.const(1.0), exp_inside(b, b.neg(exponent)))
    return b.with_sign(b.select(b.cmp("olt", b.abs(x), ERF_EDGE), near, far), x)
