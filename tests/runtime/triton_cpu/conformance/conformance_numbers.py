"""Dtypes, random values, exact rounding and comparisons for the conformance suite."""

from __future__ import annotations

import os

import numpy as np
import torch

SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
INTEGERS = SIGNED + UNSIGNED
# The interpreter computes bfloat16 wrongly, so that under it the suite leaves the dtype out.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
FLOATS = ("float16", "float32", "float64") if INTERPRETED else ("float16", "bfloat16", "float32", "float64")
NUMBERS = INTEGERS + FLOATS
FLOAT8 = ("float8e4nv", "float8e5", "float8e4b8", "float8e5b16")

# name: (bits of the significand, least exponent of a normal number, greatest finite number)
FORMATS = {
    "float8e4nv": (4, -6, 448.0),
    "float8e5": (3, -14, 57344.0),
    "float8e4b8": (4, -7, 240.0),
    "float8e5b16": (3, -15, 57344.0),
    "float16": (11, -14, 65504.0),
    "bfloat16": (8, -126, float.fromhex("0x1.fep+127")),
    "float32": (24, -126, float.fromhex("0x1.fffffep+127")),
    "float64": (53, -1022, float.fromhex("0x1.fffffffffffffp+1023")),
}

_TORCH = {
    "int1": torch.bool,
    "float8e4nv": torch.float8_e4m3fn,
    "float8e5": torch.float8_e5m2,
    "float8e4b8": torch.float8_e4m3fnuz,
    "float8e5b16": torch.float8_e5m2fnuz,
    "bfloat16": torch.bfloat16,
    **{name: getattr(torch, name) for name in NUMBERS},
}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for the name of a Triton dtype."""
    return _TORCH[name]


def bits(name: str) -> int:
    """Return the width of a dtype in bits."""
    return 1 if name == "int1" else torch_dtype(name).itemsize * 8


def is_float(name: str) -> bool:
    """Return whether the dtype is a floating-point one."""
    return name in FORMATS


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values as NumPy: the same dtype, or float64 where NumPy has no such dtype."""
    if tensor.dtype == torch.bfloat16 or tensor.dtype in (_TORCH[name] for name in FLOAT8):
        return tensor.to(torch.float64).numpy()
    return tensor.numpy()


def round_to(values: np.ndarray, name: str) -> np.ndarray:
    """Return values rounded once, to nearest even, to a floating-point dtype; the result is in float64.

    What is too large for a float8 dtype becomes its greatest number, elsewhere infinity.
    """
    significand, least, greatest = FORMATS[name]
    wide = np.asarray(values).astype(np.longdouble)
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(wide)
        unit = np.maximum(exponent - 1, least) - (significand - 1)
        rounded = np.ldexp(np.rint(np.ldexp(wide, -unit)), unit)
        over = np.abs(rounded) > np.longdouble(greatest)
        limit = greatest if name in FLOAT8 else np.inf
        rounded = np.where(over | np.isinf(wide), np.copysign(np.longdouble(limit), wide), rounded)
        return np.where(np.isnan(wide), wide, rounded).astype(np.float64)


def random_values(
    rng: np.random.Generator,
    shape: int | tuple[int, ...],
    name: str,
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """Return random values that the dtype holds exactly.

    Args:
        rng: source of randomness.
        shape: shape of the result.
        name: dtype; integers come in NumPy's dtype, floats too, with bfloat16 and float8 as float32.
        low: least value; by default the dtype's least integer, or normal deviates for floats.
        high: greatest value.
    """
    if name == "int1":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if name in INTEGERS:
        info = np.iinfo(name)
        low = info.min if low is None else max(int(low), info.min)
        high = info.max if high is None else min(int(high), info.max)
        return rng.integers(low, high, shape, dtype=name, endpoint=True)
    values = rng.standard_normal(shape) * 3 if low is None else rng.uniform(low, high, shape)
    rounded = round_to(values, name)
    return rounded.astype(np.float32 if name == "bfloat16" or name in FLOAT8 else name)


def special_values(name: str) -> np.ndarray:
    """Return the corner values of a dtype: zeros, ones, extremes and, for floats, infinities and NaN."""
    if name in INTEGERS:
        info = np.iinfo(name)
        return np.array([0, 1, info.min, info.max, info.max - 1, info.min + 1, 2], dtype=name)
    _, least, greatest = FORMATS[name]
    values = [0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, greatest, -greatest, 2.0**least, 0.5, 3.0]
    return np.array(values, dtype=np.float32 if name == "bfloat16" else name)


def with_specials(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """Return random values whose first ones are the dtype's corner values."""
    values = random_values(rng, size, name)
    corners = special_values(name)[:size]
    values[: len(corners)] = corners
    return values


def convert(values: np.ndarray, name: str) -> np.ndarray:
    """Return values converted as C does: integers wrap, floats round once and truncate to integers."""
    if name in FORMATS:
        rounded = round_to(values, name)
        return rounded.astype(np.float32 if name == "bfloat16" else name) if name in FLOATS else rounded
    if name == "int1":
        return np.asarray(values) != 0
    with np.errstate(all="ignore"):
        return np.asarray(values).astype(name)


def promoted(x: str, y: str, division: bool = False) -> str:
    """Return the dtype in which Triton computes a binary operation of two tensors."""
    pair = {x, y}
    for wide in ("float64", "float32"):
        if wide in pair:
            return wide
    if "float16" in pair:
        return "float32" if division else "float16"
    if pair == {"bfloat16"}:
        return "float32" if division else "bfloat16"
    if "bfloat16" in pair:
        return "float32"
    if x.startswith("u") == y.startswith("u"):
        return x if bits(x) > bits(y) else y
    unsigned, signed = (x, y) if x.startswith("u") else (y, x)
    return unsigned if bits(unsigned) >= bits(signed) else signed


def assert_same(actual: torch.Tensor | np.ndarray, expected: np.ndarray) -> None:
    """Fail unless all values are equal; NaN equals NaN."""
    found = as_numpy(actual) if isinstance(actual, torch.Tensor) else actual
    wanted = np.asarray(expected)
    assert found.shape == wanted.shape, f"shape {found.shape} instead of {wanted.shape}"
    if found.dtype.kind == "f" or wanted.dtype.kind == "f":
        same = (found == wanted) | (np.isnan(found.astype(np.float64)) & np.isnan(wanted.astype(np.float64)))
    else:
        same = found == wanted
    if not same.all():
        where = np.argwhere(~np.atleast_1d(same))[:5].tolist()
        raise AssertionError(
            f"{(~same).sum()} of {same.size} values differ, first at {where}: "
            f"{np.atleast_1d(found)[~np.atleast_1d(same)][:5]} instead of {np.atleast_1d(wanted)[~np.atleast_1d(same)][:5]}"
        )


def ulps(actual: np.ndarray, expected: np.ndarray, name: str) -> np.ndarray:
    """Return the errors in units of the last place of the dtype at the expected values."""
    significand, least, greatest = FORMATS[name]
    wanted = np.asarray(expected).astype(np.longdouble)
    found = np.asarray(actual).astype(np.longdouble)
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(wanted)
        unit = np.ldexp(np.longdouble(1), np.maximum(exponent - 1, least) - (significand - 1))
        error = np.abs(found - wanted) / unit
        error = np.where((found == wanted) | (np.isnan(found) & np.isnan(wanted)), 0, error)
        overflow = (np.abs(wanted) > np.longdouble(greatest) * (1 - np.longdouble(2.0**-significand))) & (
            np.isinf(found) & (np.sign(found) == np.sign(wanted))
        )
        error = np.where(overflow, 0, error)
        return np.where(np.isnan(error), np.inf, error).astype(np.float64)


def assert_ulps(actual: torch.Tensor | np.ndarray, expected: np.ndarray, name: str, limit: float, flush: bool = False) -> None:
    """Fail where an error exceeds `limit` units of the last place of the dtype.

    Args:
        actual: what the kernel computed.
        expected: the exact values, in float64 or wider.
        name: dtype of `actual`.
        limit: greatest error allowed.
        flush: whether results below the least normal number may be zero.
    """
    found = as_numpy(actual) if isinstance(actual, torch.Tensor) else actual
    wanted = np.asarray(expected)
    error = ulps(found, wanted, name)
    if flush:
        error = np.where((np.abs(wanted) < 2.0 ** FORMATS[name][1]) & (found == 0), 0, error)
    worst = int(np.argmax(error)) if error.size else 0
    if error.size and error.flat[worst] > limit:
        raise AssertionError(
            f"error of {error.flat[worst]:.3g} ulps (limit {limit}) at {worst}: {found.flat[worst]} instead of "
            f"{wanted.flat[worst]}; {(error > limit).sum()} of {error.size} values beyond the limit"
        )


def assert_error_ratio(actual: torch.Tensor | np.ndarray, expected: np.ndarray, limit: float) -> None:
    """Fail where the greatest error exceeds `limit` times the greatest expected magnitude."""
    found = (as_numpy(actual) if isinstance(actual, torch.Tensor) else actual).astype(np.float64)
    wanted = np.asarray(expected).astype(np.float64)
    assert found.shape == wanted.shape, f"shape {found.shape} instead of {wanted.shape}"
    assert np.isfinite(found).all(), f"{(~np.isfinite(found)).sum()} of {found.size} values are not finite"
    ratio = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
    assert ratio <= limit, f"error ratio {ratio:.3g} (limit {limit:.3g})"
