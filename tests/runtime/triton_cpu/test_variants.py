"""The conformance suite where the code generator takes another path: other instruction sets, and checked mode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graphwright.runtime.triton_cpu import isa
from graphwright.runtime.triton_cpu.errors import BackendError

SUITE = Path(__file__).parent / "conformance"
VARIANTS = {
    "avx2": {"TRITON_CPU_ISA": "avx2"},
    "portable": {"TRITON_CPU_ISA": "portable"},
    "checked": {"TRITON_CPU_CHECKED": "1"},
}


def run_suite(variant: str, stride: int, cache: Path) -> None:
    """Run one test in `stride` of the conformance suite in a process of its own."""
    settings = VARIANTS[variant]
    try:
        isa.detect(settings.get(isa.ENVIRONMENT_VARIABLE, ""))
    except BackendError as error:
        pytest.skip(str(error))
    environment = os.environ | settings | {"TRITON_CACHE_DIR": str(cache), "CONFORMANCE_STRIDE": str(stride)}
    for name in [name for name in environment if name.startswith("PYTEST")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_of_the_suite_passes(variant: str, tmp_path: Path) -> None:
    """Every tenth conformance test passes."""
    run_suite(variant, 10, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_suite_passes(variant: str, tmp_path: Path) -> None:
    """Every conformance test passes."""
    run_suite(variant, 1, tmp_path)
