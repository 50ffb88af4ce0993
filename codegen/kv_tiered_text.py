"""What the texts of the kernels over a cache in two tiers have in common: where states lie, and how codes are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from graphwright.ir.ops.kv_tiered import Tiers
from graphwright.ir.ops.tier_codes import PACKED, planes

from .attention_parts import both

LOG2E = math.log2(math.e)
_A_LINE = 8

STRIDES = {
    **{"q": ("q_batch", "q_head", "q_token"), "k": ("k_batch", "k_head", "k_token"), "v": ("v_batch", "v_head", "v_token")},
    **{"out": ("out_batch", "out_head", "out_token")},
}


@dataclass(frozen=True, kw_only=True)
class TieredSpec:
    """What the kernels over a cache in two tiers are made for.

    Args:
        head_dim: D.
        value_dim: Dv.
        group: query heads that share a key head.
        tiers: the format.
        one: there is one new token.
        counted: calls say how many of a sequence's new tokens there are.
        window: queries whose attention counts for scores; 0 for all.
        decay: what scores are multiplied by for each new token.
        balanced: keys are balanced.
    """

    head_dim: int
    value_dim: int
    group: int
    tiers: Tiers
    one: bool = False
    counted: bool = False
    window: int = 0
    decay: float = 1.0
    balanced: bool = True


def block_of(dim: int) -> int:
    """Return the columns of tiles that hold `dim`, which must be a power of two, and enough for a product."""
    return max(16, 1 << (dim - 1).bit_length())


def columns(dim: int, name: str = "o_d") -> str:
    """Return the condition that columns exist, "" if all do."""
    return f"{name} < {dim}" if block_of(dim) != dim else ""


def masked(*conditions: str) -> str:
    """Return the arguments of a load that takes zeros where a condition is false."""
    terms = [condition for condition in conditions if condition]
    return f", mask={both(terms)}, other=0" if terms else ""


def packed_row(rows: str, bits: int, first: int, width: int) -> str:
    """Return the text of the number of the row of bytes that holds a plane's bits of a token, or slot.

    Args:
        rows: text of the token's number; a name.
        bits: of a code.
        first: the plane's first row of the eight tokens' rows.
        width: bits of the plane.
    """
    return f"{rows} // {PACKED} * {bits}" + (f" + {first}" if first else "") + (f" + {rows} % {width}" if width > 1 else "")


def packed_shift(rows: str, width: int) -> str:
    """Return the text of the number of the first of a plane's bits of a token, or slot, in its byte."""
    return f"{rows} % {PACKED} // {width} * {width}" if width > 1 else f"{rows} % {PACKED}"


def range_place(tokens: str) -> str:
    """Return the text of where tokens' ranges and marks are, given their numbers."""
    return f"{tokens} % {PACKED} * groups + {tokens} // {PACKED}"


def codes(pointer: str, rows: str, bits: int, dim: int, mask: str, name: str = "o_d") -> str:
    """Return the text of a tile of codes, int32: of rows [N, 1] by their numbers."""
    terms, row = [], 0
    for first, width in planes(bits):
        load = f"tl.load({pointer} + ({packed_row(rows, bits, row, width)}) * {dim} + {name}{mask}).to(tl.int32)"
        term = f"({load} >> ({packed_shift(rows, width)}) & {(1 << width) - 1})"
        terms.append(f"({term} << {first})" if first else term)
        row += width
    return " | ".join(terms)


def indented(lines: Iterable[str], depth: int = 1) -> Iterator[str]:
    """Yield lines further to the right."""
    for line in lines:
        yield "    " * depth + line if line else line


def function(name: str, helpers: str, parameters: Iterable[str], constants: Iterable[str], body: Iterable[str]) -> str:
    """Return the text of a kernel; `name` may be "{name}"."""
    names = list(parameters)
    varying = ", ".join(f'"{n}"' for n in ("tokens", "capacity", "slots") if n in names)
    lines = [f"@triton.jit(do_not_specialize=[{varying}])", f"def {name}("]
    lines += [f"    {', '.join(names[at : at + _A_LINE])}," for at in range(0, len(names), _A_LINE)]
    lines += [f"    {', '.join(f'{n}: tl.constexpr' for n in constants)},", "):"]
    return "\n".join([helpers, "", *lines, *indented(body)]) + "\n"


def places(spec: TieredSpec, states: Iterable[str]) -> Iterator[str]:
    """Yield what moves pointers to the program's sequence and key head, and tells how much there is."""
    tiers, d, dv = spec.tiers, spec.head_dim, spec.value_dim
    yield "head = (i_b * heads + i_h).to(tl.int64)"
    yield f"groups = capacity // {PACKED}"
    yield f"room = groups * {PACKED} // {tiers.group_size} * {tiers.group_size} + {tiers.ring - 1}"
    yield "filled = tl.minimum(tl.load(p_past + i_b).to(tl.int32), room)"
    yield f"stored = tl.maximum(filled - {tiers.residual}, 0) // {tiers.group_size} * {tiers.group_size}"
    yield f"pooled = stored // {tiers.group_size} * {tiers.promoted}"
    fine = f"slots // {PACKED} * {tiers.fine_bits}" if tiers.fine_bits else "slots"
    sizes = {
        **{"recent_k": f"{tiers.ring * d}", "recent_v": f"{tiers.ring * dv}", "recent_score": f"{tiers.ring}"},
        **{
            "balance": f"{d}",
            "low_k": f"(capacity * {d * tiers.low_bits // 8})",
            "low_v": f"(capacity * {dv * tiers.low_bits // 8})",
            "ranges": f"(groups * {4 * PACKED})",
        },
        **{"refined": "groups", "fine_k": f"({fine} * {d})", "fine_v": f"({fine} * {dv})"},
        **{"pool_token": "slots", "pool_score": "slots"},
    }
    for state in states:
        yield f"p_{state} += head * {sizes[state]}"


def new_entries(name: str) -> Iterator[str]:
    """Yield what moves the pointer of the new tokens' keys or values to the program's head."""
    yield f"p_{name} += i_b.to(tl.int64) * {name}_batch + i_h.to(tl.int64) * {name}_head"


def stored_where(*conditions: str) -> str:
    """Return the argument of a store that stores nothing where a condition is false."""
    terms = [condition for condition in conditions if condition]
    return f", mask={both(terms)}" if terms else ""


def refined_codes(spec: TieredSpec, tensor: str, dim: int, name: str, inside: str) -> Iterator[str]:
    """Yield a tile of codes with their refinement, of the tokens in the slots `slots_2d` [N, 1]."""
    tiers = spec.tiers
    mask = masked("slots_2d < pooled", inside)
    yield "rows = tl.load(p_pool_token + slots_2d, mask=slots_2d < pooled, other=0)"
    yield f"low = {codes(f'p_low_{tensor}', 'rows', tiers.low_bits, dim, mask, name)}"
    yield f"fine = {codes(f'p_fine_{tensor}', 'slots_2d', tiers.fine_bits, dim, mask, name)}"
    yield f"{tensor} = ((low << {tiers.fine_bits}) | fine).to(tl.float32)"


def refined_range(zero: str, step: str, fine_bits: int) -> Iterator[str]:
    """Yield what turns zero and step of codes into those of codes with refinement."""
    yield f"{zero} += {step} * {0.5 / (1 << fine_bits) - 0.5!r}"
    yield f"{step} *= {1 / (1 << fine_bits)!r}"
