"""Whatever happens to the cache of compiled kernels, launches compute the right thing."""

from __future__ import annotations

import builtins
import errno
import json
import os
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.cache import FileCacheManager

from graphwright.runtime.triton_cpu import compiler, prepare
from graphwright.runtime.triton_cpu.binary import CorruptBinaryError
from graphwright.runtime.triton_cpu.cache import SafeCacheManager, install_cache
from graphwright.runtime.triton_cpu.driver import CPUDriver

SCRIPT = """import sys, time, torch, triton, triton.language as tl
from graphwright.runtime.triton_cpu import compiler
made = []
original = compiler.make_binary
compiler.make_binary = lambda *a: made.append(1) or original(*a)
@triton.jit
def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.exp(tl.load(x_ptr + offsets)))
x, y = torch.randn(256), torch.zeros(256)
if sys.argv[1:]:
    time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
kernel[(4,)](x, y, BLOCK=64)
torch.testing.assert_close(y, torch.exp(x))
print(len(made))
"""


@triton.jit
def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) * 3)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return the folder of a cache that only this test uses."""
    path = tmp_path / "cache"
    monkeypatch.setattr(triton.knobs.cache, "dir", str(path))
    return path


@pytest.fixture
def launch(monkeypatch):
    """Return a function that launches the kernel as a new process would, checks it, and tells how often it was compiled."""
    made = []
    original = compiler.make_binary

    def make_binary(*arguments: object) -> bytes:
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(compiler, "make_binary", make_binary)

    def run() -> int:
        kernel.device_caches.clear()
        made.clear()
        x, y = torch.randn(256), torch.zeros(256)
        kernel[(4,)](x, y, BLOCK=64)
        assert torch.equal(y, x * 3)
        return len(made)

    return run


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_second_process_does_not_compile(run_python):
    """A kernel compiled by one process is loaded by the next."""
    assert run_python(SCRIPT) == "1\n"
    assert run_python(SCRIPT) == "0\n"


@pytest.mark.slow
def test_racing_processes_agree(python):
    """Processes that compile the same kernel at the same moment all get the right result, and leave a good entry."""
    import time

    start = str(time.time() + 8)
    processes = [python(SCRIPT, start) for _ in range(4)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    process = python(SCRIPT)
    assert process.communicate(timeout=120)[0] == "0\n"


def test_hit_after_compilation(folder, launch):
    """A second launch from disk compiles nothing."""
    assert launch() == 1
    assert launch() == 0


@pytest.mark.parametrize("suffix", [".json", ".cpuobj", ".llir", ".ttir", ".source"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "remove", "garbage"])
def test_damaged_file_is_compiled_again(folder, launch, suffix, damage):
    """An entry with any file damaged counts as absent and is replaced."""
    assert launch() == 1
    (path,) = (p for p in files(folder) if p.suffix == suffix and not p.name.startswith("__grp__"))
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"truncate": data[:middle], "empty": b"", "flip": flipped, "garbage": b"\xff\x00" * 50}[damage])
    assert launch() == 1
    assert launch() == 0


@pytest.mark.parametrize("contents", ["", "{", "[]", "{}", '{"child_paths": null}', '{"child_paths": {}}', "null", "\udcff"])
def test_damaged_list_of_files_is_compiled_again(folder, launch, contents):
    """An entry whose list of files cannot be read counts as absent and is replaced."""
    launch()
    (path,) = (p for p in files(folder) if p.name.startswith("__grp__"))
    path.write_bytes(contents.encode(errors="surrogateescape"))
    assert launch() == 1
    assert launch() == 0


def test_entry_of_triton_s_own_manager_is_not_run(folder, launch, monkeypatch):
    """An entry without digests is compiled again."""
    monkeypatch.setattr(triton.knobs.cache, "manager_class", FileCacheManager)
    assert launch() == 1
    assert launch() == 0
    monkeypatch.setattr(triton.knobs.cache, "manager_class", SafeCacheManager)
    assert launch() == 1


def test_unusable_folder(folder, launch):
    """A file in place of the cache's folder costs the cache only."""
    folder.write_text("in the way")
    assert launch() == 1
    assert launch() == 1
    assert folder.read_text() == "in the way"


def failing(monkeypatch, folder: Path, number: int) -> None:
    """Let every attempt to write below a folder fail with an errno."""
    original_open, original_makedirs = builtins.open, os.makedirs

    def fail(path: object) -> None:
        if str(path).startswith(str(folder)):
            raise OSError(number, os.strerror(number), str(path))

    def open_(path: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if set(mode) & set("wax+"):
            fail(path)
        return original_open(path, mode, *args, **kwargs)

    def makedirs(path: object, *args: object, **kwargs: object) -> None:
        if number == errno.EROFS and not os.path.isdir(str(path)):
            fail(path)
        original_makedirs(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr(os, "makedirs", makedirs)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_unwritable_cache(folder, launch, monkeypatch, number):
    """A read-only, full or broken disk costs the cache only."""
    failing(monkeypatch, folder, number)
    assert launch() == 1
    assert launch() == 1
    assert not [path for path in files(folder) if path.name.startswith("__grp__")]


def test_read_only_cache_is_still_read(folder, launch, monkeypatch):
    """What is in a cache that has become read-only is used."""
    assert launch() == 1
    failing(monkeypatch, folder, errno.EROFS)
    assert launch() == 0


def test_disk_fills_up_between_files(folder, launch, monkeypatch):
    """An entry of which only some files could be written is not listed, and does not pass for one later."""
    original = FileCacheManager.put

    def put(self: FileCacheManager, data: object, filename: str, binary: bool = True) -> str:
        if filename.endswith((".cpuobj", ".json")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, data, filename, binary)

    with monkeypatch.context() as patch:
        patch.setattr(FileCacheManager, "put", put)
        assert launch() == 1
        assert launch() == 1
    assert launch() == 1
    assert launch() == 0


@pytest.mark.slow
def test_full_file_system(run_python, tmp_path):
    """On a real file system without space, launches work from a temporary folder."""
    import subprocess

    mount = tmp_path / "full"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        assert run_python(SCRIPT, TRITON_CACHE_DIR=str(mount)) == "1\n"
        assert run_python(SCRIPT, TRITON_CACHE_DIR=str(mount)) == "1\n"
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_temporary_files_go_with_the_process(run_python, tmp_path):
    """What could not be cached is removed at exit."""
    blocked, temporary = tmp_path / "blocked", tmp_path / "temporary"
    blocked.write_text("")
    temporary.mkdir()
    assert run_python(SCRIPT, TRITON_CACHE_DIR=str(blocked), TMPDIR=str(temporary)) == "1\n"
    assert not files(temporary)
    assert not [path for path in temporary.iterdir() if path.name.startswith("graphwright-")]


def test_nowhere_to_write(run_python):
    """Where no folder at all can be written, the error says what to do."""
    script = """import signal, resource, torch, triton, triton.language as tl
@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr, 1.0)
x = torch.zeros(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    kernel[(1,)](x)
except OSError as error:
    print("TRITON_CACHE_DIR" in str(error))
"""
    assert run_python(script) == "True\n"


def test_tuning_results_are_checked(folder):
    """A damaged file of tuning results counts as absent."""
    manager = SafeCacheManager("KEY")
    path = Path(manager.put(json.dumps({"a": 1}), "kernel.autotune.json", binary=False))
    assert manager.get_file("kernel.autotune.json") == str(path)
    path.write_text('{"a"')
    assert manager.get_file("kernel.autotune.json") is None
    assert manager.get_file("missing.json") is None


def test_other_backends_entries_are_left_alone(folder):
    """Entries that another manager wrote for a GPU are read as before."""
    manager = FileCacheManager("KEY")
    paths = {name: manager.put(b"\x7fELF", name) for name in ("kernel.cubin", "kernel.json")}
    manager.put_group("kernel.json", paths)
    assert SafeCacheManager("KEY").get_group("kernel.json") == paths
    assert SafeCacheManager("KEY").get_group("other.json") is None


def test_user_s_manager_is_kept(monkeypatch):
    """A manager that the user has chosen is not replaced."""
    monkeypatch.setattr(triton.knobs.cache, "manager_class", FileCacheManager)
    install_cache()
    assert triton.knobs.cache.manager_class is FileCacheManager
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    install_cache()
    assert triton.knobs.cache.manager_class is SafeCacheManager


def test_corrupt_binary_is_never_loaded():
    """Bytes that are not a whole kernel are refused by the loader itself."""
    launch = prepare(kernel, (1,), torch.zeros(64), torch.zeros(64), BLOCK=64)
    data = bytearray(launch.compiled.kernel)
    data[-1] ^= 1
    with pytest.raises(CorruptBinaryError, match="checksum"):
        CPUDriver().utils.load_binary("kernel", bytes(data), 0, "cpu")
