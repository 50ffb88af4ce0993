"""The attention template: Triton source for one fused flash-attention forward kernel, from a specification."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graphwright.ir.errors import LoweringError
from graphwright.ir.ops.block_index import TILE

from .attention_parts import LARGEST_DIM, Part, cut
from .attention_text import HELPERS, kernel_body

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What an attention kernel computes. Lengths, offset, scale and strides are arguments of the kernel.

    Query q, counted from 0, stands at position q + offset among the keys. A query that sees no key gets zeros.

    Args:
        head_dim: D, elements of a query and of a key, 1 to 256.
        value_dim: Dv, elements of a value and of an output, 1 to 256.
        dtype: of queries, keys, values and outputs: "float32", "bfloat16" or "float16". Scores and sums are float32.
        group: query heads that share a key and value head.
        causal: a query sees no key after its position.
        window: a query sees only keys after position - window; at least 1, None for all.
        right_window: a query sees only keys before position + right_window; at least 1, None for all.
        sinks: a query sees its first keys whatever the window says; needs a window.
        free: a query before this position sees keys whatever the right window says; needs one, and no causality.
        chunk: tokens of a chunk, counted from position 0, for the two below.
        chunks_behind: a query sees no key before so many chunks before its own; None for no limit.
        chunks_ahead: a query sees no key after so many chunks after its own; None for no limit.
        predicate: a further condition for a key to be seen: Triton text of an i1 over i_b, i_h (scalars), o_q ([BLOCK_M, 1])
            and o_k ([1, BLOCK_N]). It is also evaluated for queries and keys past their last, so its loads must mask these.
        bias: Triton text of a float32 over the same names, added to the scaled score. -inf hides the key.
        operands: names of further kernel parameters that `predicate` and `bias` use.
        softcap: scores become softcap * tanh(score / softcap) before the bias is added.
        sink: p_sink[i_h], a float32, takes part in the softmax as the score of a key whose value is zero.
        lse: store the logarithm of the sum of the exponentials of the scores in p_lse: float32, contiguous, [B, H, S] or,
            if ragged, [tokens, H]; -inf for a query that sees no key.
        ragged: sequences are packed one after the other: tensors are [tokens, heads, dim], and p_starts[i_b] is the first
            token of sequence i_b and p_starts[i_b + 1] the one past its last. i_b, o_q and o_k count sequences and tokens
            in a sequence, and the offset is 0.
        cached: keys and values are caches with slots for more than there are: the offset of sequence i_b is p_past[i_b], an
            int64, and there are offset + query_length keys.
        listed: 64 queries see the keys that lists name. A row of p_blocks, of blocks_row int32, is the number of blocks of 64
            keys (negative for all keys) and their first keys, descending; a row of p_columns, of columns_row int32, is the
            number of single keys and these. BLOCK_M and BLOCK_N are 64. No limits are told but causality.
        fresh: if cached: sequences with tokens before this call are left out, and their outputs stay as they are.
        one: there is one query, and a program computes it for all heads that share a key head i_h, which are its rows: o_q
            counts them from the first. The query's own key and value, p_new_k and p_new_v, are put into the caches first.
        ring: the caches are rings: a token is in slot position % capacity, and slots are keys in the order in which they lie.
            No limits are told, since these would be of positions.

    Raises:
        LoweringError: a value is out of its range.
    """

    head_dim: int
    value_dim: int
    dtype: str = "float32"
    group: int = 1
    causal: bool = False
    window: int | None = None
    right_window: int | None = None
    sinks: int = 0
    free: int = 0
    chunk: int | None = None
    chunks_behind: int | None = None
    chunks_ahead: int | None = None
    predicate: str | None = None
    bias: str | None = None
    operands: tuple[str, ...] = ()
    softcap: float | None = None
    sink: bool = False
    lse: bool = False
    ragged: bool = False
    cached: bool = False
    listed: bool = False
    fresh: bool = False
    one: bool = False
    ring: bool = False

    def __post_init__(self) -> None:
        for what, size in (("head_dim", self.head_dim), ("value_dim", self.value_dim)):
            if not 1 <= size <= LARGEST_DIM:
                raise LoweringError(f"attention: {what} must be 1 to {LARGEST_DIM}, got {size}")
        if self.dtype not in DTYPES:
            raise LoweringError(f"attention: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for what in ("group", "window", "right_window", "chunk"):
            count = getattr(self, what)
            if count is not None and count < 1:
                raise LoweringError(f"attention: {what} must be at least 1, got {count}")
        if (self.sinks and self.window is None) or (self.free and (self.right_window is None or self.causal)):
            raise LoweringError("attention: sinks need a window that they are exempt from, and free queries a right window")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise LoweringError(f"attention: softcap must be positive and finite, got {self.softcap}")

    @property
    def reach(self) -> int | None:
        """Keys before position + reach are seen; None for all."""
        limits = [limit for limit in (1 if self.causal else None, self.right_window) if limit is not None]
        return min(limits, default=None)

    @property
    def starts(self) -> bool:
        """Whether a query sees no keys far before its own but sinks."""
        return self.window is not None or self.chunks_behind is not None

    @cached_property
    def query_parts(self) -> tuple[Part, ...]:
        """How the columns of queries and keys are cut."""
        return cut(self.head_dim)

    @cached_property
    def value_parts(self) -> tuple[Part, ...]:
        """How the columns of values and outputs are cut."""
        return cut(self.value_dim)


def attention_parameters(spec: AttentionSpec) -> tuple[str, ...]:
    """Return the names of the kernel's parameters in order, without the constants BLOCK_M and BLOCK_N, which follow.

    The pointers p_q, p_k, p_v, p_out, then p_lse and p_sink where there are such, p_starts (int32) if the kernel is ragged,
    p_past if it is cached, p_new_k and p_new_v if there is one query, p_blocks and p_columns if there are lists; the operands
    of the mask; query_length, key_length and offset, unless ragged (if cached query_length and the capacity of the caches, for
    one query the capacity alone), and blocks_row if there are lists; scale, what products of queries and keys are multiplied
    by; and the strides in elements of q, k, v and out, each along the batch (unless ragged), the heads and the tokens, as
    q_batch, q_head, q_token, then those of new_k and new_v. The stride along the last dimension is 1. columns_row is last.
    """
    names = ["p_q", "p_k", "p_v", "p_out"]
    names += ["p_lse"] * spec.lse + ["p_sink"] * spec.sink + ["p_starts"] * spec.ragged + ["p_past"] * spec.cached
    names += ["p_new_k", "p_new_v"] * spec.one + ["p_blocks", "p_columns"] * spec.listed
    names += spec.operands
    names += [*attention_lengths(spec), "scale"]
    dims = ("head", "token") if spec.ragged else ("batch", "head", "token")
    names += [f"{tensor}_{dim}" for tensor in ("q", "k", "v", "out") for dim in dims]
    names += [f"{tensor}_{dim}" for tensor in ("new_k", "new_v") for dim in ("batch", "head")] * spec.one
    names += ["columns_row"] * spec.listed
    return tuple(names)


def attention_lengths(spec: AttentionSpec) -> tuple[str, ...]:
    """Return the parameters that change from call to call, which the kernel is not specialised for."""
    rows = ("blocks_row",) * spec.listed
    if spec.cached:
        return ("capacity",) if spec.one else ("query_length", "capacity", *rows)
    return () if spec.ragged else ("query_length", "key_length", "offset", *rows)


def attention_tiles(spec: AttentionSpec, target_is_cuda: bool, *, query_length: int | None = None) -> dict[str, int]:
    """Return the constants BLOCK_M and BLOCK_N, and num_warps and num_stages, to launch a kernel with.

    Args:
        spec: what the kernel computes.
        target_is_cuda: whether it runs on a CUDA device, not on a CPU.
        query_length: S, where it is known to be always the same; a program of few queries needs no large block.
    """
    if spec.listed:
        return {"BLOCK_M": TILE, "BLOCK_N": TILE, "num_warps": 4, "num_stages": 2}
    wide = max(sum(part.size for part in parts) for parts in (spec.query_parts, spec.value_parts))
    # On a CPU two blocks of queries at a time halve the traffic of keys; where the products are short, it is little, and where
    # they are long, the tiles no longer fit in the first-level cache.
    queries = 128 if not target_is_cuda and 32 < wide <= 96 else 64
    if query_length is not None:
        smallest = 16 if target_is_cuda else 1
        queries = min(queries, max(smallest, 1 << max(query_length - 1, 0).bit_length()))
    keys = 32 if target_is_cuda and wide > 128 else 64
    if spec.one and not target_is_cuda:
        # The next block is fetched while one is worked on; few keys at a time spread the fetching evenly.
        keys = 32 if wide * (4 if spec.dtype == "float32" else 2) <= 128 else 16
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": 4, "num_stages": 2}


def attention_source(spec: AttentionSpec, name: str, *, provenance: Sequence[str] = ()) -> str:
    """Return the text of a module that holds the kernel `name` and what it imports.

    The grid is (cdiv(query_length, BLOCK_M), H, B), or for a ragged kernel (cdiv(length of the longest sequence, BLOCK_M), H,
    sequences), or for one query (cdiv(group, BLOCK_M), key heads, B).

    Args:
        spec: what the kernel computes.
        name: its name.
        provenance: lines of a comment at the top, such as the graph nodes that it stands for.

    Raises:
        LoweringError: an operand has a name that is none, or that the kernel uses itself.
    """
    plain = _module(replace(spec, predicate=None, bias=spec.bias and "0.0", operands=()), name, ())
    taken = set(re.findall(r"\w+", plain))
    for operand in spec.operands:
        if not operand.isidentifier() or operand in taken:
            raise LoweringError(f"attention: no operand can be called {operand!r} in {name}; p_in0, in0_stride are usual names")
        taken.add(operand)
    return _module(spec, name, provenance)


def _module(spec: AttentionSpec, name: str, provenance: Sequence[str]) -> str:
    lines = [f"# {line}".rstrip() for line in provenance]
    lines += ["import triton", "import triton.language as tl"]
    lines += ["from triton.language.extra import libdevice"] * (spec.softcap is not None)
    lengths = ", ".join(f'"{length}"' for length in attention_lengths(spec))
    lines += [
        "",
        "",
        *HELPERS.splitlines(),
        "",
        "",
        f"@triton.jit(do_not_specialize=[{lengths}])" if lengths else "@triton.jit",
        f"def {name}(",
    ]
    lines += [f"    {parameter}," for parameter in attention_parameters(spec)]
    lines += ["    BLOCK_M: tl.constexpr,", "    BLOCK_N: tl.constexpr,", "):"]
    lines += [f"    {line}".rstrip() for line in kernel_body(spec)]
    return "\n".join(lines) + "\n"
