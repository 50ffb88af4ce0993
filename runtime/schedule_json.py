"""Schedules as JSON: plain data with a tag for each type, and nothing else on the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphwright.ir.errors import ArtifactError

from .schedule import Buffer, CallStep, KernelStep, MatmulStep, Schedule, Size, Step, Symbolic, View

Data = Any
"""What `json` writes and reads."""

_NAMED: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
"""Constants of torch that may stand among the arguments of a call; each is stored by its name."""


def schedule_to_data(schedule: Schedule) -> Data:
    """Return a schedule as JSON data; the sources of its kernels are left out.

    Raises:
        ArtifactError: an argument of a call is of a type that cannot be stored.
    """
    return {
        "device": schedule.device,
        "dimensions": {name: [low, high] for name, (low, high) in schedule.dimensions.items()},
        "inputs": list(schedule.inputs),
        "outputs": [_value_to_data(value) for value in schedule.outputs],
        "buffers": [[b.name, b.dtype, list(b.shape), list(b.strides), b.kind, b.source] for b in schedule.buffers.values()],
        "steps": [_step_to_data(step) for step in schedule.steps],
        "kernels": list(schedule.kernels),
    }


def schedule_from_data(data: Data, kernels: Mapping[str, str]) -> Schedule:
    """Return the schedule that `schedule_to_data` wrote.

    Args:
        data: from anywhere.
        kernels: sources by name, all of those that the data names.

    Raises:
        ArtifactError: the data is something else. What it means is for `validate.check_schedule` to judge.
    """
    try:
        dimensions = {
            _text(name): (_number(low), None if high is None else _number(high))
            for name, (low, high) in dict(data["dimensions"]).items()
        }
        buffers = {}
        for name, dtype, shape, strides, kind, source in data["buffers"]:
            if name in buffers:
                raise ArtifactError(f"buffer {name!r} is there twice")
            _text(name), _text(kind)
            buffers[name] = Buffer(name, _text(dtype), _sizes(shape), _sizes(strides), kind, _text(source))
        return Schedule(
            dimensions,
            _texts(data["inputs"]),
            tuple(_value_from_data(value) for value in data["outputs"]),
            buffers,
            tuple(_step_from_data(step) for step in data["steps"]),
            {_text(name): kernels[name] for name in data["kernels"]},
            _text(data["device"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"not the schedule of a compiled program: {type(error).__name__}: {error}") from error


def _step_to_data(step: Step) -> Data:
    if isinstance(step, KernelStep):
        return {
            "type": "kernel",
            "name": step.name,
            "kernel": step.kernel,
            "grid": list(step.grid),
            "arguments": [_value_to_data(argument) for argument in step.arguments],
            "constants": dict(step.constants),
            "reads": list(step.reads),
            "writes": list(step.writes),
            "provenance": step.provenance,
        }
    if isinstance(step, MatmulStep):
        return {
            "type": "matmul",
            "name": step.name,
            "x": _value_to_data(step.x),
            "weight": step.weight,
            "out": _value_to_data(step.out),
            "accumulate": step.accumulate,
            "provenance": step.provenance,
        }
    return {
        "type": "call",
        "name": step.name,
        "operation": step.operation,
        "arguments": [_value_to_data(argument) for argument in step.arguments],
        "keywords": {name: _value_to_data(argument) for name, argument in step.keywords.items()},
        "outs": list(step.outs),
        "into": step.into,
        "provenance": step.provenance,
    }


def _step_from_data(data: Data) -> Step:
    name, provenance = _text(data["name"]), _text(data["provenance"])
    match data["type"]:
        case "kernel":
            arguments = tuple(_value_from_data(value) for value in data["arguments"])
            for value in arguments:
                if isinstance(value, bool) or not isinstance(value, View | int | str | float):
                    raise ArtifactError(f"step {name!r}: {value!r} cannot be an argument of a kernel")
            return KernelStep(
                name,
                _text(data["kernel"]),
                _sizes(data["grid"]),
                arguments,
                {_text(key): _number(value) for key, value in data["constants"].items()},
                _texts(data["reads"]),
                _texts(data["writes"]),
                provenance,
            )
        case "matmul":
            x, out = _value_from_data(data["x"]), _value_from_data(data["out"])
            if not isinstance(x, View) or not isinstance(out, View):
                raise ArtifactError(f"step {name!r}: the operands of a product must be views")
            return MatmulStep(name, x, _text(data["weight"]), out, _flag(data["accumulate"]), provenance)
        case "call":
            return CallStep(
                name,
                _text(data["operation"]),
                tuple(_value_from_data(value) for value in data["arguments"]),
                {_text(key): _value_from_data(value) for key, value in data["keywords"].items()},
                _texts(data["outs"]),
                _flag(data["into"]),
                provenance,
            )
    raise ArtifactError(f"step {name!r}: there is no step of type {data['type']!r}")


def _value_to_data(value: Any) -> Data:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"type": "float", "text": repr(value)}
    if isinstance(value, View):
        return {
            "type": "view",
            "buffer": value.buffer,
            "shape": list(value.shape),
            "strides": list(value.strides),
            "offset": value.offset,
        }
    if isinstance(value, Symbolic):
        return {"type": "size", "size": value.size}
    if isinstance(value, list):
        return [_value_to_data(entry) for entry in value]
    if isinstance(value, tuple):
        return {"type": "tuple", "entries": [_value_to_data(entry) for entry in value]}
    if isinstance(value, torch.device):
        return {"type": "device", "text": str(value)}
    for kind, known in _NAMED.items():
        if isinstance(value, known):
            return {"type": kind, "text": str(value).removeprefix("torch.")}
    raise ArtifactError(f"a value of type {type(value).__name__} cannot be stored: {value!r}")


def _value_from_data(data: Data) -> Any:
    if data is None or isinstance(data, bool | int | str | float):
        return data
    if isinstance(data, list):
        return [_value_from_data(entry) for entry in data]
    match data["type"]:
        case "float":
            return float(data["text"])
        case "view":
            offset = _size(data["offset"])
            return View(_text(data["buffer"]), _sizes(data["shape"]), _sizes(data["strides"]), offset)
        case "size":
            return Symbolic(_size(data["size"]))
        case "tuple":
            return tuple(_value_from_data(entry) for entry in data["entries"])
        case "device":
            try:
                return torch.device(_text(data["text"]))
            except RuntimeError as error:
                raise ArtifactError(f"there is no device {data['text']!r}") from error
        case kind if kind in _NAMED:
            found = getattr(torch, _text(data["text"]), None)
            if isinstance(found, _NAMED[kind]):
                return found
    raise ArtifactError(f"unknown value {str(data)[:80]}")


def _text(value: Data) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {str(value)[:80]}")
    return value


def _texts(values: Sequence[Data]) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)


def _number(value: Data) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected an integer, got {str(value)[:80]}")
    return value


def _flag(value: Data) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {str(value)[:80]}")
    return value


def _size(value: Data) -> Size:
    return value if isinstance(value, str) else _number(value)


def _sizes(values: Sequence[Data]) -> tuple[Size, ...]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list of sizes, got {str(values)[:80]}")
    return tuple(_size(value) for value in values)
