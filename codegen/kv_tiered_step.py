"""The steps of programs with caches in two tiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.errors import LoweringError
from graphwright.ir.ops.kv_tiered import STATES, Tiers
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep, View

from .attention_parts import LARGEST_DIM
from .external import view_of
from .fusion import is_item
from .indexing import contiguous_strides, size_text
from .kv_tiered_append_text import append_parameters, append_text
from .kv_tiered_attention_text import attention_parameters, attention_text
from .kv_tiered_mass_text import mass_parameters, mass_text
from .kv_tiered_text import STRIDES, TieredSpec
from .loops import Stored
from .lowering import arguments
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker

KEYS = 64
"""Keys that a program takes at a time."""

GROUPS = 32
"""Tokens in codes that a program takes at a time."""

ROWS = 64
"""Rows of queries that a program takes at most."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Call:
    """A call of one of the operations, and what its step is made of."""

    def __init__(self, program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> None:
        self.program, self.node, self.place, self.sources = program, node, place, sources
        self.given = arguments(node)
        q, k, states = self.given["q"], self.given["k"], [self.given[name] for name in STATES]
        (self.batch, heads, self.tokens, head_dim), key_heads = program.shape(q), program.shape(k)[1]
        value_dim = program.shape(states[STATES.index("recent_v")])[3]
        dtype, sizes = q.meta["val"].dtype, (heads, key_heads, head_dim, value_dim)
        if (
            dtype not in _DTYPES
            or not all(isinstance(n, int) for n in sizes)
            or max(int(head_dim), int(value_dim)) > LARGEST_DIM
        ):
            raise LoweringError(
                f"{node.name}: attention over a cache in two tiers is generated for float32, float16 and bfloat16 and heads of "
                f"up to {LARGEST_DIM} features; this one is {dtype}, {head_dim} and {value_dim} features"
            )
        self.key_heads = int(key_heads)
        self.slots = program.shape(states[STATES.index("pool_score")])[2]
        self.spec = TieredSpec(
            head_dim=int(head_dim),
            value_dim=int(value_dim),
            group=int(heads) // self.key_heads,
            tiers=Tiers(*(self.given[name] for name in ("low_bits", "fine_bits", "residual", "group_size", "promoted"))),
            one=self.tokens == 1,
            counted=self.given.get("count") is not None,
            window=self.given.get("window", 0),
            decay=self.given.get("decay", 1.0),
            balanced=self.given.get("balanced", True),
        )
        rows = self.tokens * self.spec.group
        smallest = 16 if device == "cuda" else 1
        fitting = max(smallest, 1 << (rows - 1).bit_length()) if isinstance(rows, int) else ROWS
        self.rows, self.block_m = rows, min(fitting, ROWS)

    def results(self) -> dict[int, fx.Node]:
        """Return the nodes of the results that something reads, by their numbers."""
        return {user.args[1]: user for user in self.node.users if is_item(user) and user.users}  # type: ignore[misc]

    def step(
        self,
        stem: str,
        body: str,
        parameters: Sequence[str],
        results: Sequence[str],
        grid: Sequence[Any],
        constants: dict[str, int],
    ) -> tuple[KernelStep, ...]:
        """Return the step that launches a kernel.

        Args:
            stem: of the kernel's name.
            body: its text.
            parameters: their names: "p_" and a tensor's, a number's, or a stride's.
            results: the names of the results.
            grid: of the launch.
            constants: of the launch.
        """
        program, node, found = self.program, self.node, self.results()
        named = {name: value for name, value in self.given.items() if isinstance(value, fx.Node)}
        named |= {name: found[at] for at, name in enumerate(results) if at in found and name not in named}
        values: dict[str, Any] = {
            "tokens": size_text(self.tokens),
            "capacity": size_text(program.shape(self.given["low_k"])[2]),
            "slots": size_text(self.slots),
            "scale": float(self.given.get("scale", 0.0)),
        }
        for name, tensor in named.items():
            values[f"p_{name}"] = view_of(self.place(tensor), program.shape(tensor))
            for stride, value in zip(STRIDES.get(name, ()), self.place(tensor).strides, strict=False):
                values[stride] = size_text(value)
        written = tuple(self.place(found[at]).buffer for at in range(len(results)) if at in found)
        ordered = tuple(values[name] for name in parameters)
        reads = tuple(dict.fromkeys(a.buffer for a in ordered if isinstance(a, View) and a.buffer not in written))
        provenance = provenance_of([node])
        kernel = self.sources.add(stem, body, provenance)
        return (
            KernelStep(node.name, kernel, (grid[0], *map(size_text, grid[1:])), ordered, constants, reads, written, provenance),
        )


def _attention(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    call = _Call(program, node, place, sources, device)
    grid = (_blocks(call.rows, call.block_m), call.key_heads, call.batch)
    tiles = {"BLOCK_M": call.block_m, "BLOCK_N": KEYS, "BLOCK_G": GROUPS}
    return call.step("kv_tiered_attention", attention_text(call.spec), attention_parameters(), ("out", "lse"), grid, tiles)


def _mass(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    call = _Call(program, node, place, sources, device)
    parts = [_blocks(count, KEYS) for count in (call.slots, call.spec.tiers.ring, call.tokens)]
    blocks = " + ".join(map(str, parts))
    results = ("recent_mass", "pool_mass", "own_mass")
    tiles = {"BLOCK_M": call.block_m, "BLOCK_N": KEYS}
    grid = (blocks, call.key_heads, call.batch)
    return call.step("kv_tiered_mass", mass_text(call.spec), mass_parameters(call.spec), results, grid, tiles)


def _append(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    call = _Call(program, node, place, sources, device)
    parameters = append_parameters(call.spec)
    grid = (call.key_heads, call.batch)
    return call.step("kv_tiered_append", append_text(call.spec), parameters, STATES, grid, {"BLOCK_N": KEYS})


def _blocks(count: Any, block: int) -> int | str:
    size = size_text(count)
    return -(-size // block) if isinstance(size, int) else f"({size} + {block - 1}) // {block}"


def _accepts(reader: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    given = arguments(reader)
    if any(given.get(name) is arg for name in ("q", "k", "v")):
        return bool(stored.strides[-1] == 1)
    expected = contiguous_strides(shape)
    return all(n == 1 or stride == wanted for n, stride, wanted in zip(shape, stored.strides, expected, strict=True))


_IN_PLACE = dict(enumerate(STATES))

MAKERS = {
    dialect.kv_tiered_attention: StepMaker(make=_attention, accepts=_accepts),
    dialect.kv_tiered_mass: StepMaker(make=_mass, accepts=_accepts),
    dialect.kv_tiered_append: StepMaker(make=_append, accepts=_accepts, in_place=_IN_PLACE),
}
"""Operation -> what makes its steps."""
