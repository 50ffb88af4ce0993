"""Fixtures of the conformance suite, and the writer of its table of operations and dtypes.

Run `pytest tests/runtime/triton_cpu/conformance --conformance-table=docs/triton-cpu.md` to write the table into that page,
between the comments that mark its place.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED:
    os.environ.setdefault("TRITON_DEFAULT_BACKEND", "cpu")
if "TRITON_CACHE_DIR" not in os.environ:
    CACHE = tempfile.mkdtemp(prefix="conformance-cache-")
    os.environ["TRITON_CACHE_DIR"] = CACHE
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conformance_buffers import Buffers  # noqa: E402

PROPERTY = "conformance"
BEGIN, END = "<!-- conformance table: begin -->", "<!-- conformance table: end -->"
SECONDS = int(os.environ.get("CONFORMANCE_SECONDS", "120"))
STRIDE = int(os.environ.get("CONFORMANCE_STRIDE", "1"))
"""Of the collected tests, one in this many is run."""

DTYPE_ORDER = (
    "int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float8e4nv", "float8e5", "float8e4b15", "float8e4b8", "float8e5b16", "float16", "bfloat16", "float32", "float64", "any",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file of the table."""
    parser.addoption("--conformance-table", default=None, help="write the table of operations x dtypes into this page")


def pytest_configure(config: pytest.Config) -> None:
    """Register the collector of results."""
    config.addinivalue_line("markers", "compiled: needs a compiling backend; the interpreter cannot run it or is wrong")
    config.addinivalue_line("markers", "since(version): uses what Triton's language has from this version on")
    config.pluginmanager.register(ConformanceTable(config), "conformance-table")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that only a compiling backend can pass when Triton interprets, and thin out where that is asked for."""
    if STRIDE > 1:
        items[:] = items[::STRIDE]
    for item in items:
        marker = item.get_closest_marker("since")
        if marker is not None and installed_triton() < tuple(int(part) for part in marker.args[0].split(".")):
            item.add_marker(pytest.mark.skip(reason=f"Triton before {marker.args[0]} cannot express this"))
    if INTERPRETED:
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
            if item.get_closest_marker("compiled") or "bfloat16" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="the interpreter cannot run this or computes it wrongly"))


def installed_triton() -> tuple[int, int]:
    """Return the major and minor version of Triton."""
    major, minor, *_ = version("triton").split(".")
    return int(major), int(minor)


class ConformanceTable:
    """Collects what each test covered and writes one table of operations and dtypes.

    Args:
        config: the run's configuration; the table is written only where `--conformance-table` is given.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.path = config.getoption("--conformance-table", default=None)
        self.is_worker = hasattr(config, "workerinput")
        self.states: dict[tuple[str, str], set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of each operation and dtype that the test declared."""
        if report.when == "setup" or (report.when == "teardown" and report.passed):
            return
        for name, value in report.user_properties:
            if name == PROPERTY:
                operation, dtype, kind = value
                state = kind if report.passed else "skipped" if report.skipped else "fail"
                self.states.setdefault((operation, dtype), set()).add(state)

    def pytest_sessionfinish(self) -> None:
        """Write the table once, in the process that sees every report."""
        if self.path and not self.is_worker:
            page = Path(self.path)
            before, begin, rest = page.read_text().partition(BEGIN)
            _, end, after = rest.partition(END)
            if not (begin and end):
                raise pytest.UsageError(f"{page} has no place for the table: it needs the lines {BEGIN} and {END}")
            page.write_text(f"{before}{BEGIN}\n{self.text()}{END}{after}")

    def text(self) -> str:
        """Return the table as Markdown."""
        used = {dtype for _, dtype in self.states}
        dtypes = [name for name in DTYPE_ORDER if name in used] + sorted(used - set(DTYPE_ORDER))
        lines = [
            "| operation | " + " | ".join(dtypes) + " |",
            "|---|" + "---|" * len(dtypes),
        ]
        for operation in sorted({name for name, _ in self.states}):
            cells = [self.cell(self.states.get((operation, dtype), set())) for dtype in dtypes]
            lines.append(f"| {operation.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    @staticmethod
    def cell(states: set[str]) -> str:
        """Return one cell's word for the set of outcomes seen."""
        if "fail" in states:
            return "FAIL"
        if {"pass", "unsupported"} <= states:
            return "part"
        if "pass" in states:
            return "pass"
        return "no" if "unsupported" in states else ""


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Fail a test whose kernel takes longer to compile or run than any should."""

    def expire(number: int, frame: object) -> None:
        raise TimeoutError(f"the test took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def covers(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that declares the operation and dtypes that the test covers."""

    def declare(operation: str, *dtypes: str, supported: bool = True) -> None:
        for dtype in dtypes or ("any",):
            kind = "pass" if supported else "unsupported"
            request.node.user_properties.append((PROPERTY, (operation, dtype, kind)))

    return declare


@pytest.fixture
def buffers() -> Iterator[Buffers]:
    """Yield an allocator of poisoned, guarded tensors, and check the guards and the inputs after the test."""
    allocator = Buffers()
    yield allocator
    allocator.check()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Return a random generator seeded by the test's name."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


if INTERPRETED:

    @pytest.fixture(autouse=True)
    def cpu_driver() -> None:
        """Select no driver, in place of the fixture of the folder above: the interpreter needs none."""
