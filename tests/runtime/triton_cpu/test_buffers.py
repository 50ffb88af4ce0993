"""Layouts of buffers, and the stack of scratch memory."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright.runtime.triton_cpu.buffers import ALIGNMENT_BYTES, Buffer, Scratch, storage_type, strides_for
from graphwright.runtime.triton_cpu.emit import Emitter
from graphwright.runtime.triton_cpu.values import BYTES

SHAPES = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4)


def offset(line: str) -> int:
    """Byte offset of a piece of scratch."""
    found = re.fullmatch(r"  %\w+ = getelementptr i8, ptr %scratch, i64 (\d+)", line)
    assert found
    return int(found[1])


@pytest.mark.parametrize(
    ("element", "stored"), [("i1", "i8"), ("ptr", "i64"), ("f16", "half"), ("bf16", "i16"), ("f32", "float"), ("i32", "i32")]
)
def test_storage_type(element: str, stored: str) -> None:
    """Booleans are bytes in memory and pointers are addresses; all others are as in registers."""
    assert storage_type(element) == stored


@given(SHAPES, st.data(), st.sampled_from([0, 0, 1, 16]))
def test_strides(shape: list[int], data: st.DataObject, padding: int) -> None:
    """Elements never overlap, the lane dimension is dense, and all fit into the rows with their padding."""
    lane = data.draw(st.integers(0, len(shape) - 1))
    strides = strides_for(shape, lane, padding)
    places = [sum(i * int(s) for i, s in zip(at, strides, strict=True)) for at in itertools.product(*map(range, shape))]
    assert len(set(places)) == len(places)
    assert strides[lane] == 1
    rows = len(places) // shape[lane]
    assert max(places) < len(places) + rows * padding
    if not padding:
        assert sorted(places) == list(range(len(places)))


def test_strides_in_order() -> None:
    """The other dimensions keep their order, and padding follows each row of lanes."""
    assert strides_for((4, 8, 16), 2) == [128, 16, 1]
    assert strides_for((4, 8, 16), 0) == [1, 64, 4]
    assert strides_for((4, 8, 16), 1) == [128, 1, 8]
    assert strides_for((4, 16), 1, 3) == [19, 1]


@given(SHAPES, st.data())
def test_lane(shape: list[int], data: st.DataObject) -> None:
    """A buffer runs along a dimension that is dense and has elements to run along."""
    lane = data.draw(st.integers(0, len(shape) - 1))
    found = Buffer("%p", tuple(shape), strides_for(shape, lane), "f32").lane
    if shape[lane] > 1:
        assert found == lane
    else:
        assert shape[found] > 1 or found == len(shape) - 1


def test_lane_of_a_strided_buffer() -> None:
    """Without a dense dimension the lanes run along the last one."""
    assert Buffer("%p", (8, 8), ["%s", 2], "f32").lane == 1
    assert Buffer("%p", (8, 8), [1, "%s"], "f32").lane == 0
    assert Buffer("%p", (1, 8), [1, 1], "f32").lane == 1


@given(st.lists(st.tuples(st.integers(1, 200), st.sampled_from(["i1", "bf16", "f32", "f64", "ptr"])), max_size=8))
def test_scratch(requests: list[tuple[int, str]]) -> None:
    """Pieces are aligned and do not overlap, and the kernel's size covers them all."""
    scratch, e = Scratch(), Emitter()
    taken = []
    for count, element in requests:
        scratch.take(e, count, element)
        start = offset(e.lines[-1])
        assert start % ALIGNMENT_BYTES == 0
        taken.append((start, start + count * BYTES[element]))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert scratch.size_bytes >= max((end for _, end in taken), default=0)


def test_frames() -> None:
    """What was taken in a frame is given back at its end, and counts for the size."""
    scratch, e = Scratch(), Emitter()
    scratch.take(e, 16, "f32")
    with scratch.frame():
        scratch.take(e, 100, "f64")
        with scratch.frame():
            scratch.take(e, 8, "i64")
        scratch.take(e, 8, "i64")
    scratch.take(e, 16, "f32")
    first, outer, inner, again, after = map(offset, e.lines)
    assert (first, outer, after) == (0, 64, 64)
    assert inner == again == 64 + 832
    assert scratch.size_bytes == 64 + 832 + 64


def test_frame_left_by_an_error() -> None:
    """A frame gives back when it is left by an error."""
    scratch, e = Scratch(), Emitter()

    def fail() -> None:
        with scratch.frame():
            scratch.take(e, 64, "f32")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    scratch.take(e, 1, "i8")
    assert offset(e.lines[-1]) == 0
