"""Caches in few bits: what a format keeps of a layer, and the layers that can be kept in it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.errors import OptionError
from graphwright.ir.ops.kv_quantized import BITS, CHANNEL, TOKEN
from graphwright.ir.program import Program, calls

from .states import new_state

Parameters = Literal["float16", "float32"]

LARGEST_GROUP = 256
"""Capacities are multiples of it."""

LEAST_CHANNELS = 8
"""Groups of fewer channels of a value would keep more scales than codes."""

STATES = ("codes", "scale", "minimum", "ring")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values of a layer are kept.

    Args:
        bits: of a code: 2, 4 or 8.
        group_size: consecutive tokens of a group of keys, a power of two from 16 to 256, and the most channels of a group of
            values.
        residual: the newest tokens, which are kept as they are; a multiple of `group_size`.
        parameters: "float16" or "float32", the dtype of scales and minima.

    Raises:
        OptionError: a value is out of its range.
    """

    bits: int
    group_size: int
    residual: int
    parameters: Parameters = "float16"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"bits must be {', '.join(map(str, BITS))}, got {self.bits}")
        size = self.group_size
        if not 16 <= size <= LARGEST_GROUP or size & (size - 1):
            raise OptionError(f"group_size must be a power of two from 16 to {LARGEST_GROUP}, got {size}")
        if self.residual < 0 or self.residual % size:
            raise OptionError(f"residual must be a multiple of group_size, {size}, and at least 0, got {self.residual}")
        if self.parameters not in ("float16", "float32"):
            raise OptionError(f"parameters must be float16 or float32, got {self.parameters!r}")

    @property
    def slots(self) -> int:
        """Tokens in the ring of those that are kept as they are."""
        return self.residual + self.group_size

    @property
    def dtype(self) -> torch.dtype:
        """Of scales and minima."""
        return torch.float16 if self.parameters == "float16" else torch.float32

    def shapes(self, size: int, capacity: Any, along: str) -> dict[str, tuple[Any, Any]]:
        """Return the sizes of each state of one head beside the batch and the heads.

        Args:
            size: features of a token.
            capacity: tokens that there is room for, a number or a symbolic one.
            along: "channel" for keys, "token" for values.
        """
        groups = (capacity // self.group_size, size) if along == CHANNEL else (size // self.channels(size), capacity)
        return {"codes": (capacity, size * self.bits // 8), "scale": groups, "minimum": groups, "ring": (self.slots, size)}

    def channels(self, size: int) -> int:
        """Return how many channels of a value of `size` are in one group."""
        return math.gcd(self.group_size, size)

    def why_not(self, site: Site) -> str:
        """Return why a layer cannot be kept in this format, "" if it can."""
        if site.dtype not in _DTYPES:
            return f"keys and values are {site.dtype}; float32, float16 and bfloat16 can be quantised"
        for what, size in (("keys", site.key_size), ("values", site.value_size)):
            if size * self.bits % 8:
                return f"the codes of {what} of {size} features do not fill whole bytes at {self.bits} bits"
        if self.channels(site.value_size) < LEAST_CHANNELS:
            return f"values of {site.value_size} features have no equal groups of at least {LEAST_CHANNELS} channels"
        return ""

    def bytes_per_token(self, site: Site) -> float:
        """Return the bytes of a layer's codes, scales and minima for each token that there is room for."""
        both = 2 * self.dtype.itemsize
        keys = site.key_size * (self.bits / 8 + both / self.group_size)
        values = site.value_size * (self.bits / 8 + both / self.channels(site.value_size))
        return site.heads * (keys + values)

    def bytes_per_sequence(self, site: Site) -> int:
        """Return the bytes of a layer's ring."""
        return site.heads * self.slots * (site.key_size + site.value_size) * site.dtype.itemsize


@dataclass(frozen=True)
class Site:
    """An attention over a cache in the model's dtype, and what it is appended by.

    Args:
        layer: its number among the attentions over caches.
        node: the attention.
        appends: of keys and of values.
    """

    layer: int
    node: fx.Node
    appends: tuple[fx.Node, fx.Node]

    @property
    def caches(self) -> tuple[fx.Node, fx.Node]:
        """The states of keys and of values."""
        return self.appends[0].args[0], self.appends[1].args[0]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        dtype: torch.dtype = self.caches[0].meta["val"].dtype
        return dtype

    @property
    def heads(self) -> int:
        """Heads of keys."""
        return int(self.caches[0].meta["val"].shape[1])

    @property
    def key_size(self) -> int:
        """Features of a key."""
        return int(self.caches[0].meta["val"].shape[3])

    @property
    def value_size(self) -> int:
        """Features of a value."""
        return int(self.caches[1].meta["val"].shape[3])

    @property
    def bytes_per_token(self) -> float:
        """Bytes for each token as it is."""
        return float(self.heads * (self.key_size + self.value_size) * self.dtype.itemsize)


def attentions(program: Program) -> list[fx.Node]:
    """Return the attentions over caches of any format, in order."""
    names = [(node, getattr(node.target, "_opname", "")) for node in calls(program.graph)]
    return [node for node, name in names if name.startswith("kv_") and name.endswith("attention")]


def site_of(program: Program, node: fx.Node, layer: int, *, lists: bool = False) -> Site | str:
    """Return an attention as a site, or why it is none.

    Args:
        program: with caches.
        node: an attention over a cache.
        layer: its number.
        lists: whether an attention whose prompts see listed keys may be one.
    """
    if node.target is dialect.kv_sparse_attention and not lists:
        return "its prompts see listed keys, which no cache of this format knows of"
    if node.target not in (dialect.kv_attention, dialect.kv_sparse_attention):
        return "its cache is of another format already"
    given = arguments(node)
    appends = (given["k"], given["v"])
    for append in appends:
        if append.target is not dialect.kv_append or append.args[0].name not in program.states:
            return f"%{append.name} is no cache that is appended to"
        if set(append.users) - {node, program.output} or set(append.args[0].users) != {append}:
            return f"the cache %{append.args[0].name} is read by others too"
    return Site(layer, node, appends)


def rewrite(program: Program, site: Site, form: CacheFormat) -> dict[fx.Node, fx.Node]:
    """Let a layer keep keys and values in a format.

    The old states stay until `exchange_states` takes them out.

    Args:
        program: it is changed.
        site: of it.
        form: one that the site can be kept in.

    Returns:
        The new states, and what is the value of each for the next call.
    """
    given = arguments(site.node)
    new = [append.args[1] for append in site.appends]
    states: list[list[fx.Node]] = []
    for cache, along in zip(site.caches, (CHANNEL, TOKEN), strict=True):
        batch, heads, capacity, size = cache.meta["val"].shape
        dtypes = {"codes": torch.uint8, "ring": site.dtype}
        states.append(
            [
                new_state(program, f"{cache.name}_{name}", (batch, heads, *shape), dtypes.get(name, form.dtype))
                for name, shape in form.shapes(size, capacity, along).items()
            ]
        )
    options = {"bits": form.bits, "group": form.group_size}
    kept = {name: value for name in ("predicate", "bias", "softcap", "minimum_tokens") if (value := given.get(name))}
    lists = [given[name] for name in ("blocks", "columns") if name in given]
    values: dict[fx.Node, fx.Node] = {}
    with program.graph.inserting_before(site.node):
        attention = program.call(
            dialect.kv_quantized_sparse_attention if lists else dialect.kv_quantized_attention,
            *(given["q"], *new, given["past"], *states[0], *states[1], *lists, given["operands"], given["sink"]),
            like=site.node,
            **options,
            **kept,
            scale=given["scale"],
        )
        for made, one, along in zip(states, new, (CHANNEL, TOKEN), strict=True):
            append = program.call(
                dialect.kv_quantized_append, *made, one, given["past"], like=site.node, **options, along=along
            )
            values |= {state: program.call(operator.getitem, append, at, like=site.node) for at, state in enumerate(made)}
    site.node.replace_all_uses_with(attention)
    program.graph.erase_node(site.node)
    return values


def each_site(program: Program, *, lists: bool = False) -> Iterator[tuple[int, fx.Node, Site | str]]:
    """Yield the number, the node and the site of each attention over a cache, or why it is none; see `site_of`."""
    for layer, node in enumerate(attentions(program)):
        yield layer, node, site_of(program, node, layer, lists=lists)
