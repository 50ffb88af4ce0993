"""Codes of keys and values in two tiers of precision, and their bytes.

*Codes.* A token's key in one head, times the head's `balance` [D], and its value are encoded for themselves. With x the
values, zero = float16(min x), step = float16((max x - zero) / (2^low_bits - 1)), code = round((x - zero) / step), the value is
zero + step * code. Refinement divides the step around a code in 2^fine_bits: fine = floor(((x - zero) / step - code + 1/2) *
2^fine_bits), and the value is zero + step * (code - 1/2 + (fine + 1/2) / 2^fine_bits). What lies beyond +-65504 is encoded as
that. `balance` is sqrt(max |q| / max |k|) for each channel over the tokens and query heads of a sequence's first call, which
evens out channels that are large in all keys: (q / balance) (balance k) is q k.

*Packing.* Bits lie in planes of 4, 2 and 1, lowest bits first; 3 bits are planes of 2 and 1. Eight tokens (or slots of the
pool) take `bits` rows of bytes, w of them for each plane of w bits: row j of a plane holds the bits of token j, j + w, ...,
from its lowest bits upwards.
"""

from __future__ import annotations

import torch

PACKED = 8
"""Tokens whose codes share bytes."""

LARGEST = 65504.0
"""The largest finite float16."""


def planes(bits: int) -> list[tuple[int, int]]:
    """Return the planes of codes of 1 to 8 bits: the number of the first bit, and how many."""
    found, first = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((first, width))
            first += width
    return found


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes [..., T, D], T a multiple of 8, as bytes [..., T // 8 * bits, D]."""
    *outer, count, size = codes.shape
    groups = codes.reshape(*outer, count // PACKED, PACKED, size)
    rows = []
    for first, width in planes(bits):
        pieces = (groups >> first & (1 << width) - 1).reshape(*outer, count // PACKED, PACKED // width, width, size)
        shifts = torch.arange(0, PACKED, width, device=codes.device)[:, None, None]
        rows.append((pieces << shifts).sum(-3))
    return torch.cat(rows, -2).reshape(*outer, count // PACKED * bits, size).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return what `pack` made bytes of, int64."""
    *outer, count, size = packed.shape
    groups = packed.long().reshape(*outer, count // bits, bits, size)
    codes, row = torch.zeros(*outer, count // bits, PACKED, size, dtype=torch.int64, device=packed.device), 0
    for first, width in planes(bits):
        shifts = torch.arange(0, PACKED, width, device=packed.device)[:, None, None]
        pieces = groups[..., None, row : row + width, :] >> shifts & (1 << width) - 1
        codes += pieces.flatten(-3, -2) << first
        row += width
    return codes.flatten(-3, -2)


def encode(x: torch.Tensor, low_bits: int, fine_bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes of values [..., D], their refinement (both int64), and zero and step [...], float16."""
    x = x.float().clamp(-LARGEST, LARGEST)
    most = (1 << low_bits) - 1
    zero = x.amin(-1).half()
    step = ((x.amax(-1) - zero.float()) / most).clamp(0, LARGEST).half()
    wide = step.float()
    inverse = torch.where(wide > 0, 1 / wide, 0.0)[..., None]
    place = (x - zero.float()[..., None]) * inverse
    codes = (place + 0.5).floor().clamp(0, most)
    fine = ((place - codes + 0.5) * (1 << fine_bits)).floor().clamp(0, (1 << fine_bits) - 1)
    return codes.long(), fine.long(), zero, step


def decode(
    codes: torch.Tensor, fine: torch.Tensor | None, zero: torch.Tensor, step: torch.Tensor, fine_bits: int
) -> torch.Tensor:
    """Return the values, float32, that codes stand for."""
    place = codes.float()
    if fine is not None:
        place = place - 0.5 + (fine.float() + 0.5) / (1 << fine_bits)
    return zero.float()[..., None] + step.float()[..., None] * place
