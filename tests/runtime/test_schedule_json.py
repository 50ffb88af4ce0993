"""Schedules as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import ArtifactError
from graphwright.runtime.schedule import Buffer, CallStep, KernelStep, MatmulStep, Schedule, Symbolic, View
from graphwright.runtime.schedule_json import schedule_from_data, schedule_to_data

names = st.text(min_size=1, max_size=8)
sizes = st.integers(0, 2**40) | names
shapes = st.lists(sizes, max_size=4).map(tuple)
views = st.builds(View, names, shapes, shapes, sizes)
numbers = st.floats(allow_nan=False)
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | numbers
    | names
    | views
    | st.builds(Symbolic, sizes)
    | st.sampled_from([torch.float32, torch.bfloat16, torch.strided, torch.channels_last, torch.device("cpu")])
)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple), max_leaves=6)
texts = st.lists(names, max_size=3).map(tuple)
steps = (
    st.builds(
        KernelStep,
        names,
        names,
        shapes,
        st.lists(views | sizes | numbers, max_size=4).map(tuple),
        st.dictionaries(names, st.integers(0, 2**20), max_size=3),
        texts,
        texts,
        names,
    )
    | st.builds(MatmulStep, names, views, names, views, st.booleans(), names)
    | st.builds(
        CallStep,
        names,
        names,
        st.lists(values, max_size=4).map(tuple),
        st.dictionaries(names, values, max_size=2),
        texts,
        st.booleans(),
        names,
    )
)
kinds = st.sampled_from(["input", "weight", "temporary", "output"])
buffers = st.lists(st.builds(Buffer, names, names, shapes, shapes, kinds, names), max_size=4)
schedules = st.builds(
    Schedule,
    st.dictionaries(names, st.tuples(st.integers(0, 9), st.none() | st.integers(0, 2**40)), max_size=3),
    texts,
    st.lists(values, max_size=3).map(tuple),
    buffers.map(lambda found: {buffer.name: buffer for buffer in found}),
    st.lists(steps, max_size=3).map(tuple),
    st.dictionaries(names, names, max_size=3),
    st.sampled_from(["cpu", "cuda"]),
)


@given(schedules)
def test_schedules_come_back(schedule):
    """Every schedule is the same after it was written as JSON and read."""
    text = json.dumps(schedule_to_data(schedule), allow_nan=False)
    found = schedule_from_data(json.loads(text), schedule.kernels)
    assert found == schedule
    # Equality does not tell 1 from 1.0 and True.
    assert repr(found) == repr(schedule)


def test_not_a_number_comes_back():
    """NaN among the arguments of a call survives."""
    step = CallStep("s", "aten::x", (float("nan"),), {}, ())
    schedule = Schedule({}, (), (), {}, (step,))
    found = schedule_from_data(json.loads(json.dumps(schedule_to_data(schedule), allow_nan=False)), {})
    assert repr(found) == repr(schedule)


def test_what_cannot_be_stored_is_refused():
    """A value of another type is an error when it is written."""
    step = CallStep("s", "aten::x", (object(),), {}, ())
    with pytest.raises(ArtifactError, match="object cannot be stored"):
        schedule_to_data(Schedule({}, (), (), {}, (step,)))


VIEW = {"type": "view", "buffer": "x", "shape": [1], "strides": [1], "offset": 0}
MATMUL = {"type": "matmul", "name": "m", "x": VIEW, "weight": "w", "out": VIEW, "accumulate": False, "provenance": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"device": 3},
        {"dimensions": {"n": [1]}},
        {"dimensions": {"n": [1.5, None]}},
        {"inputs": [1]},
        {"inputs": None},
        {"outputs": [{"type": "pickle", "text": "x"}]},
        {"outputs": [{"type": "dtype", "text": "load"}]},
        {"outputs": [{"type": "device", "text": "nowhere"}]},
        {"outputs": [VIEW | {"shape": "12"}]},
        {"outputs": [VIEW | {"offset": 1.5}]},
        {"buffers": [["x", "float32", [1], [1], "input"]]},
        {"buffers": [["x", "float32", [1], [1], "input", ""]] * 2},
        {"steps": [MATMUL | {"type": "python"}]},
        {"steps": [MATMUL | {"x": 3}]},
        {"steps": [MATMUL | {"accumulate": 1}]},
        {"steps": ["x"]},
        {"kernels": ["missing"]},
    ],
)
def test_other_data_is_refused(change):
    """Data of another form is an error of the file, whatever is wrong with it."""
    data = schedule_to_data(Schedule({"n": (1, None)}, (), (), {}, ()))
    schedule_from_data(data | {"steps": [MATMUL], "outputs": [VIEW]}, {})
    with pytest.raises(ArtifactError):
        schedule_from_data(data | change, {})
