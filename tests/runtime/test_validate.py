"""Schedules that are not whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphwright.ir.errors import ArtifactError
from graphwright.runtime.schedule import CallStep, KernelStep, View
from graphwright.runtime.validate import check_schedule


def with_buffer(name, /, **changes):
    def change(schedule):
        buffers = dict(schedule.buffers)
        buffers[name] = replace(buffers[name], **changes)
        return replace(schedule, buffers=buffers)

    return change


def with_step(k, **changes):
    def change(schedule):
        steps = list(schedule.steps)
        steps[k] = replace(steps[k], **changes)
        return replace(schedule, steps=tuple(steps))

    return change


def with_fields(**changes):
    return lambda schedule: replace(schedule, **changes)


def without_kernel(schedule):
    return replace(schedule, kernels={"scale": schedule.kernels["scale"]})


T1 = View("t1", ("batch*tokens", 40), (40, 1))


def test_a_whole_schedule_is_let_through(example):
    """Nothing is wrong with the example."""
    check_schedule(example.schedule, example.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_fields(dimensions={"batch": (0, None)}), "names tokens; the dimensions are batch"),
        (with_fields(dimensions={"batch": (0, None), "tokens": (1, 512), "other": (1, 2)}), "dimension 'other'"),
        (with_fields(dimensions={"batch": (3, 2), "tokens": (1, 512)}), "batch: 3 to 2 is no range"),
        (with_fields(inputs=("nothing",)), "no buffer 'nothing'"),
        (with_fields(inputs=("w1",)), "'w1' is no input"),
        (with_fields(inputs=()), "each input buffer must be listed once"),
        (with_fields(inputs=("x", "x")), "each input buffer must be listed once"),
        (with_fields(outputs=(View("y", (1,), ()),)), "1 sizes and 0 strides"),
        (with_fields(outputs=(View("q", (), ()),)), "no buffer 'q'"),
        (with_fields(outputs=(View("y", (), (), -1),)), "the offset is -1"),
        (with_buffer("t1", dtype="float33"), "no dtype 'float33'"),
        (with_buffer("t1", dtype="load"), "no dtype 'load'"),
        (with_buffer("t1", kind="scratch"), "of kind 'scratch'"),
        (with_buffer("t1", name="t2"), "it is called 't2'"),
        (with_buffer("t1", shape=(-1, 3)), "-1 cannot be a size"),
        (with_buffer("t1", shape=(True, 3)), "True cannot be a size"),
        (with_buffer("t1", shape=("tokens**2", 3)), "is not a size"),
        (with_buffer("t1", strides=("open('x')", 1)), "is not a size"),
        (with_buffer("w1", source="third.weight"), "no weight 'third.weight'"),
        (with_buffer("w1", shape=("tokens", 24)), "the sizes of a weight must be numbers"),
        (without_kernel, "no kernel 'bias_relu'"),
        (with_fields(kernels={"bias_relu": "import os", "scale": ""}), "kernel bias_relu: kernel source, line 1"),
        (with_step(1, grid=()), "1 to 3 directions"),
        (with_step(1, grid=("rows",)), "names rows"),
        (with_step(1, writes=("b1",)), "writes buffer 'b1', which is of kind 'weight'"),
        (with_step(1, writes=("x",)), "writes buffer 'x', which is of kind 'input'"),
        (with_step(1, arguments=(View("t9", (), ()),)), "'bias_relu': there is no buffer 't9'"),
        (with_step(0, out=replace(T1, buffer="w2")), "writes buffer 'w2'"),
        (with_step(0, weight="t1"), "buffer 't1' a weight"),
        (with_step(0, x=View("x", ("batch", "tokens", 24), (1, 1, 1))), "must be matrices"),
        (with_step(3, operation="aten::add_.Tensor"), "'softmax': aten::add_.Tensor: it changes"),
        (with_step(3, outs=("t8",)), "no buffer 't8'"),
        (with_step(3, into=True, outs=("",)), "can write into one buffer"),
    ],
)
def test_what_is_not_whole_is_refused(example, change, message):
    """Each thing that a schedule refers to has to be there and of the right kind, and the message names it."""
    with pytest.raises(ArtifactError, match=message):
        check_schedule(change(example.schedule), example.weights)


def test_weights_that_are_missing_are_named(example):
    """A weight that is not among those there are is named, with the nearest one."""
    with pytest.raises(ArtifactError, match=r"buffer w1: there is no weight 'first.weight'. Did you mean 'second.weight'"):
        check_schedule(example.schedule, ["first.bias", "second.weight"])


def test_steps_of_every_kind_are_there(example):
    """The cases above speak of a kernel at 1 and a call at 3."""
    assert isinstance(example.schedule.steps[1], KernelStep)
    assert isinstance(example.schedule.steps[3], CallStep)
