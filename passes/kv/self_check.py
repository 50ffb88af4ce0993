"""Comparing a derived program with the plain one, on random tokens."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.ir.errors import PassError
from graphwright.ir.program import Program

from .derivation import CAPACITY, PAST
from .full_inputs import MASK, POSITIONS

ROOM = 3
"""Slots that stay unfilled."""

CHUNKS = ((5, (5, 3)), (4, (4, 4)), (1, (1, 1)), (1, (1, 1)), (2, (2, 1)), (1, (1, 1)))
"""Tokens of each call, and how many of them count in each of two sequences."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a result, of the largest result."""


def check_derived(plain: Program, derived: Program) -> None:
    """Run both programs on the same random tokens: the plain one at once, the derived one in unequal parts.

    The two sequences are at different positions, and unfilled slots hold NaN.

    Raises:
        PassError: the results differ.
    """
    high = derived.dimensions[CAPACITY].high
    total = sum(size for size, _ in CHUNKS) + ROOM
    if high is not None and high < total:
        raise PassError(f"cached-decode: the model has {high} positions, too few to compare the derived program at {total}")
    lengths = [sum(count[row] for _, count in CHUNKS) for row in range(2)]
    tokens = _tokens(plain, max(lengths))
    expected = _plain(plain, tokens)
    scale = float(expected.abs().max())
    tolerance = TOLERANCES.get(expected.dtype, 1e-3) * max(scale, 1e-30)
    module = derived.module()
    past = torch.zeros(2, dtype=torch.int64, device=tokens.device)
    caches = _caches(derived)
    for size, counts in CHUNKS:
        rows = [tokens[row, int(past[row]) : int(past[row]) + size] for row in range(2)]
        rows = [torch.cat((row, tokens[0, : size - len(row)])) for row in rows]
        with torch.no_grad():
            result, *caches = module(torch.stack(rows), past, *caches)
        for row, count in enumerate(counts):
            start = int(past[row])
            difference = (result[row, :count] - expected[row, start : start + count]).abs().max()
            if not float(difference) <= tolerance:
                raise PassError(
                    f"cached-decode: the derived program computes something else: tokens {start} to {start + count - 1} of "
                    f"sequence {row} differ by {float(difference):.3g} where {tolerance:.3g} is allowed. This is a bug in the "
                    "derivation: please report the model."
                )
        past = past + torch.tensor(counts, device=past.device)


def _tokens(plain: Program, count: int) -> torch.Tensor:
    """Return random tokens [2, count, ...]: numbers below the size of the table that they are looked up in."""
    spec, node = _main(plain)
    generator = torch.Generator().manual_seed(0)
    shape = [2, count, *(int(n) for n in spec[2:])]
    if node.meta["val"].dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(node.meta["val"].dtype).to(node.meta["val"].device)
    tables = [int(table.meta["val"].shape[0]) for table in _tables(node)]
    return torch.randint(0, min(tables, default=2), shape, generator=generator).to(node.meta["val"].device)


def _tables(node: fx.Node) -> list[fx.Node]:
    found = []
    for user in node.users:
        if user.target is torch.ops.aten.embedding.default and user.args[1] is node:
            found.append(user.args[0])
        elif user.op == "call_function" and len(user.all_input_nodes) == 1:
            found += _tables(user)
    return found  # type: ignore[return-value]


def _main(program: Program) -> tuple[tuple[int | str, ...], fx.Node]:
    for spec, node in zip(program.signature.tensors, program.inputs, strict=True):
        if spec.name not in (MASK, POSITIONS):
            return spec.shape, node
    raise PassError("cached-decode: the program has no input with tokens")


def _plain(plain: Program, tokens: torch.Tensor) -> torch.Tensor:
    """Return the plain program's result for all tokens at once."""
    given = []
    for spec in plain.signature.tensors:
        if spec.name == MASK:
            given.append(torch.ones(tokens.shape[:2], dtype=spec.dtype, device=tokens.device))
        elif spec.name == POSITIONS:
            given.append(torch.arange(tokens.shape[1], dtype=spec.dtype, device=tokens.device).expand(tokens.shape[:2]))
        else:
            given.append(tokens)
    with torch.no_grad():
        results = plain.module()(*given)
    wanted = tokens.shape[:2]
    return next(r for r in results if isinstance(r, torch.Tensor) and r.dim() == 3 and r.shape[:2] == wanted)


def _caches(derived: Program) -> list[torch.Tensor]:
    total = sum(size for size, _ in CHUNKS) + ROOM
    named = {"batch": 2, CAPACITY: total}
    caches = []
    for node, spec in zip(derived.inputs, derived.signature.tensors, strict=True):
        if node.name in derived.states:
            shape = [2, *(named.get(str(n), n) for n in spec.shape[1:])]
            caches.append(torch.full([int(n) for n in shape], torch.nan, dtype=spec.dtype, device=node.meta["val"].device))
    assert PAST in derived.signature.arguments
    return caches
