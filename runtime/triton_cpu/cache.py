"""Triton's cache of compiled kernels on disk, made safe against what happens to files.

Triton's own manager fails a launch when the cache cannot be written, and trusts what it reads. The manager here keeps its
layout on disk and adds a digest of each file to the list of an entry's files. An entry that is not whole counts as absent, so
that the kernel is compiled again and the entry replaced; what cannot be written goes to a temporary folder of this process,
where Triton reads it back.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile

from triton import knobs
from triton.runtime.cache import FileCacheManager

_DIGESTS = "digests"
_BINARY_SUFFIX = ".cpuobj"


def install_cache() -> None:
    """Let Triton use `SafeCacheManager`, unless the user has chosen a manager."""
    if knobs.cache.manager_class is None:
        knobs.cache.manager_class = SafeCacheManager


class SafeCacheManager(FileCacheManager):
    """A file cache in which no state of the disk fails a launch.

    Args:
        key: name of the entry's folder.
        override: look in the folder of hand-made replacements instead.
        dump: write to the folder for inspection instead.
    """

    lock_path: str | None

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        try:
            super().__init__(key, override=override, dump=dump)
        except OSError:
            # The folder cannot be made; `cache_dir` is set all the same, and what is in it may be readable.
            self.lock_path = None

    def put(self, data: object, filename: str, binary: bool = True) -> str:
        """Write a file and return its path.

        Raises:
            OSError: no temporary folder can be written either.
        """
        if self.lock_path is not None:
            try:
                return str(super().put(data, filename, binary=binary))
            except OSError:
                pass
        return self._put_aside(data, filename)

    def _put_aside(self, data: object, filename: str) -> str:
        contents = data if isinstance(data, bytes) else str(data).encode()
        errors = []
        for base in (None, "/dev/shm"):
            try:
                path = os.path.join(tempfile.mkdtemp(dir=_temporary_folder(base, os.getpid())), filename)
                with open(path, "wb") as file:
                    file.write(contents)
                return path
            except OSError as error:
                errors.append(error)
        raise OSError(
            f"{filename}: neither Triton's cache ({self.cache_dir}) nor a temporary folder can be written: "
            f"{'; '.join(map(str, errors))}. Point TRITON_CACHE_DIR or TMPDIR to a folder with free space"
        ) from errors[-1]

    def put_group(self, filename: str, group: dict[str, str]) -> str | None:
        """Record which files belong together, if all of them were put where the next process finds them."""
        folder = os.path.join(self.cache_dir, "")
        if not all(path.startswith(folder) for path in group.values()):
            return None
        try:
            digests = {name: _digest(path) for name, path in group.items()}
        except OSError:
            return None
        return self.put(json.dumps({"child_paths": group, _DIGESTS: digests}), f"__grp__{filename}", binary=False)

    def get_file(self, filename: str) -> str | None:
        """Return the path of a file, or None when there is none or it is damaged beyond reading."""
        path: str | None = super().get_file(filename)
        if path is not None and filename.endswith(".json"):
            try:
                with open(path, encoding="utf-8") as file:
                    json.load(file)
            except (OSError, ValueError):
                return None
        return path

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Return the paths of a group's files by name, or None when one is missing or damaged."""
        try:
            with open(self._make_path(f"__grp__{filename}"), encoding="utf-8") as file:
                listed = json.load(file)
            group: dict[str, str] = dict(listed["child_paths"])
            digests = listed.get(_DIGESTS)
            if digests is None:
                # Written by Triton's own manager: trusted as Triton does, but never to run on this CPU.
                complete = all(os.path.exists(path) for path in group.values())
                return group if complete and not any(name.endswith(_BINARY_SUFFIX) for name in group) else None
            whole = set(digests) == set(group) and all(_digest(path) == digests[name] for name, path in group.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return group if whole else None


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


@functools.cache
def _temporary_folder(base: str | None, process: int) -> str:
    """Make a folder that goes when this process ends; the children that it forks have folders of their own."""
    folder = tempfile.mkdtemp(prefix="graphwright-", dir=base)

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
