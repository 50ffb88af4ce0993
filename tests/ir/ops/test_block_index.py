"""Lists of keys: what they cover, what the estimate finds, and attention over them by the reference."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir import dialect
from graphwright.ir.errors import VerifyError
from graphwright.ir.ops.block_index import DENSE, FORCED, TILE, attention_sums, covering_blocks, largest
from graphwright.ir.ops.sparse_attention import listed_keys

CAUSAL = "q - k >= 0"
SCALE = 0.35


def drawn(tokens: int, batch: int = 2, heads: int = 4, key_heads: int = 2, size: int = 8) -> list[torch.Tensor]:
    """Return queries, keys and values."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, n, tokens, size, generator=generator) for n in (heads, key_heads, key_heads)]


def lists(q, k, vertical=40, slash=40, fixed=False, past=None, count=None, **options):
    """Return the lists of an estimate that is the same for all heads, or of lists with a value for each."""
    heads = q.shape[1]
    values = {name: v if isinstance(v, list) else [v] * heads for name, v in (("vertical", vertical), ("slash", slash))}
    flags = fixed if isinstance(fixed, list) else [fixed] * heads
    return dialect.block_index(q, k, past, count=count, **values, fixed=flags, scale=SCALE, **options)


def attended(q, k, v, blocks, columns, predicate=CAUSAL) -> torch.Tensor:
    """Return attention over listed keys."""
    return dialect.sparse_attention(q, k, v, blocks, columns, [], None, predicate=predicate, scale=SCALE)


def dense(q, k, v) -> torch.Tensor:
    """Return causal attention over all keys."""
    return dialect.attention(q, k, v, [], None, predicate=CAUSAL, scale=SCALE)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 700), max_size=40))
def test_blocks_cover_diagonals(distances) -> None:
    """All keys that 64 queries see at the distances are in a block, blocks do not overlap, and there are no needless ones."""
    starts = covering_blocks(sorted(distances))
    assert starts == sorted(starts, reverse=True)
    assert all(near - far >= TILE for near, far in itertools.pairwise(starts))
    covered = {key for start in starts for key in range(start, start + TILE)}
    assert {query - distance for distance in distances for query in range(TILE)} <= covered
    assert len(starts) <= len(distances)
    assert all(covered & set(range(TILE - 1 - max(distances), TILE)) for _ in starts)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.data())
def test_blocks_stay_within_their_lists(tokens, data) -> None:
    """There are no more blocks than lists have room for, and none starts more than 63 keys before the farthest distance."""
    distances = data.draw(st.sets(st.integers(0, tokens - 1)) | st.just({0, tokens - 1, max(tokens - 2, 0)}))
    starts = covering_blocks(sorted(distances))
    assert len(starts) <= (tokens + TILE - 1) // TILE + 1
    assert all(-(tokens - 1) - (TILE - 1) <= start <= 0 for start in starts)


def test_blocks_of_near_distances_are_those_of_the_queries() -> None:
    """The nearest keys are covered by the block of the queries and those before it, and not by keys that come later."""
    assert covering_blocks([0]) == [0]
    assert covering_blocks(list(range(64))) == [0, -64]
    assert covering_blocks([0, 1, 65, 300]) == [0, -64, -128, -300]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_density_one_is_dense(tokens) -> None:
    """With all columns and all diagonals every key is seen, at lengths around the size of a block too."""
    q, k, v = drawn(tokens)
    assert torch.equal(attended(q, k, v, *lists(q, k, tokens, tokens)), dense(q, k, v))
    assert torch.equal(attended(q, k, v, *lists(q, k, 0, tokens)), dense(q, k, v))
    assert torch.equal(attended(q, k, v, *lists(q, k, tokens, 0)), dense(q, k, v))


def test_no_key_is_listed_twice() -> None:
    """Blocks are disjoint and descending, single keys ascending, outside of them, and not after the queries."""
    q, k, _ = drawn(333)
    blocks, columns = lists(q, k, 60, 20)
    singles = 0
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(6)).tolist():
        starts = blocks[b, h, i, 1 : 1 + blocks[b, h, i, 0]].tolist()
        keys = columns[b, h, i, 1 : 1 + columns[b, h, i, 0]].tolist()
        every = [key for start in starts for key in range(start, start + TILE)] + keys
        assert len(every) == len(set(every))
        assert starts == sorted(starts, reverse=True)
        assert keys == sorted(keys)
        assert all(0 <= key < (i + 1) * TILE for key in keys)
        assert all(-TILE < start <= i * TILE for start in starts)
        singles += len(keys)
    assert singles > 100


def test_sums_of_every_batch_and_head() -> None:
    """Columns and diagonals are summed for each sequence and head by itself, as a loop over the weights does."""
    q, k, _ = drawn(100, batch=3)
    weights = torch.softmax(
        (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * SCALE).masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf),
        -1,
    )[:, :, -TILE:]
    for b in range(3):
        for h in range(4):
            columns, diagonals = attention_sums(q[b, h], k[b, h // 2], 99, SCALE, 0.0)
            torch.testing.assert_close(columns, weights[b, h].sum(0))
            wanted = torch.zeros(100)
            for row in range(TILE):
                for key in range(36 + row + 1):
                    wanted[36 + row - key] += weights[b, h, row, key]
            torch.testing.assert_close(diagonals, wanted)
            blocks, keys = lists(q, k, 33, 31)
            alone = lists(q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1], 33, 31)
            assert torch.equal(blocks[b, h], alone[0][0, 0])
            assert torch.equal(keys[b, h], alone[1][0, 0])


def test_planted_columns_and_diagonals_are_found() -> None:
    """Keys that all queries look at, and distances at which all look back, are seen by every query."""
    tokens, batch, distance = 600, 2, 217
    generator = torch.Generator().manual_seed(0)
    marks = [[150, 301, 402], [77, 260, 511]]
    q = torch.randn(batch, 2, tokens, 64, generator=generator) * 0.1
    k = torch.randn(batch, 1, tokens, 64, generator=generator) * 0.1
    q[..., 0] += 6.0
    for b, keys in enumerate(marks):
        k[b, 0, keys, 0] += 8.0
    # Head 1 looks back: the code of a position is that of the position before it by the distance.
    codes = torch.nn.functional.normalize(torch.randn(tokens, 62, generator=generator), dim=-1) * 12.0
    k[:, 0, :, 2:] += codes
    q[:, 1, distance:, 2:] += codes[: tokens - distance]
    q[:, 1, :, 0] = 0.0
    seen = listed_keys(*lists(q, k, vertical=FORCED + 3, slash=FORCED + 1), tokens)
    at = torch.arange(tokens)
    for b, keys in enumerate(marks):
        for key in keys:
            assert seen[b, 0, key:, key].all()
        assert seen[b, 1, at[distance:], at[: tokens - distance]].all()
    assert seen.float().mean() < 0.5


def test_recall_is_above_that_of_an_a_shape() -> None:
    """Of attention with sinks and a far diagonal the estimate finds more than first and nearest keys with the same tiles."""
    tokens, distance = 1000, 421
    generator = torch.Generator().manual_seed(1)
    codes = torch.nn.functional.normalize(torch.randn(tokens, 32, generator=generator), dim=-1) * 8.0
    q, k = torch.randn(1, 1, tokens, 33, generator=generator), torch.randn(1, 1, tokens, 33, generator=generator)
    k[0, 0, :, :32] += codes
    q[0, 0, distance:, :32] += codes[: tokens - distance]
    q[..., 32], k[..., :2, 32] = 3.0, 3.0
    weights = torch.softmax((q @ k.mT * SCALE).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf), -1)
    recalls, costs = [], []
    for slash, fixed in ((FORCED + 1, False), (190, True)):
        made = lists(q, k, FORCED, slash, fixed)
        recalls.append(float((weights * listed_keys(*made, tokens)).sum() / tokens))
        costs.append(int(made[0][..., 0].sum()))
    assert costs[0] <= costs[1]
    assert recalls[0] > recalls[1] + 0.2


def test_the_error_falls_with_the_density() -> None:
    """The more columns and diagonals, the more is seen, and the smaller the error."""
    q, k, v = drawn(400, batch=1)
    expected, errors = dense(q, k, v), []
    for count in (31, 60, 120, 240, 400):
        errors.append(float((attended(q, k, v, *lists(q, k, count, count // 4)) - expected).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.2 * errors[1] > errors[4] == 0.0


def test_heads_and_sequences_are_apart() -> None:
    """Key heads that are repeated, heads in another order, and another batch give the same lists."""
    q, k, v = drawn(300)
    options = {"vertical": [31, 40, 50, 60], "slash": [50, 40, 33, 31], "fixed": [False, True, False, False]}
    made = lists(q, k, **options)
    repeated = lists(q, k.repeat_interleave(2, 1), **options)
    order = [2, 0, 3, 1]
    moved = {name: [value[h] for h in order] for name, value in options.items()}
    turned = lists(q[:, order], k.repeat_interleave(2, 1)[:, order], **moved)
    swapped = lists(q.flip(0), k.flip(0), **options)
    for one, other, third, fourth in zip(made, repeated, turned, swapped, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[:, order], third)
        assert torch.equal(one.flip(0), fourth)
    assert torch.equal(attended(q, k, v, *made)[1:], attended(q[1:], k[1:], v[1:], *(t[1:] for t in made)))


def test_padding_behind_is_not_estimated_from() -> None:
    """A sequence that ends earlier gets the lists that it has alone, whatever the padding holds."""
    q, k, _ = drawn(320)
    q[0, :, 200:], k[0, :, 200:] = torch.nan, torch.nan
    made = lists(q, k, 40, 35, count=torch.tensor([200, 320]))
    alone = lists(q[:1, :, :200], k[:1, :, :200], 40, 35)
    seen = [listed_keys(*t, n)[0, :, :200, :200] for t, n in ((made, 320), (alone, 200))]
    assert torch.equal(*seen)
    whole = lists(q[1:], k[1:], 40, 35)
    assert all(torch.equal(one[1:], other) for one, other in zip(made, whole, strict=True))


def test_what_gets_all_keys() -> None:
    """A sequence with tokens before, and a call of too few tokens, get all keys."""
    q, k, v = drawn(130)
    blocks, columns = lists(q, k, past=torch.tensor([0, 7]))
    assert (blocks[1, ..., 0] == DENSE).all()
    assert (blocks[0, ..., 0] > 0).all()
    assert torch.equal(attended(q, k, v, blocks, columns)[1], dense(q, k, v)[1])
    assert (lists(q, k, minimum_tokens=131)[0][..., 0] == DENSE).all()
    assert (lists(q, k, minimum_tokens=130)[0][..., 0] > 0).all()
    few = dialect.sparse_attention(
        q, k, v, blocks * 0, columns * 0, [], None, predicate=CAUSAL, scale=SCALE, minimum_tokens=131
    )
    assert torch.equal(few, dense(q, k, v))


def test_queries_without_keys_give_zeros() -> None:
    """Empty lists, and keys that the predicate hides, leave nothing to see."""
    q, k, v = drawn(70)
    blocks, columns = lists(q, k)
    assert torch.equal(attended(q, k, v, blocks * 0, columns * 0), torch.zeros_like(q))
    hidden = attended(q, k, v, blocks, columns, "q - k >= 0 & q - 9 >= 0")
    assert torch.equal(hidden[:, :, :9], torch.zeros_like(q[:, :, :9]))
    assert not hidden.isnan().any()


def test_attention_over_a_cache() -> None:
    """A prompt in an empty cache is attended to as without one, a continuation to all that is there."""
    q, k, v = drawn(200)
    past = torch.tensor([0, 5])
    caches = [torch.full((2, 2, 230, 8), torch.nan) for _ in range(2)]
    for cache, new in zip(caches, (k, v), strict=True):
        cache[0, :, :200], cache[1, :, 5:205], cache[1, :, :5] = new[0], new[1], 1.0
    made = lists(q, k, 35, 33, past=past)
    got = dialect.kv_sparse_attention(q, *caches, past, *made, [], None, predicate=CAUSAL, scale=SCALE)
    torch.testing.assert_close(got[0], attended(q, k, v, *made)[0])
    assert (got[0] - dense(q, k, v)[0]).abs().max() > 0.1
    assert torch.equal(got[1], dialect.kv_attention(q, *caches, past, [], None, predicate=CAUSAL, scale=SCALE)[1])


def test_ties_go_to_the_first() -> None:
    """Of equal sums the first are taken, and the first 30 before all others."""
    assert largest(torch.zeros(50), 40) == list(range(40))
    assert largest(torch.tensor([0.0] * 40 + [1.0]), 31) == [*range(30), 40]
    assert largest(torch.ones(3), 9) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vertical": [1, 2]}, "vertical has 2 values, and there are 4 heads"),
        ({"slash": [-1] * 4}, "must be at least 0"),
        ({"fixed": [True]}, "fixed has 1 values"),
        ({"k": (2, 3, 50, 8)}, "4 query heads cannot share 3"),
        ({"k": (2, 2, 51, 8)}, "q is"),
    ],
)
def test_shape_rules(builder, change, message) -> None:
    """Arguments that do not fit are refused when the node is made."""
    made = builder()
    q, k = made.input("q", 2, 4, 50, 8), made.input("k", *change.get("k", (2, 2, 50, 8)))
    options = {"vertical": [3] * 4, "slash": [3] * 4, "fixed": [False] * 4} | {n: v for n, v in change.items() if n != "k"}
    with pytest.raises(VerifyError, match=message):
        made.call(dialect.block_index, q, k, None, scale=SCALE, **options)


def test_cost_counts_what_is_listed(builder) -> None:
    """The cost of the attention grows with the length, not with its square, once there are more keys than are listed."""
    from graphwright.ir.analyses.cost import cost_of_node

    made = builder()
    q, k, v = (made.input(name, "batch", n, "tokens", 8) for name, n in (("q", 4), ("k", 2), ("v", 2)))
    index = made.call(dialect.block_index, q, k, None, vertical=[64] * 4, slash=[32] * 4, fixed=[False] * 4, scale=1.0)
    parts = [made.call(operator.getitem, index, at) for at in range(2)]
    node = made.call(dialect.sparse_attention, q, k, v, *parts, [], None, predicate=CAUSAL, scale=1.0)
    program = made.program(node)
    flops = [int(cost_of_node(program, node).at({"batch": 1, "tokens": n}).flops) for n in (64, 8192, 16384)]
    assert flops[2] == pytest.approx(2 * flops[1], rel=1e-6)
    assert flops[0] == 4 * 64 * 65 // 2 * (2 * 8 + 2 * 8 + 8)
