"""Weights in the safetensors format, laid out so that a file's memory can be used as it is.

The format allows no gaps between tensors. Here the tensors whose length is a multiple of 64 bytes come first, so that each of
these, which are the large ones, starts at such a multiple.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphwright.ir.errors import ArtifactError

ALIGNMENT = 64

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32,
    "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000


def write_weights(weights: Mapping[str, torch.Tensor], write: Callable[[Any], object], position: int) -> None:
    """Write weights as one safetensors file.

    Args:
        weights: by name, on any device, of any strides.
        write: takes the bytes piece by piece.
        position: where in the whole file the first byte will lie; the tensors are aligned to that file.

    Raises:
        ArtifactError: a dtype has no name in the format.
    """
    header: dict[str, Any] = {}
    end = 0
    order = sorted(weights, key=lambda name: (weights[name].nbytes % ALIGNMENT != 0, name))
    for name in order:
        weight = weights[name]
        if weight.dtype not in _NAMES or weight.layout != torch.strided:
            raise ArtifactError(f"weight {name}: {weight.dtype} with layout {weight.layout} cannot be stored")
        header[name] = {"dtype": _NAMES[weight.dtype], "shape": list(weight.shape), "data_offsets": [end, end + weight.nbytes]}
        end += weight.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(position + _LENGTH_BYTES + len(text)) % ALIGNMENT)
    write(len(text).to_bytes(_LENGTH_BYTES, "little"))
    write(text)
    for name in order:
        if weights[name].numel():
            write(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_weights(buffer: Any, start: int, size: int) -> dict[str, torch.Tensor]:
    """Return the weights of a safetensors file that lies in memory; they share that memory.

    Args:
        buffer: writable memory, kept alive by the tensors.
        start: of the file's first byte in it.
        size: of the file, in bytes.

    Raises:
        ArtifactError: the memory does not hold whole weights.
    """
    try:
        length = int.from_bytes(buffer[start : start + _LENGTH_BYTES], "little")
        data = start + _LENGTH_BYTES + length
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
            raise ArtifactError(f"the weights are cut off: a header of {length} bytes is announced, and there are {size} bytes")
        header = json.loads(bytes(buffer[start + _LENGTH_BYTES : data]))
        header.pop("__metadata__", None)
        weights = {}
        for name, entry in header.items():
            weights[str(name)] = _tensor(str(name), entry, buffer, data, start + size - data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the weights cannot be read: {type(error).__name__}: {error}") from error
    return weights


def _tensor(name: str, entry: Any, buffer: Any, data: int, room: int) -> torch.Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
    begin, end = (int(n) for n in entry["data_offsets"])
    if min([0, *shape]) < 0 or not 0 <= begin <= end <= room or math.prod(shape) * dtype.itemsize != end - begin:
        raise ArtifactError(f"weight {name}: {entry} does not fit {room} bytes of weights")
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if (data + begin) % dtype.itemsize:
        # Elements across the machine's own boundaries cannot be shared.
        return torch.frombuffer(bytearray(buffer[data + begin : data + end]), dtype=dtype).reshape(shape)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=data + begin).reshape(shape)
