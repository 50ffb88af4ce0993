"""The kernels of `graphwright::block_index`, as templates.

Four kernels, one after the other: the attention of the last queries; its sums for each key and each distance; the choice of the
largest, and the blocks that cover the distances; the lists of every block of queries. Diagonals are numbered from the farthest:
number e is the distance tokens - 1 - e, so that sums along them read memory in order.
"""

from __future__ import annotations

WEIGHTS = '''\
@triton.jit
def larger(a, b):
    # Unlike tl.maximum this says nothing about NaN, and is one instruction.
    return tl.where(a > b, a, b)


@triton.jit(do_not_specialize=["tokens"])
def {name}(
    p_q, p_k, p_count, p_weights, tokens, scale, q_batch, q_head, q_token, k_batch, k_head, k_token,
    group: tl.constexpr, head_dim: tl.constexpr, has_count: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The attention of the last ROWS queries of one head; rows before the first token are zeros."""
    i_h = tl.program_id(0)
    i_b = tl.program_id(1)
    last = tokens - 1
    if has_count:
        last = tl.load(p_count + i_b).to(tl.int32) - 1
    o_r = tl.arange(0, ROWS)[:, None]
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    position = last - (ROWS - 1) + o_r
    p_q += i_b.to(tl.int64) * q_batch + i_h.to(tl.int64) * q_head
    p_k += i_b.to(tl.int64) * k_batch + (i_h // group).to(tl.int64) * k_head
    p_weights += (i_b.to(tl.int64) * tl.num_programs(0) + i_h) * ROWS * tokens
    q = tl.load(p_q + position.to(tl.int64) * q_token + o_d, mask=(position >= 0) & (o_d < head_dim), other=0.0)
    row_max = tl.full([ROWS], -3.4028234663852886e38, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for first_k in range(0, last + 1, BLOCK_N):
        o_k = first_k + o_n
        rows = p_k + o_k[:, None].to(tl.int64) * k_token
        k = tl.load(rows + o_d, mask=(o_k[:, None] < tokens) & (o_d < head_dim), other=0.0)
        s = tl.dot(q, tl.trans(k){precision}) * scale
        s = tl.where(o_k[None, :] <= position, {capped}, float("-inf"))
        new_max = larger(row_max, tl.reduce(s, 1, larger))
        row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(s - new_max[:, None]), 1)
        row_max = new_max
    norm = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    for first_k in range(0, tokens, BLOCK_N):
        o_k = first_k + o_n
        rows = p_k + o_k[:, None].to(tl.int64) * k_token
        k = tl.load(rows + o_d, mask=(o_k[:, None] < tokens) & (o_d < head_dim), other=0.0)
        s = tl.dot(q, tl.trans(k){precision}) * scale
        s = tl.where(o_k[None, :] <= position, {capped}, float("-inf"))
        weights = tl.exp(s - row_max[:, None]) * norm[:, None]
        tl.store(p_weights + o_r * tokens + o_k[None, :], weights, mask=o_k[None, :] < tokens)
'''

SUMS = '''\
@triton.jit(do_not_specialize=["tokens"])
def {name}(
    p_weights, p_count, p_sums, tokens, {heads},
    has_count: tl.constexpr, ROWS: tl.constexpr, FORCED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Sum the weights of BLOCK keys, and of as many distances; what is taken first is infinite."""
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    last = tokens - 1
    if has_count:
        last = tl.load(p_count + i_b).to(tl.int32) - 1
    fixed = {chosen}
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = o < tokens
    head = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    p_weights += head * ROWS * tokens
    columns = tl.zeros([BLOCK], tl.float32)
    diagonals = tl.zeros([BLOCK], tl.float32)
    for row in range(0, ROWS):
        columns += tl.load(p_weights + row * tokens + o, mask=inside, other=0.0)
        key = o + (last - (ROWS - 1) + row - (tokens - 1))
        diagonals += tl.load(p_weights + row * tokens + key, mask=inside & (key >= 0), other=0.0)
    columns = tl.where(fixed != 0, (tokens - o).to(tl.float32), columns)
    diagonals = tl.where(fixed != 0, (o + 1).to(tl.float32), diagonals)
    p_sums += head * 2 * tokens
    tl.store(p_sums + o, tl.where(o < FORCED, float("inf"), columns), mask=inside)
    tl.store(p_sums + tokens + o, tl.where(o >= tokens - FORCED, float("inf"), diagonals), mask=inside)
'''

CHOICE = '''\
@triton.jit
def pick(p_sums, p_out, count, wanted, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    # The bits of numbers that are not negative are ordered as the numbers are: the threshold is found bit by bit.
    wanted = tl.minimum(wanted, count)
    threshold = 0
    o = tl.arange(0, BLOCK)
    for bit in range(0, 31):
        candidate = threshold | (1 << (30 - bit))
        found = tl.zeros([BLOCK], tl.int32)
        for first in range(0, count, BLOCK):
            bits = tl.load(p_sums + first + o, mask=first + o < count, other=-1.0).to(tl.int32, bitcast=True)
            found += (bits >= candidate).to(tl.int32)
        threshold = tl.where(tl.sum(found, 0) >= wanted, candidate, threshold)
    above = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        bits = tl.load(p_sums + first + o, mask=first + o < count, other=-1.0).to(tl.int32, bitcast=True)
        above += (bits > threshold).to(tl.int32)
        equal += (bits == threshold).to(tl.int32)
    rest = wanted - tl.sum(above, 0)
    skipped = 0
    if not FIRST:
        skipped = tl.sum(equal, 0) - rest
    taken = 0
    passed = 0
    for first in range(0, count, BLOCK):
        bits = tl.load(p_sums + first + o, mask=first + o < count, other=-1.0).to(tl.int32, bitcast=True)
        is_equal = (bits == threshold).to(tl.int32)
        rank = passed + tl.cumsum(is_equal, 0) - is_equal
        take = (bits > threshold) | ((is_equal != 0) & (rank >= skipped) & (rank < skipped + rest))
        number = take.to(tl.int32)
        tl.store(p_out + 1 + taken + tl.cumsum(number, 0) - number, first + o, mask=take)
        taken += tl.sum(number, 0)
        passed += tl.sum(is_equal, 0)
    tl.store(p_out, taken)
    return taken


@triton.jit(do_not_specialize=["tokens"])
def {name}(
    p_sums, p_keys, p_distances, p_starts, p_covered, tokens, {heads},
    keys_row: tl.constexpr, distances_row: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Choose keys and distances of one head, and the blocks, relative to the first of TILE queries, that cover distances."""
    i_h = tl.program_id(0)
    i_b = tl.program_id(1)
    head = i_b.to(tl.int64) * tl.num_programs(0) + i_h
    vertical = {vertical}
    slash = {slash}
    tiles = tl.cdiv(tokens, TILE)
    p_sums += head * 2 * tokens
    p_keys += head * keys_row
    p_distances += head * distances_row
    p_starts += head * (tiles + 2)
    p_covered += head * (tiles + 2) * TILE
    for tile in range(0, tiles + 2):
        tl.store(p_covered + tile * TILE + tl.arange(0, TILE), tl.zeros([TILE], tl.int32))
    pick(p_sums, p_keys, tokens, vertical, 1, BLOCK)
    count = pick(p_sums + tokens, p_distances, tokens, slash, 0, BLOCK)
    tl.debug_barrier()
    low = TILE
    starts = 0
    for number in range(0, count):
        distance = tokens - 1 - tl.load(p_distances + count - number)
        if -distance < low:
            low = tl.minimum(low, TILE - distance) - TILE
            tl.store(p_starts + 1 + starts, low)
            # A block may start up to TILE - 1 keys before the farthest distance.
            tl.store(p_covered + (tiles + 1) * TILE + low + tl.arange(0, TILE), tl.full([TILE], 1, tl.int32))
            starts += 1
    tl.store(p_starts, starts)
'''

LISTS = '''\
@triton.jit(do_not_specialize=["tokens"])
def {name}(
    p_keys, p_starts, p_covered, p_past, p_blocks, p_columns, tokens,
    keys_row: tl.constexpr, columns_row: tl.constexpr, has_past: tl.constexpr, TILE: tl.constexpr,
):
    """Write the lists of TILE queries: the blocks that hold keys, and the chosen keys outside of them."""
    i_t = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tiles = tl.num_programs(0)
    first = i_t * TILE
    o = tl.arange(0, TILE)
    p_keys += head * keys_row
    p_starts += head * (tiles + 2)
    p_covered += head * (tiles + 2) * TILE + (tiles + 1) * TILE - first
    p_blocks += (head * tiles + i_t) * (tiles + 2)
    p_columns += (head * tiles + i_t) * columns_row
    count = tl.load(p_starts)
    kept = 0
    for number in range(0, count, TILE):
        start = first + tl.load(p_starts + 1 + number + o, mask=number + o < count, other=-2 * tokens - 2 * TILE)
        keep = start > -TILE
        tl.store(p_blocks + 1 + number + o, start, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    if has_past:
        kept = tl.where(tl.load(p_past + tl.program_id(2)) > 0, -1, kept)
    tl.store(p_blocks, kept)
    count = tl.load(p_keys)
    taken = 0
    for number in range(0, count, TILE):
        key = tl.load(p_keys + 1 + number + o, mask=number + o < count, other=tokens)
        inside = (number + o < count) & (key < first + TILE)
        take = inside & (tl.load(p_covered + key, mask=inside, other=1) == 0)
        single = take.to(tl.int32)
        tl.store(p_columns + 1 + taken + tl.cumsum(single, 0) - single, key, mask=take)
        taken += tl.sum(single, 0)
    tl.store(p_columns, taken)
'''


def weights_body(softcap: float, dtype: str) -> str:
    """Return the function of the first kernel, with "{name}" for its name.

    Args:
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.
        dtype: of queries and keys.
    """
    capped = f"libdevice.tanh(s / {softcap!r}) * {softcap!r}" if softcap else "s"
    precision = ', input_precision="ieee"' if dtype == "float32" else ""
    return WEIGHTS.replace("{capped}", capped).replace("{precision}", precision)


def sums_body(heads: int) -> str:
    """Return the function of the second kernel for a number of heads, with "{name}" for its name."""
    names = head_parameters("fixed", heads)
    return SUMS.replace("{heads}", ", ".join(names)).replace("{chosen}", _of_head(names))


def choice_body(heads: int) -> str:
    """Return the functions of the third kernel for a number of heads, with "{name}" for its name."""
    vertical, slash = head_parameters("vertical", heads), head_parameters("slash", heads)
    body = CHOICE.replace("{heads}", ", ".join([*vertical, *slash]))
    return body.replace("{vertical}", _of_head(vertical)).replace("{slash}", _of_head(slash))


def head_parameters(name: str, heads: int) -> list[str]:
    """Return the names of parameters that say something of each head."""
    return [f"{name}_{head}" for head in range(heads)]


def _of_head(names: list[str]) -> str:
    """Return the text of the one of several parameters that is the head's."""
    text = names[-1]
    for head in reversed(range(len(names) - 1)):
        text = f"tl.where(i_h == {head}, {names[head]}, {text})"
    return text
