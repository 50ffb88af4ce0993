"""The text of generated kernels, as people read it: kept in files, one for each way of walking over rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graphwright.codegen.kernel_text import OPERATIONS, TYPED, dtype_text, identity_of, number_text
from graphwright.codegen.sources import KernelSources
from graphwright.codegen.tiling import Segment, choose, segments
from graphwright.ir.errors import LoweringError

Check = Callable[..., Any]


def text(compiled: Any) -> str:
    """Return all kernels' texts, without the lines of the model's code."""
    return "\n".join(re.sub(r" \(\S+:\d+\)", "", kernel) for kernel in compiled.schedule.kernels.values())


def test_flat(check: Check, golden: Callable[[str], None]) -> None:
    """Elementwise work walks over all elements in blocks."""
    golden(text(check(lambda x, y: F.silu(x) * y + 1, (torch.randn(4, 30), torch.randn(4, 30)))))


def test_rows(check: Check, golden: Callable[[str], None]) -> None:
    """A norm with a residual takes rows whole, in pieces of a power of two."""
    weights = [torch.randn(96), torch.randn(96)]
    calls = [(torch.randn(n, 96), torch.randn(n, 96)) for n in (5, 2)]
    names = {"args.0": {0: "n"}, "args.1": {0: "n"}}
    golden(text(check(lambda x, y, w, b: F.layer_norm(x + y, (96,), w, b), *calls, weights=weights, dynamic=names)))


def test_tiles(check: Check, golden: Callable[[str], None]) -> None:
    """Short rows are taken several at a time."""
    golden(text(check(lambda x: (x.softmax(-1), x.sum(-1)), (torch.randn(40, 12),))))


def test_loop(check: Check, golden: Callable[[str], None]) -> None:
    """Rows whose length the call brings are walked over in blocks."""
    golden(text(check(lambda x: x.softmax(-1), *((torch.randn(3, n),) for n in (7, 2000)), dynamic={"args.0": {1: "n"}})))


def test_halves(check: Check, golden: Callable[[str], None]) -> None:
    """A rotation's halves are pieces of their own, each without the other's side of the condition."""

    def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., 32:], x[..., :32]], -1) * sin

    golden(text(check(rotated, tuple(torch.randn(6, 64) for _ in range(3)))))


@pytest.mark.parametrize("names", [("row", "col"), ("x", "total"), ("n_rows", "n_columns"), ("start", "p0")], ids=str)
def test_sizes_named_like_parts_of_a_kernel(check: Check, names: tuple[str, str]) -> None:
    """Sizes may be called anything: a kernel's own names make way, or the size's does."""

    def function(x: torch.Tensor) -> Any:
        at = torch.arange(x.shape[1])
        return (x * x.shape[0] + at * x.shape[1]).flip(1).softmax(-1), x.transpose(0, 1) + x.shape[0], x.sum(-1) / x.shape[1]

    check(function, *((torch.randn(shape),) for shape in ((4, 7), (6, 2000))), dynamic={"args.0": dict(enumerate(names))})


def test_no_paths(check: Check, root: Path) -> None:
    """A kernel's header names the node, and the last folder, file and line of the model's code; nothing of this machine."""
    compiled = check(lambda x: (x + 1).softmax(-1), (torch.randn(3, 5),))
    (written,) = compiled.schedule.kernels.values()
    assert re.fullmatch(r"# softmax\w* \(codegen/\w+\.py:\d+\)", written.splitlines()[0])
    assert str(root) not in written
    assert str(Path.home()) not in written


def test_equal_bodies_are_one_kernel() -> None:
    """Equal texts are one kernel whose header names its uses; other texts of the same kind get a number."""
    sources = KernelSources()
    names = [sources.add("add", "def {name}(): pass\n", f"add_{k}") for k in range(6)]
    other = sources.add("add", "def {name}(): return\n", "add_6")
    assert names == ["add_kernel"] * 6
    assert other == "add_kernel_1"
    header = sources.texts()["add_kernel"].splitlines()[:5]
    assert header == ["# add_0", "# add_1", "# add_2", "# add_3", "# and 2 more like these"]
    assert "def add_kernel_1()" in sources.texts()[other]


def test_names_are_never_taken_twice() -> None:
    """Kinds whose names look like numbered names of others do not collide."""
    sources = KernelSources()
    stems = ["a", "a", "a_kernel", "a_kernel", "a", "a_kernel_1", "a" * 80, "a" * 81]
    names = [sources.add(stem, f"def {{name}}(): {k}\n", "") for k, stem in enumerate(stems)]
    assert len(set(names)) == len(stems)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 63, 64, 100, 127, 1000, 16384])
def test_segments_cover_every_column_once(columns: int) -> None:
    """Pieces lie end to end, begin anew at cuts, and count each column once."""
    for cuts in ([], [columns // 2], [1, columns // 3, columns - 1]):
        inner = sorted({c for c in cuts if 0 < c < columns})
        pieces = list(segments(columns, inner))
        assert [c for piece in pieces for c in range(piece.start, piece.stop)] == list(range(columns))
        assert set(inner) <= {piece.start for piece in pieces}
        assert all(
            piece.size & (piece.size - 1) == 0 and piece.masked == (piece.stop < piece.start + piece.size) for piece in pieces
        )


def test_ways_of_walking() -> None:
    """The length of rows decides."""
    assert choose(100, True, False, [], False).mode == "flat"
    assert choose(20, False, False, [], False).mode == "tiles"
    assert choose(20, False, True, [], False).mode == "rows"
    assert choose(100, False, False, [], False).mode == "rows"
    assert choose(16385, False, False, [], False).mode == "loop"
    assert choose("n", False, False, [], False).mode == "loop"
    assert choose(96, False, False, [48], False).segments == (
        Segment(0, 32, 32),
        Segment(32, 16, 48),
        Segment(48, 32, 80),
        Segment(80, 16, 96),
    )


def test_numbers_and_dtypes() -> None:
    """Numbers are written so that Triton reads the same ones."""
    assert number_text(float("nan"), torch.float32) == 'float("nan")'
    assert number_text(-float("inf"), torch.float32) == 'float("-inf")'
    assert float(number_text(0.1, torch.float64)) == 0.1
    assert number_text(1, torch.bool) == "True"
    assert identity_of("max", torch.int8) == -128
    assert identity_of("min_nan", torch.float32) == float("inf")
    assert identity_of("all", torch.bool) is True
    assert dtype_text(torch.bool) == "tl.int1"
    with pytest.raises(LoweringError, match=r"no kernels for torch\.complex64"):
        dtype_text(torch.complex64)
    assert all(OPERATIONS[name].startswith("libdevice.") for name in TYPED)
