"""What a cache in two tiers keeps of which tokens, and attention over it."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from graphwright.ir import dialect
from graphwright.ir.ops.kv_tiered import STATES, Tiers
from graphwright.ir.ops.tier_codes import decode, encode, pack, unpack

CAPACITY, HEADS, GROUP, SIZE = 160, 2, 2, 32
SMALL = Tiers(3, 5, 16, 8, 2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Let tensors this small be computed by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def empty(tiers: Tiers, batch: int = 1) -> list[torch.Tensor]:
    """Return states that hold NaN, and bytes of all ones."""
    slots = CAPACITY // tiers.group_size * tiers.promoted // 8 * 8 + 8
    fine = ((slots // 8 * tiers.fine_bits, SIZE), torch.uint8) if tiers.fine_bits else ((slots, SIZE), torch.float32)
    ring, low = (tiers.ring, SIZE), (CAPACITY, SIZE * tiers.low_bits // 8)
    shapes = {
        **{"recent_k": (ring, torch.float32), "recent_v": (ring, torch.float32), "recent_score": (ring[:1], torch.float32)},
        **{"balance": ((SIZE,), torch.float32), "low_k": (low, torch.uint8), "low_v": (low, torch.uint8)},
        **{"ranges": ((4, 8, CAPACITY // 8), torch.float16), "refined": ((CAPACITY // 8,), torch.uint8)},
        **{"fine_k": fine, "fine_v": fine, "pool_token": ((slots,), torch.int32), "pool_score": ((slots,), torch.float32)},
    }
    assert tuple(shapes) == STATES
    fills = {torch.uint8: 255, torch.int32: 1 << 30}
    return [torch.full((batch, HEADS, *n), fills.get(dtype, torch.nan), dtype=dtype) for n, dtype in shapes.values()]


class Cache:
    """A cache that tokens are put into call by call."""

    def __init__(self, tiers: Tiers, batch: int = 1, window: int = 0, balanced: bool = True, decay: float = 1.0) -> None:
        self.tiers, self.window, self.balanced, self.decay = tiers, window, balanced, decay
        self.states, self.past = empty(tiers, batch), torch.zeros(batch, dtype=torch.int64)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.states[STATES.index(name)]

    def attend(self, q, k, v):
        """Return attention, and its log-sum-exps, without changing anything."""
        return dialect.kv_tiered_attention(q, k, v, self.past, *self.states, scale=0.2, **asdict(self.tiers))

    def masses(self, q, k, lse, count=None):
        """Return the attention that tokens get."""
        options = {"scale": 0.2, "window": self.window, "count": count, **asdict(self.tiers)}
        return dialect.kv_tiered_mass(q, k, lse, self.past, *self.states, **options)

    def call(self, q, k, v, count=None, edit=lambda masses: masses):
        """Return attention, and put the tokens in."""
        out, lse = self.attend(q, k, v)
        masses = edit(self.masses(q, k, lse, count))
        options = {"balanced": self.balanced, "decay": self.decay, "count": count, **asdict(self.tiers)}
        self.states = list(dialect.kv_tiered_append(q, k, v, self.past, *masses, *self.states, **options))
        self.past = self.past + (k.shape[2] if count is None else count)
        return out

    def pool(self, row: int = 0, head: int = 0) -> list[int]:
        """Return the tokens in the pool, by slot."""
        return self["pool_token"][row, head, : self.tiers.pool_tokens(int(self.past[row]))].tolist()


def drawn(tokens: int, batch: int = 1, seed: int = 0, outliers: float = 1.0):
    """Return random queries, keys and values; a channel of all keys is `outliers` times as large."""
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, HEADS * n, tokens, SIZE, generator=made) for n in (GROUP, 1, 1))
    k[..., 3] = (k[..., 3] + 1) * outliers
    return q, k, v


def run(cache: Cache, given, parts: list[int]) -> torch.Tensor:
    """Return attention of all tokens, which come in parts."""
    return torch.cat([cache.call(*call) for call in zip(*(t.split(parts, 2) for t in given), strict=True)], 2)


def exact(q, k, v) -> torch.Tensor:
    """Return attention of whole sequences."""
    return dialect.attention(q, k, v, [], None, predicate="q - k >= 0", scale=0.2)


def error(tiers: Tiers, given, parts: list[int], **options) -> float:
    """Return the norm of what attention over the cache is off by."""
    return float((run(Cache(tiers, len(given[0]), **options), given, parts) - exact(*given)).norm())


PARTS = [40, *[1] * 9, 25, 30]


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_hold_codes(bits) -> None:
    """Codes of any number of bits come back from exactly as many bits of memory."""
    codes = torch.randint(0, 1 << bits, (2, 24, 5))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits), codes)
    assert packed.nbytes * 8 == codes.numel() * bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_within_half_a_step(bits) -> None:
    """So they are with refinement, of the step divided; what is constant comes back but for the rounding of zero."""
    x = torch.randn(100, SIZE) * torch.logspace(-3, 3, 100)[:, None]
    x[-1] = -7.3
    for fine_bits in (0, 8 - bits):
        codes, fine, zero, step = encode(x, bits, fine_bits)
        assert codes.max() < 1 << bits
        assert fine.max() < 1 << fine_bits
        back = decode(codes, fine if fine_bits else None, zero, step, fine_bits)
        rounding = x.abs().amax(1) * 2**-11 + 1e-6
        assert ((back - x).abs().amax(1) <= step.float() * 2**-fine_bits / 2 + rounding).all()
        assert (back[-1] - x[-1]).abs().max() <= 7.3 * 2**-11


def test_what_float16_cannot_hold_is_encoded_as_its_largest() -> None:
    """There is neither infinity nor NaN, and the other tokens are as they were."""
    x = torch.randn(3, SIZE)
    x[1, 0], x[1, 1] = 1e6, -1e6
    codes, _, zero, step = encode(x, 4, 4)
    back = decode(codes, None, zero, step, 4)
    assert back[1, 0] == pytest.approx(65504, rel=1e-2)
    assert torch.equal(back[[0, 2]], decode(*(t if t is None else t[[0, 2]] for t in (codes, None, zero, step)), 4))


@pytest.mark.parametrize("parts", [PARTS, [110], [1] * 30])
def test_with_all_tokens_kept_as_they_are_it_is_attention(parts) -> None:
    """Queries get what they get in the whole sequence, balanced or not: (q / b) (b k) is q k."""
    given = drawn(sum(parts), outliers=30)
    for balanced in (True, False):
        got = run(Cache(Tiers(2, 0, 16, 8, 8), balanced=balanced), given, parts)
        torch.testing.assert_close(got, exact(*given), rtol=1e-4, atol=1e-5)


def test_tokens_of_a_call_and_of_the_ring_are_exact() -> None:
    """A prompt, and what is no more than residual + group_size - 1 tokens, reads no codes."""
    given = drawn(110)
    torch.testing.assert_close(run(Cache(SMALL), given, [110]), exact(*given), rtol=1e-4, atol=1e-5)
    given = drawn(SMALL.ring)
    torch.testing.assert_close(run(Cache(SMALL), given, [5, 17, 1, 1]), exact(*given), rtol=1e-4, atol=1e-5)


def test_errors_fall_as_bits_and_the_share_of_important_tokens_grow() -> None:
    """With more bits below, more above, and more tokens above, attention is nearer to the exact one."""
    given = drawn(sum(PARTS), batch=2)
    by_low = [error(Tiers(low, 8 - low, 16, 8, 2), given, PARTS) for low in (2, 3, 4)]
    assert by_low[0] > 1.5 * by_low[1] > 2 * by_low[2] > 0
    by_share = [error(Tiers(2, 6, 16, 8, share), given, PARTS) for share in (0, 2, 5, 8)]
    assert by_share[0] > by_share[1] > by_share[2] > 5 * by_share[3] > 0
    by_fine = [error(Tiers(2, fine, 16, 8, 8), given, PARTS) for fine in (1, 3, 6)]
    assert by_fine[0] > 2 * by_fine[1] > 4 * by_fine[2] > 0


def test_balance_saves_the_bits_of_other_channels() -> None:
    """With a channel that is large in all keys, attention is nearer to the exact one when channels are balanced."""
    given = drawn(sum(PARTS), outliers=30)
    tiers = Tiers(4, 4, 16, 8, 0)
    assert error(tiers, given, PARTS) < 0.7 * error(tiers, given, PARTS, balanced=False)


def test_few_bits_for_all_beat_forgetting_half() -> None:
    """A token that nobody looked at is found again where the unimportant half has 3 bits, and not where it is gone."""
    q, k, v = drawn(100)
    needle = 30
    k[:, :, needle] *= -1
    q[:, :, :-1] += 0.5 * (k[:, :, :4].mean(2) - k[:, :, needle]).repeat_interleave(GROUP, 1)[:, :, None]
    q[:, :, -1] = 12 * torch.nn.functional.normalize(k[:, :, needle], dim=-1).repeat_interleave(GROUP, 1)
    cache = Cache(Tiers(3, 5, 16, 8, 4))
    run(cache, (q[:, :, :-1], k[:, :, :-1], v[:, :, :-1]), [40, *[1] * 9, 20, 30])
    last = tuple(t[:, :, -1:] for t in (q, k, v))
    wanted = exact(q, k, v)[:, :, -1:]
    mixed = cache.attend(*last)[0]
    for head in range(HEADS):
        pool = cache.pool(head=head)
        assert needle not in pool
        kept = torch.tensor([*sorted(pool), *range(cache.tiers.stored_tokens(99), 100)])
        rows = slice(head * GROUP, (head + 1) * GROUP)
        weights = torch.softmax(0.2 * last[0][:, rows] @ k[:, head : head + 1, kept].mT, -1)
        evicted = weights @ v[:, head : head + 1, kept]
        assert (mixed - wanted)[:, rows].norm() < 0.3 * (evicted - wanted[:, rows]).norm()


def test_attention_chooses_better_than_chance() -> None:
    """Where some tokens get most of the attention, it pays to refine those."""
    q, k, v = drawn(150)
    heavy = torch.randperm(150, generator=torch.Generator().manual_seed(1))[:30]
    q += 1.0
    k[:, :, heavy] += 0.5

    def shuffled(masses):
        return [torch.rand(mass.shape, generator=torch.Generator().manual_seed(2)) for mass in masses]

    def found(edit) -> tuple[float, float]:
        cache = Cache(Tiers(2, 6, 16, 8, 2))
        parts = [60, 20, *[1] * 9, 21, 40]
        calls = zip(*(t.split(parts, 2) for t in (q, k, v)), strict=True)
        out = torch.cat([cache.call(*call, edit=edit) for call in calls], 2)
        hits = sum(token in heavy for token in cache.pool())
        return float((out - exact(q, k, v)).norm()), hits / len(cache.pool())

    chosen, by_chance = found(lambda masses: masses), found(shuffled)
    assert chosen[0] < 0.8 * by_chance[0]
    assert chosen[1] > 2 * by_chance[1]


def test_attention_is_given_out_whole() -> None:
    """Where all stored tokens are in the pool, what tokens get is one for each query that counts, and head."""
    cache = Cache(Tiers(2, 6, 16, 8, 8), window=3)
    given = drawn(70)
    run(cache, tuple(t[:, :, :60] for t in given), [40, 20])
    q, k, v = (t[:, :, 60:] for t in given)
    _, lse = cache.attend(q, k, v)
    recent, pool, own = cache.masses(q, k, lse)
    total = recent.sum(2) + pool.sum(2) + own.sum(2)
    torch.testing.assert_close(total, torch.full((1, HEADS), 3.0 * GROUP))
    assert pool[:, :, cache.tiers.pool_tokens(60) :].abs().sum() == 0
    counted = cache.masses(q, k, lse, torch.tensor([2]))
    torch.testing.assert_close(sum(mass.sum(2) for mass in counted), torch.full((1, HEADS), 2.0 * GROUP))


def test_the_pool_holds_a_fixed_share_and_nobody_comes_back() -> None:
    """After every call: as many different tokens as the share says, marked as such, and none that was demoted before."""
    cache, before, made = Cache(Tiers(2, 6, 16, 8, 3)), set(), torch.Generator().manual_seed(0)
    calls = zip(*(t.split(PARTS, 2) for t in drawn(sum(PARTS))), strict=True)
    changed = False
    for call in calls:
        stored = cache.tiers.stored_tokens(int(cache.past))
        cache.call(*call, edit=lambda masses: [torch.rand(mass.shape, generator=made) for mass in masses])
        filled = int(cache.past)
        assert filled - cache.tiers.stored_tokens(filled) < cache.tiers.ring
        pool = set(cache.pool())
        assert len(pool) == len(cache.pool()) == cache.tiers.stored_tokens(filled) // 8 * 3
        assert {token for token in pool if token < stored} <= before
        changed |= bool(before - pool)
        marks = unpack(cache["refined"][0, 0, : cache.tiers.stored_tokens(filled) // 8, None], 1)[:, 0]
        assert set(marks.nonzero()[:, 0].tolist()) == pool
        before = pool
    assert changed


def test_the_best_of_pool_and_leaving_stay_and_ties_go_to_the_pool() -> None:
    """Scores decide, of equal ones the pool's; those that stay keep their slots, others take the free ones in order."""
    cache = Cache(Tiers(2, 6, 0, 8, 2))
    scores = [5, 1, 1, 7, 1, 1, 1, 1, *[3, 7, 1, 1, 1, 1, 1, 9]]

    def edit(masses):
        own = torch.tensor([scores[int(cache.past) :][: masses[2].shape[2]]], dtype=torch.float32)
        return [torch.zeros_like(masses[0]), torch.zeros_like(masses[1]), own.expand_as(masses[2])]

    q, k, v = drawn(24)
    cache.call(*(t[:, :, :8] for t in (q, k, v)), edit=edit)
    assert cache.pool() == [0, 3]
    cache.call(*(t[:, :, 8:16] for t in (q, k, v)), edit=edit)
    assert cache.pool() == [0, 3, 9, 15]
    scores += [9, 9, 8, 1, 7, 7, 1, 1]
    cache.call(*(t[:, :, 16:] for t in (q, k, v)), edit=edit)
    assert cache.pool() == [16, 3, 9, 15, 17, 18]


def test_earlier_attention_is_forgotten() -> None:
    """Scores fade by a factor for each new token that counts, and then get what the call gives."""
    q, k, v = drawn(20)
    cache = Cache(SMALL, decay=0.5)
    cache.call(*(t[:, :, :16] for t in (q, k, v)))
    before = cache["recent_score"][:, :, :16].clone()
    last = tuple(t[:, :, 16:] for t in (q, k, v))
    recent = cache.masses(*last[:2], cache.attend(*last)[1], torch.tensor([3]))[0]
    cache.call(*last, count=torch.tensor([3]))
    torch.testing.assert_close(cache["recent_score"][:, :, :16], before * 0.125 + recent[:, :, :16])


def test_sequences_and_heads_do_not_touch_each_other() -> None:
    """A sequence alone gives what it gives among others at other positions, and heads can be exchanged."""
    given, tiers = drawn(90, batch=3), SMALL
    counts = [torch.tensor([40, 7, 0]), torch.tensor([20, 40, 33])]
    together = Cache(tiers, 3)
    for count in counts:
        start = together.past
        rows = [torch.stack([t[row, :, int(start[row]) :][:, :40] for row in range(3)]) for t in given]
        together.call(*rows, count=count)
    for row in range(3):
        alone = Cache(tiers)
        for count in counts:
            if count[row]:
                start = int(alone.past)
                alone.call(*(t[row : row + 1, :, start : start + int(count[row])] for t in given))
        last = tuple(t[:, :, 85:86] for t in given)
        expected = alone.attend(*(t[row : row + 1] for t in last))[0]
        torch.testing.assert_close(together.attend(*last)[0][row : row + 1], expected)
        assert alone.pool() == together.pool(row)
    swapped = Cache(tiers, 3)
    flipped = (given[0].unflatten(1, (HEADS, GROUP)).flip(1).flatten(1, 2), given[1].flip(1), given[2].flip(1))
    direct = run(Cache(tiers, 3), given, [60, 30])
    torch.testing.assert_close(run(swapped, flipped, [60, 30]).unflatten(1, (HEADS, GROUP)).flip(1).flatten(1, 2), direct)


def test_the_same_calls_leave_the_same_states() -> None:
    """Bit by bit, whatever the memory held before."""
    given = drawn(sum(PARTS), batch=2)
    first, second = Cache(SMALL, 2), Cache(SMALL, 2)
    second.states = [torch.randint(0, 99, state.shape).to(state.dtype) for state in second.states]
    assert torch.equal(run(first, given, PARTS), run(second, given, PARTS))
    assert first.pool() == second.pool()
    assert torch.equal(first["balance"], second["balance"])
    assert torch.equal(first["recent_score"], second["recent_score"])


def test_what_there_is_no_room_for_is_left_out() -> None:
    """Tokens beyond the room leave the others as they are."""
    given = drawn(230)
    cache, whole = Cache(SMALL), Cache(SMALL)
    cache.call(*given)
    room = SMALL.room(CAPACITY // 8)
    whole.call(*(t[:, :, :room] for t in given), edit=lambda m: m)
    assert cache.tiers.stored_tokens(room) == CAPACITY
    assert torch.equal(cache["low_k"], whole["low_k"])


def test_arguments_that_do_not_fit_are_refused() -> None:
    """A ring of another size, and a format that is none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cache, given = Cache(SMALL), [torch.empty(1, HEADS * n, 1, SIZE) for n in (GROUP, 1, 1)]
        cache.tiers = Tiers(3, 5, 24, 8, 2)
        with pytest.raises(RuntimeError, match="the ring has 24 slots, residual and group_size are 32"):
            cache.attend(*given)
        cache.tiers = Tiers(5, 3, 16, 8, 2)
        with pytest.raises(RuntimeError, match="low_bits must be 2, 3 or 4, got 5"):
            cache.attend(*given)
