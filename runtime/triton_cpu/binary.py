"""The compiled form of a kernel: an object file behind a header that shows whether it is whole.

Layout: magic, format version, length of the metadata, length of the object, digest of both; then the metadata as JSON and the
object file.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass

from .errors import BackendError
from .generated import Site

MAGIC = b"GWCPUOBJ"
VERSION = 1
HEADER = struct.Struct("<8sIIQ16s")


class CorruptBinaryError(BackendError):
    """A compiled kernel is truncated, damaged or of another format version."""


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel.

    Args:
        name: the kernel's name.
        entry: symbol of the launch function in the object file.
        arguments: as in `Generated`.
        scratch_bytes: as in `Generated`.
        sites: as in `Generated`.
        checked: whether accesses are compared with the extents of the tensors.
        object_code: the object file.
    """

    name: str
    entry: str
    arguments: tuple[str, ...]
    scratch_bytes: int
    sites: tuple[Site, ...]
    checked: bool
    object_code: bytes


def pack(binary: Binary) -> bytes:
    """Return the bytes that `unpack` reads."""
    metadata = {
        "name": binary.name,
        "entry": binary.entry,
        "arguments": binary.arguments,
        "scratch_bytes": binary.scratch_bytes,
        "sites": [asdict(site) for site in binary.sites],
        "checked": binary.checked,
    }
    text = json.dumps(metadata, sort_keys=True).encode()
    digest = _digest(text, binary.object_code)
    return HEADER.pack(MAGIC, VERSION, len(text), len(binary.object_code), digest) + text + binary.object_code


def unpack(data: bytes) -> Binary:
    """Return the kernel held by `data`.

    Raises:
        CorruptBinaryError: the data is not what `pack` of this version wrote.
    """
    if len(data) < HEADER.size:
        raise CorruptBinaryError(f"compiled kernel: {len(data)} bytes, shorter than the {HEADER.size} bytes of a header")
    magic, version, text_size, object_size, digest = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise CorruptBinaryError(f"compiled kernel: starts with {data[:12]!r}, expected {MAGIC!r} and version {VERSION}")
    expected = HEADER.size + text_size + object_size
    if len(data) != expected:
        raise CorruptBinaryError(f"compiled kernel: {len(data)} bytes, but its header says {expected}")
    text, object_code = data[HEADER.size : HEADER.size + text_size], data[HEADER.size + text_size :]
    if _digest(text, object_code) != digest:
        raise CorruptBinaryError("compiled kernel: the contents do not match their checksum")
    metadata = json.loads(text)
    return Binary(
        name=metadata["name"],
        entry=metadata["entry"],
        arguments=tuple(metadata["arguments"]),
        scratch_bytes=metadata["scratch_bytes"],
        sites=tuple(Site(**site) for site in metadata["sites"]),
        checked=metadata["checked"],
        object_code=object_code,
    )


def _digest(text: bytes, object_code: bytes) -> bytes:
    digest = hashlib.blake2b(text, digest_size=16)
    digest.update(object_code)
    return digest.digest()
