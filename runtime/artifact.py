"""Compiled models as files.

A `.gw` file is a zip archive:

    manifest.json         versions, device, a hash of every other member, the schedule, the signature
    weights.safetensors   the weights, not compressed, so that the file's own memory serves as theirs
    kernels/NAME.py       the source of each kernel
    ...                   what the compiler adds for people, such as ir/NAME.txt and report.json

Nothing in it is unpickled, and of Python only kernels are run, which are checked to be nothing but kernels. Kernels are machine
code that computes addresses: load files only from those whom you would trust with that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import mmap
import os
import re
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.errors import ArtifactError
from graphwright.ir.signature import Signature

from .schedule import Schedule
from .schedule_json import schedule_from_data, schedule_to_data
from .validate import check_schedule
from .weight_file import read_weights, write_weights

FORMAT = 1
"""Version of the format that is written; later ones are refused."""

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
KERNELS = "kernels/"

_LOCAL_HEADER = 30
_LONGEST_TEXT = 256 * 1024 * 1024
_CHUNK = 1 << 20
_MEMBER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]*(/[A-Za-z0-9_][A-Za-z0-9_. -]*)*")
# What reading a damaged or foreign archive, and data of another form, can raise.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, LookupError, TypeError, AttributeError)
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Artifact:
    """What a file holds.

    Args:
        schedule: what to run.
        weights: by name; on the CPU they share the file's memory, and changing them changes no file.
        signature: how the model is called.
        extra: further texts by name, such as "report.json".
        versions: of graphwright, torch and triton when the file was written.
        programs: further schedules over the same weights, with their signatures, by name.
    """

    schedule: Schedule
    weights: dict[str, torch.Tensor]
    signature: Signature
    extra: dict[str, str]
    versions: dict[str, str]
    programs: dict[str, tuple[Schedule, Signature]] = field(default_factory=dict)


def save(
    path: str | os.PathLike[str],
    schedule: Schedule,
    weights: Mapping[str, torch.Tensor],
    signature: Signature,
    extra: Mapping[str, str] | None = None,
    programs: Mapping[str, tuple[Schedule, Signature]] | None = None,
) -> None:
    """Write a compiled model to a file. Either the whole file is there afterwards, or what was there before.

    Args:
        path: of the file, usually `NAME.gw`.
        schedule: what to run.
        weights: by name; those that the schedule does not name are left out.
        signature: how the model is called.
        extra: further texts by member name.
        programs: further schedules over the same weights, with their signatures, by name.

    Raises:
        ArtifactError: the schedule is not whole, or something in it cannot be stored.
        OSError: the file cannot be written.
    """
    schedules = {"": schedule} | {f"{name}/": found for name, (found, _) in (programs or {}).items()}
    for found in schedules.values():
        check_schedule(found, weights)
    buffers = [buffer for found in schedules.values() for buffer in found.buffers.values() if buffer.kind == "weight"]
    used = {buffer.source: weights[buffer.source] for buffer in buffers}
    kernels = {
        f"{KERNELS}{prefix}{name}.py": source for prefix, found in schedules.items() for name, source in found.kernels.items()
    }
    texts = kernels | dict(extra or {})
    for name in texts:
        if not _MEMBER.fullmatch(name) or name in (MANIFEST, WEIGHTS):
            raise ArtifactError(
                f"{name!r} cannot be the name of a part of a file: letters, digits, _ . - and / may stand in it"
            )
    if len(texts) != len(kernels) + len(extra or {}):
        raise ArtifactError(f"a text among the extra ones has the name of a kernel: {', '.join(extra or {})}")
    target = Path(path)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                hashes = {WEIGHTS: _add_weights(archive, used)}
                for name, text in sorted(texts.items()):
                    hashes[name] = hashlib.sha256(text.encode()).hexdigest()
                    _add_text(archive, name, text)
                _add_text(archive, MANIFEST, json.dumps(_manifest(schedule, signature, hashes, programs or {}), indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Artifact:
    """Read a compiled model. Every part is checked before any is used.

    Raises:
        ArtifactError: the file is not a whole artifact, was changed, is of a later format, or was made for a device that is
            not there.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            # A damaged directory can send the reader to places that are no part of any file, which is an OSError.
            with zipfile.ZipFile(file) as archive:
                return _read(archive, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except ArtifactError as error:
            raise ArtifactError(f"{os.fspath(path)}: {error}") from error
        except (*_DAMAGE, OSError) as error:
            raise ArtifactError(f"{os.fspath(path)} is not a whole compiled model: {error}") from error


def _manifest(
    schedule: Schedule,
    signature: Signature,
    hashes: Mapping[str, str],
    programs: Mapping[str, tuple[Schedule, Signature]],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": {name: _version(name) for name in ("graphwright", "torch", "triton")},
        "device": schedule.device,
        "members": dict(hashes),
        "schedule": schedule_to_data(schedule),
        "signature": json.loads(signature.to_json()),
        "programs": {
            name: {"schedule": schedule_to_data(found), "signature": json.loads(own.to_json())}
            for name, (found, own) in programs.items()
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _entry(name: str, compression: int) -> zipfile.ZipInfo:
    # A fixed date: the same model gives the same bytes.
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = compression
    entry.external_attr = 0o644 << 16
    return entry


def _add_text(archive: zipfile.ZipFile, name: str, text: str) -> None:
    archive.writestr(_entry(name, zipfile.ZIP_DEFLATED), text.encode())


def _add_weights(archive: zipfile.ZipFile, weights: Mapping[str, torch.Tensor]) -> str:
    """Write the weights and return their hash."""
    digest = hashlib.sha256()
    with archive.open(_entry(WEIGHTS, zipfile.ZIP_STORED), "w", force_zip64=True) as member:

        def write(data: Any) -> None:
            digest.update(data)
            member.write(data)

        assert archive.fp is not None
        write_weights(weights, write, archive.fp.tell())
    return digest.hexdigest()


def _read(archive: zipfile.ZipFile, memory: mmap.mmap) -> Artifact:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if MANIFEST not in entries or len(entries) != len(archive.infolist()):
        raise ArtifactError(f"there is no {MANIFEST}, or a part is there twice: this is not a compiled model")
    manifest = json.loads(_read_text(archive, entries[MANIFEST]))
    _check_manifest(manifest)
    hashes = manifest["members"]
    missing, extra = sorted(set(hashes) - set(entries)), sorted(set(entries) - set(hashes) - {MANIFEST})
    if missing or extra:
        raise ArtifactError(f"parts are missing: {', '.join(missing) or 'none'}; unknown parts: {', '.join(extra) or 'none'}")
    start, size = _place(entries[WEIGHTS], memory)
    _check_hash(WEIGHTS, hashes[WEIGHTS], memory, start, size)
    texts = {}
    for name in sorted(hashes.keys() - {WEIGHTS}):
        data = _read_text(archive, entries[name])
        _check_hash(name, hashes[name], data, 0, len(data))
        texts[name] = data.decode()
    weights = read_weights(memory, start, size)
    kernels = {name.removeprefix(KERNELS).removesuffix(".py"): text for name, text in texts.items() if name.startswith(KERNELS)}
    schedule, signature = _read_program(manifest, manifest["device"], kernels, weights)
    programs = {}
    for name, data in dict(manifest.get("programs", {})).items():
        own = {kernel.removeprefix(f"{name}/"): text for kernel, text in kernels.items() if kernel.startswith(f"{name}/")}
        programs[name] = _read_program(data, manifest["device"], own, weights)
    if schedule.device != "cpu":
        weights = {name: weight.to(schedule.device) for name, weight in weights.items()}
    rest = {name: text for name, text in texts.items() if not name.startswith(KERNELS)}
    return Artifact(schedule, weights, signature, rest, dict(manifest["versions"]), programs)


def _read_program(
    data: Any, device: str, kernels: Mapping[str, str], weights: Mapping[str, torch.Tensor]
) -> tuple[Schedule, Signature]:
    schedule = schedule_from_data(data["schedule"], kernels)
    if schedule.device != device:
        raise ArtifactError(f"the device is {device!r}, and {schedule.device!r} in the schedule")
    check_schedule(schedule, weights)
    return schedule, Signature.from_json(json.dumps(data["signature"]))


def _check_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise ArtifactError(f"{MANIFEST} is not that of a compiled model")
    if manifest["format"] > FORMAT:
        raise ArtifactError(
            f"the format is {manifest['format']}, written by graphwright {manifest.get('versions', {}).get('graphwright')}; "
            f"this is graphwright {_version('graphwright')}, which reads up to {FORMAT}: install a later one, or compile again"
        )
    if manifest["format"] < 1 or not isinstance(manifest.get("members"), dict) or WEIGHTS not in manifest["members"]:
        raise ArtifactError(f"{MANIFEST} is not that of a compiled model")
    device = manifest["device"]
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ArtifactError(
            f"the model was compiled for the device {device!r}, which is not there; compile it again for this one"
        )


def _read_text(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > _LONGEST_TEXT:
        raise ArtifactError(f"{entry.filename} is {entry.file_size} bytes long, and at most {_LONGEST_TEXT} are read")
    return archive.read(entry)


def _place(entry: zipfile.ZipInfo, memory: mmap.mmap) -> tuple[int, int]:
    """Return where in the file the bytes of a member lie that is not compressed."""
    head = memory[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
    start = entry.header_offset + _LOCAL_HEADER + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or start + entry.file_size > len(memory):
        raise ArtifactError(f"{entry.filename} is compressed, encrypted or cut off")
    return start, entry.file_size


def _check_hash(name: str, expected: object, data: Any, start: int, size: int) -> None:
    digest = hashlib.sha256()
    for at in range(start, start + size, _CHUNK):
        digest.update(data[at : min(at + _CHUNK, start + size)])
    if digest.hexdigest() != expected:
        raise ArtifactError(f"{name} is not what was written: its hash differs; the file is damaged or was changed")
