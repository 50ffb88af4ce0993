"""`graphwright::kv_tiered_attention`, `kv_tiered_mass` and `kv_tiered_append`: important tokens kept more precisely.

With n tokens of a sequence in the cache, the first `stored_tokens(n)` are stored in codes, and the other n - stored_tokens(n),
at most residual + group_size - 1 of them, lie as they are in a ring. Tokens leave the ring group by group. Every stored token
has codes of `low_bits`; an exact number of stored tokens, `promoted` of each group, is refined: a pool holds more bits of what
its codes leave over, or its key and value as they are. A token whose refinement goes keeps its codes: it is demoted, not
evicted, and nothing is encoded twice.

*Who is refined.* Each token in the ring or the pool has a score, the attention that it has received so far, summed over
queries and over the query heads of its key head; what earlier calls gave counts less, by `decay` for each new token. When
groups leave the ring, the tokens of the pool and those that leave compete, and those of the highest score are in the pool
then; of equal scores those in the pool come first, by slot, and then the earlier. Tokens that stay keep their slots. The
others take the free slots in order, the lowest slot first. A token that is not in the pool has no score, and never comes back.

How keys and values are encoded, and how codes lie in bytes, is said in `tier_codes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch

from .definition import computed_in, define, expect
from .tier_codes import PACKED, decode, encode, pack, unpack

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

STATES = (
    *("recent_k", "recent_v", "recent_score", "balance", "low_k", "low_v", "ranges", "refined"),
    *("fine_k", "fine_v", "pool_token", "pool_score"),
)
"""What is kept from call to call, in the order of the operations' arguments.

recent_k [B, Hk, N, D] and recent_v [B, Hk, N, Dv], of the model's dtype, with N = residual + group_size: token p at slot p % N.
recent_score [B, Hk, N], float32: of the tokens there.
balance [B, Hk, D], float32: what keys are multiplied by before they are encoded.
low_k [B, Hk, C, D * low_bits / 8] and low_v likewise, uint8: of each head the bytes of C // 8 * low_bits rows of D.
ranges [B, Hk, 4, 8, C // 8], float16: zero and step of keys, zero and step of values, token t at [t % 8, t // 8].
refined [B, Hk, C // 8], uint8: bit t % 8 of byte t // 8 is 1 for a stored token in the pool.
fine_k [B, Hk, P // 8 * fine_bits, D] and fine_v likewise, uint8: of the pool's slots; if fine_bits is 0 [B, Hk, P, D] in the
model's dtype.
pool_token [B, Hk, P], int32, and pool_score [B, Hk, P], float32: the token in each slot, and its score.
P is at least C // group_size * promoted, a multiple of 8, and not 0. Whatever is not in use may hold anything.
"""

_STATE_TEXT = ", ".join(f"Tensor {name}" for name in STATES)
_FORMAT_TEXT = "int low_bits, int fine_bits, int residual, int group_size, int promoted"
ATTENTION_SCHEMA = (
    f"kv_tiered_attention(Tensor q, Tensor k, Tensor v, Tensor past, {_STATE_TEXT}, *, float scale, {_FORMAT_TEXT}) "
    "-> (Tensor, Tensor)"
)
MASS_SCHEMA = (
    f"kv_tiered_mass(Tensor q, Tensor k, Tensor lse, Tensor past, {_STATE_TEXT}, *, Tensor? count=None, float scale, "
    f"{_FORMAT_TEXT}, int window) -> (Tensor, Tensor, Tensor)"
)
APPEND_SCHEMA = (
    f"kv_tiered_append(Tensor q, Tensor k, Tensor v, Tensor past, Tensor recent_mass, Tensor pool_mass, Tensor own_mass, "
    f"{_STATE_TEXT}, *, Tensor? count=None, {_FORMAT_TEXT}, float decay, bool balanced) "
    f"-> ({', '.join(['Tensor'] * len(STATES))})"
)


@dataclass(frozen=True)
class Tiers:
    """The format of a cache in two tiers.

    Args:
        low_bits: of the codes of every stored token: 2, 3 or 4.
        fine_bits: that a refined token has beyond these, 1 to 6; 0 if it is held as it is.
        residual: tokens that are never stored in codes, at least 0.
        group_size: tokens that leave the ring together: 8, 16 or 32.
        promoted: stored tokens in the pool for each group that has left, 0 to group_size.
    """

    low_bits: int
    fine_bits: int
    residual: int
    group_size: int
    promoted: int

    def problem(self) -> str:
        """Return what is out of its range, "" if nothing is."""
        if self.low_bits not in (2, 3, 4):
            return f"low_bits must be 2, 3 or 4, got {self.low_bits}"
        if not 0 <= self.fine_bits <= PACKED - self.low_bits:
            return f"fine_bits must be 0 to {PACKED - self.low_bits}, got {self.fine_bits}"
        if self.group_size not in (8, 16, 32):
            return f"group_size must be 8, 16 or 32, got {self.group_size}"
        if self.residual < 0:
            return f"residual must be at least 0, got {self.residual}"
        if not 0 <= self.promoted <= self.group_size:
            return f"promoted must be 0 to {self.group_size}, got {self.promoted}"
        return ""

    def room(self, groups: int) -> int:
        """Return how many tokens there is room for with so many times eight in codes."""
        return groups * PACKED // self.group_size * self.group_size + self.ring - 1

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.residual + self.group_size

    def stored_tokens(self, filled: int) -> int:
        """Return how many of so many tokens are stored in codes."""
        return max(filled - self.residual, 0) // self.group_size * self.group_size

    def pool_tokens(self, filled: int) -> int:
        """Return how many of so many tokens are in the pool."""
        return self.stored_tokens(filled) // self.group_size * self.promoted


class _Row:
    """One sequence's cache: its entries, and where they lie."""

    def __init__(self, states: dict[str, torch.Tensor], row: int, past: int, tiers: Tiers) -> None:
        self.tiers = tiers
        self.at = {name: state[row] for name, state in states.items()}
        # Tokens are beside each other here; what is written into the view gets into the state.
        self.at["ranges"] = self.at["ranges"].mT
        groups = self.at["refined"].shape[1]
        for name in ("low_k", "low_v"):
            self.at[name] = self.at[name][:, : groups * PACKED].view(len(self.at[name]), groups * tiers.low_bits, -1)
        self.room = tiers.room(groups)
        self.past = min(past, self.room)
        self.stored, self.pooled = tiers.stored_tokens(self.past), tiers.pool_tokens(self.past)
        self.recent = torch.arange(self.stored, self.past, device=self.at["refined"].device) % tiers.ring

    def pool(self) -> torch.Tensor:
        """Return the tokens [Hk, pooled] of the pool's slots in use."""
        return self.at["pool_token"][:, : self.pooled].long()

    def entries(self, name: str) -> torch.Tensor:
        """Return the keys or values of all tokens, [Hk, past, D] in float32."""
        at, tiers = self.at, self.tiers
        first = 0 if name == "k" else 2
        groups = -(-self.stored // PACKED)
        codes = unpack(at[f"low_{name}"][:, : groups * tiers.low_bits], tiers.low_bits)[:, : self.stored]
        zero, step = (at["ranges"][:, first + j, :groups].flatten(1)[:, : self.stored] for j in range(2))
        stored = decode(codes, None, zero, step, 0)
        if self.pooled:
            stored = stored.scatter(
                1, self.pool()[..., None].expand(-1, -1, codes.shape[-1]), self._refined(name, codes, zero, step)
            )
        if name == "k":
            stored = self._unbalanced(stored)
        return torch.cat((stored, at[f"recent_{name}"][:, self.recent].float()), 1)

    def _refined(self, name: str, codes: torch.Tensor, zero: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        at, bits = self.at, self.tiers.fine_bits
        fine = at[f"fine_{name}"]
        if not bits:
            exact = fine[:, : self.pooled].float()
            return exact * at["balance"][:, None] if name == "k" else exact
        fine = unpack(fine, bits)[:, : self.pooled]
        tokens = self.pool()
        codes = codes.gather(1, tokens[..., None].expand_as(fine))
        return decode(codes, fine, zero.gather(1, tokens), step.gather(1, tokens), bits)

    def _unbalanced(self, keys: torch.Tensor) -> torch.Tensor:
        return keys / self.at["balance"][:, None] if keys.shape[1] else keys


def _rows(states: tuple[torch.Tensor, ...], past: torch.Tensor, tiers: Tiers) -> list[_Row]:
    named = dict(zip(STATES, states, strict=True))
    return [_Row(named, row, int(past[row]), tiers) for row in range(len(past))]


def _scores(row: _Row, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the scores [Hk, H / Hk, T, past + T] of a sequence's queries; -inf for later keys."""
    heads, tokens = k.shape[0], k.shape[1]
    keys = torch.cat((row.entries("k").to(computed_in(q.dtype)), k.to(computed_in(q.dtype))), 1)
    scores = q.to(keys.dtype).reshape(heads, -1, *q.shape[1:]) @ keys[:, None].transpose(-1, -2) * scale
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    hidden = torch.cat((later.new_zeros(tokens, row.past), later), 1)
    return scores.masked_fill(hidden, -torch.inf)


def kv_tiered_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: torch.Tensor, *states: torch.Tensor, scale: float, **tiers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of new tokens over the cache, and over each other as they are.

    Args:
        q: [B, H, T, D], floating point.
        k: [B, Hk, T, D], H a multiple of Hk: of the same tokens; they are not in the cache.
        v: [B, Hk, T, Dv].
        past: [B], int64: tokens in the cache, at most `Tiers.room` of C // 8.
        states: see `STATES`.
        scale: factor of the scores.
        tiers: see `Tiers`.

    Returns:
        [B, H, T, Dv] in q's dtype, and the logarithms of the sums of the exponentials of the scores, [B, H, T], float32.
    """
    out, sums = [], []
    for at, row in enumerate(_rows(states, past, Tiers(**tiers))):
        scores = _scores(row, q[at], k[at], scale)
        values = torch.cat((row.entries("v").to(scores.dtype), v[at].to(scores.dtype)), 1)
        out.append((torch.softmax(scores, -1) @ values[:, None]).flatten(0, 1))
        sums.append(scores.logsumexp(-1).flatten(0, 1))
    return torch.stack(out).to(q.dtype), torch.stack(sums).float()


def kv_tiered_mass_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    past: torch.Tensor,
    *states: torch.Tensor,
    count: torch.Tensor | None = None,
    scale: float,
    window: int,
    **tiers: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the attention that tokens get from the new ones, summed over these and the query heads of their key head.

    Args:
        q: as in `kv_tiered_attention`.
        k: likewise.
        lse: what that returned.
        past: as there.
        states: as there.
        count: [B], int64: how many of a sequence's new tokens there are, the others only fill the row; None for all.
        scale: as there.
        window: only the last so many queries count; 0 for all.
        tiers: as there.

    Returns:
        Float32, of the slots of the ring [B, Hk, N], those of the pool [B, Hk, P], and the new tokens [B, Hk, T]. 0 for a slot
        that is not in use.
    """
    format_ = Tiers(**tiers)
    batch, heads, tokens = k.shape[:3]
    recent = q.new_zeros((batch, heads, format_.ring), dtype=torch.float32)
    pool = q.new_zeros((batch, heads, states[STATES.index("pool_score")].shape[2]), dtype=torch.float32)
    own = q.new_zeros((batch, heads, tokens), dtype=torch.float32)
    for at, row in enumerate(_rows(states, past, format_)):
        weights = torch.exp(_scores(row, q[at], k[at], scale) - lse[at].reshape(heads, -1, lse.shape[2])[..., None])
        last = tokens if count is None else int(count[at])
        first = max(last - window, 0) if window else 0
        mass = weights[:, :, first:last].sum((1, 2)).float()
        pool[at, :, : row.pooled] = mass.gather(1, row.pool())
        recent[at, :, row.recent] = mass[:, row.stored : row.past]
        own[at] = mass[:, row.past :]
    return recent, pool, own


def kv_tiered_append_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor,
    recent_mass: torch.Tensor,
    pool_mass: torch.Tensor,
    own_mass: torch.Tensor,
    *states: torch.Tensor,
    count: torch.Tensor | None = None,
    decay: float,
    balanced: bool,
    **tiers: int,
) -> tuple[torch.Tensor, ...]:
    """Return the states with new tokens behind the `past` ones; what there is no room for is left out.

    Args:
        q: as in `kv_tiered_attention`; read when a sequence is new (past is 0), for its balance.
        k: likewise.
        v: likewise.
        past: likewise.
        recent_mass: [B, Hk, N], float32: what is added to the scores of the ring's tokens.
        pool_mass: [B, Hk, P], float32: likewise, of the pool's.
        own_mass: [B, Hk, T], float32: the scores of the new tokens.
        states: see `STATES`.
        count: as in `kv_tiered_mass`.
        decay: what scores are multiplied by for each new token, above 0, 1 for nothing to be forgotten.
        balanced: balance the channels of keys; if not, balance is 1.
        tiers: see `Tiers`.

    Returns:
        The states in order.
    """
    new = tuple(state.clone() for state in states)
    format_ = Tiers(**tiers)
    for at, row in enumerate(_rows(new, past, format_)):
        number = min(k.shape[2] if count is None else int(count[at]), row.room - row.past)
        if number <= 0:
            continue
        for name, mass, used in (("pool_score", pool_mass, slice(row.pooled)), ("recent_score", recent_mass, row.recent)):
            row.at[name][:, used] = row.at[name][:, used] * decay**number + mass[at][:, used]
        if row.past == 0:
            row.at["balance"][:] = _balance(q[at, :, :number], k[at, :, :number]) if balanced else 1.0
        _append(row, k[at, :, :number], v[at, :, :number], own_mass[at, :, :number])
    return new


def _balance(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    most_q = q.float().abs().amax(1).reshape(k.shape[0], -1, q.shape[2]).amax(1)
    most_k = k.float().abs().amax(1)
    return torch.where((most_q > 0) & (most_k > 0), (most_q / most_k).sqrt(), 1.0)


def _append(row: _Row, k: torch.Tensor, v: torch.Tensor, score: torch.Tensor) -> None:
    at, tiers = row.at, row.tiers
    filled = row.past + k.shape[1]
    stored = tiers.stored_tokens(filled)
    all_of = {
        name: torch.cat((at[f"recent_{name}"][:, row.recent], new), 1) for name, new in (("k", k), ("v", v), ("score", score))
    }
    leaving = stored - row.stored
    if leaving:
        _store(row, {name: entries[:, :leaving] for name, entries in all_of.items()}, tiers.pool_tokens(filled))
    slots = torch.arange(stored, filled, device=k.device) % tiers.ring
    for name, entries in all_of.items():
        at[f"recent_{name}"][:, slots] = entries[:, leaving:]


def _store(row: _Row, leaving: dict[str, torch.Tensor], pooled: int) -> None:
    """Encode the tokens that leave the ring, and let them and the pool's compete."""
    at, tiers = row.at, row.tiers
    count = leaving["score"].shape[1]
    groups = slice(row.stored // PACKED, (row.stored + count) // PACKED)
    fine = {}
    for first, name in ((0, "k"), (2, "v")):
        x = leaving[name].float() * (at["balance"][:, None] if name == "k" else 1.0)
        codes, fine[name], zero, step = encode(x, tiers.low_bits, tiers.fine_bits)
        rows = slice(groups.start * tiers.low_bits, groups.stop * tiers.low_bits)
        at[f"low_{name}"][:, rows] = pack(codes, tiers.low_bits)
        at["ranges"][:, first, groups] = zero.reshape(len(zero), -1, PACKED)
        at["ranges"][:, first + 1, groups] = step.reshape(len(step), -1, PACKED)
    at["refined"][:, groups] = 0
    for head in range(leaving["score"].shape[0]):
        scores = torch.cat((at["pool_score"][head, : row.pooled], leaving["score"][head]))
        kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        kept[scores.argsort(descending=True, stable=True)[:pooled]] = True
        free = torch.cat(((~kept[: row.pooled]).nonzero()[:, 0], torch.arange(row.pooled, pooled, device=scores.device)))
        taken = kept[row.pooled :].nonzero()[:, 0]
        old = at["pool_token"][head, free[free < row.pooled]].long()
        marks = unpack(at["refined"][head, :, None], 1)
        marks[old], marks[row.stored + taken] = 0, 1
        at["refined"][head] = pack(marks, 1)[:, 0]
        at["pool_token"][head, free] = (row.stored + taken).int()
        at["pool_score"][head, free] = leaving["score"][head, taken]
        for name in "kv":
            held = at[f"fine_{name}"][head]
            if tiers.fine_bits:
                unpacked = unpack(held, tiers.fine_bits)
                unpacked[free] = fine[name][head, taken]
                held[:] = pack(unpacked, tiers.fine_bits)
            else:
                held[free] = leaving[name][head, taken]


def _check(q: torch.Tensor, k: torch.Tensor, past: torch.Tensor, states: tuple[Any, ...], tiers: Tiers) -> None:
    expect(q.dim() == 4 and k.dim() == 4, "q and k must be [batch, heads, tokens, features]")
    expect(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    expect(past.dim() == 1 and past.dtype == torch.int64, f"past must be int64 [batch], got {past.dtype} {tuple(past.shape)}")
    expect(not tiers.problem(), tiers.problem())
    for name, dims in (("recent_k", 4), ("ranges", 5), ("refined", 3), ("pool_score", 3)):
        expect(states[STATES.index(name)].dim() == dims, f"{name} must have {dims} dimensions")
    recent = states[0].shape
    expect(recent[2] == tiers.ring, f"the ring has {recent[2]} slots, residual and group_size are {tiers.ring}")


def _attention_fake(q: Any, k: Any, v: Any, past: Any, *states: Any, scale: float, **tiers: int) -> Any:
    _check(q, k, past, states, Tiers(**tiers))
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _mass_fake(
    q: Any, k: Any, lse: Any, past: Any, *states: Any, count: Any = None, scale: float, window: int, **tiers: int
) -> Any:
    _check(q, k, past, states, Tiers(**tiers))
    expect(window >= 0, f"window must be at least 0, got {window}")
    batch, heads, tokens = k.shape[:3]
    slots = (Tiers(**tiers).ring, states[STATES.index("pool_score")].shape[2], tokens)
    return tuple(q.new_empty((batch, heads, n), dtype=torch.float32) for n in slots)


def _append_fake(
    q: Any, k: Any, v: Any, past: Any, *rest: Any, count: Any = None, decay: float, balanced: bool, **tiers: int
) -> Any:
    states = rest[3:]
    expect(0 < decay <= 1, f"decay must be above 0 and at most 1, got {decay}")
    _check(q, k, past, states, Tiers(**tiers))
    return tuple(torch.empty_like(state, memory_format=torch.contiguous_format) for state in states)


def _attention_flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    given: Any = node.args
    batch, heads, queries, features = program.shape(given[0])
    keys, values = program.shape(given[4 + STATES.index("refined")])[2] * PACKED, program.shape(given[2])[3]
    return batch * heads * queries * keys * (2 * features + 2 * values + 8)


def _mass_flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    given: Any = node.args
    batch, heads, queries, features = program.shape(given[0])
    keys = program.shape(given[4 + STATES.index("pool_score")])[2] + program.shape(given[4])[2] + queries
    return batch * heads * queries * keys * (2 * features + 4)


kv_tiered_attention = define(ATTENTION_SCHEMA, kv_tiered_attention_reference, _attention_fake, _attention_flops)
kv_tiered_mass = define(MASS_SCHEMA, kv_tiered_mass_reference, _mass_fake, _mass_flops)
kv_tiered_append = define(APPEND_SCHEMA, kv_tiered_append_reference, _append_fake, lambda program, node: 0)
