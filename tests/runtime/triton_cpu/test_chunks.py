"""Loop nests over the chunks of a tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.runtime.triton_cpu import isa
from graphwright.runtime.triton_cpu.chunks import Chunks
from graphwright.runtime.triton_cpu.emit import Emitter
from graphwright.runtime.triton_cpu.values import Coords, lanes_of

compiled = settings(max_examples=60)
ISAS = ("avx512", "avx2", "portable")


def chunks_for(name: str) -> Chunks:
    """What evaluates chunks for an instruction set."""
    try:
        found = isa.detect(name)
    except isa.BackendError as error:
        pytest.skip(str(error))
    return Chunks(isa=found)


@given(
    shape=st.lists(st.sampled_from([1, 2, 4, 8, 32]), min_size=1, max_size=3),
    data=st.data(),
    name=st.sampled_from(ISAS),
    cost=st.sampled_from([0, 100]),
)
@compiled
def test_chunks_cover_a_tensor(
    run_emitted: Callable[..., list[int]], shape: list[int], data: st.DataObject, name: str, cost: int
) -> None:
    """A nest visits every element of a tensor once, in chunks that are no wider than a vector."""
    lane = data.draw(st.integers(0, len(shape) - 1))
    chunks = chunks_for(name)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]

    def emit(e: Emitter) -> None:
        chunks.e = e

        def body(coords: Coords) -> None:
            assert lanes_of(coords) <= chunks.isa.lanes
            assert lanes_of(coords) == chunks.isa.lanes or lanes_of(coords) == math.prod(shape) or shape[lane] > 1
            base = e.combine(*((stride, c.base) for stride, c in zip(strides, coords, strict=True)))
            for index in itertools.product(*(range(c.width) for c in coords)):
                at = e.combine((1, base), *((stride, i) for stride, i in zip(strides, index, strict=True)))
                place = e.address("i64", "%out", at)
                seen = e.op(f"load i64, ptr {place}")
                e.raw(f"store i64 {e.op(f'add i64 {seen}, 1')}, ptr {place}")

        chunks.for_each_chunk(tuple(shape), lane, body, cost=cost)

    assert run_emitted(emit, words=math.prod(shape)) == [1] * math.prod(shape)


def test_elements_in_order(run_emitted: Callable[..., list[int]]) -> None:
    """A nest over single elements runs row-major."""
    chunks = chunks_for("")

    def emit(e: Emitter) -> None:
        chunks.e = e

        def body(coords: Coords) -> None:
            at = e.combine((1, coords[1].base), (4, coords[0].base))
            count = e.op(f"add i64 1, {e.op('load i64, ptr %out')}")
            e.raw(f"store i64 {count}, ptr %out")
            e.raw(f"store i64 {count}, ptr {e.address('i64', '%out', e.combine((1, at), (1, 1)))}")

        chunks.for_each_element((2, 4), body)

    assert run_emitted(emit, words=9) == [8, *range(1, 9)]


@pytest.mark.parametrize(
    ("shape", "lane", "widths"),
    [
        ((64,), 0, [16]),
        ((8,), 0, [8]),
        ((64, 64), 1, [1, 16]),
        ((64, 64), 0, [16, 1]),
        ((64, 4), 1, [4, 4]),
        ((4, 64), 0, [4, 4]),
    ],
)
def test_chunk_widths(shape: tuple[int, ...], lane: int, widths: list[int]) -> None:
    """A chunk fills a vector along the lanes; where these are too few, with the neighbouring dimension."""
    assert chunks_for("avx512").chunk_widths(shape, lane) == widths
