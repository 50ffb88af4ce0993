"""Products by a weight in panels: which panels, the compiled code, and how a product is cut into tasks.

The code is described in `panel_code`. It is compiled once per machine and kept in Triton's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite

from . import jit
from .cache import SafeCacheManager
from .isa import Isa, host_isa
from .launch_code import launch_code
from .panel_code import ENTRY, PLAN, THREADS, UNROLL, Block, module_text
from .worker import PARALLEL, SERIAL_WORK_NS

_BLOCKS = {"avx512": (Block(8, 3, 16), Block(6, 4, 16), Block(12, 2, 16)), "avx2": (Block(6, 2, 8),)}
"""The blocks of each instruction set, the fastest first."""

_CHUNK_DEPTH = 384
"""K of a chunk. It bounds the error of a sum as well, because each chunk has its own."""

_FEW_ROWS, _SWEEP_ROWS = 64, 128
"""Up to `_FEW_ROWS`, all of K is one slab; slabs leave room for `_SWEEP_ROWS` rows in the second-level cache."""

_FLOPS_PER_NS = 100
_BYTES_PER_NS = 12

_OBJECT = "panel_product.cpuobj"

Call = Callable[..., None]


class PanelProduct:
    """The products by weights whose panels have one width.

    Args:
        isa: the instruction set.
        block: the accumulators.
    """

    def __init__(self, isa: Isa, block: Block) -> None:
        self.width = block.width
        launches = launch_code()
        count: Any = launches.thread_count
        threads = ctypes.cast(count, ctypes.c_void_p).value or 0
        code = jit.load(_object_code(module_text(isa, block), isa), {PARALLEL: launches.parallel, THREADS: threads})
        pointer = ctypes.c_void_p
        self.call: Call = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, pointer)(code.function(ENTRY))
        """`call(x, out, panels, plan)` with addresses; the GIL is released meanwhile, and calls may overlap."""
        self._rows = block.rows

    def plan(
        self, m: int, n: int, k: int, *, x_stride: int, out_stride: int, accumulate: bool, cache_bytes: int
    ) -> ctypes.Array[ctypes.c_char]:
        """Return the plan of out[M, N] = x[M, K] weight^T.

        Args:
            m: rows, at least 1.
            n: columns, at least 1.
            k: summed, at least 1.
            x_stride: elements from row to row of x.
            out_stride: elements from row to row of the result.
            accumulate: add to what the result holds.
            cache_bytes: size of the second-level cache of a core.
        """
        panels = -(-n // self.width)
        floats = cache_bytes // 2 // 4
        slab = k if m <= _FEW_ROWS else _share(k, max(_CHUNK_DEPTH, floats // min(m, _SWEEP_ROWS)), UNROLL)
        chunk = _share(slab, _CHUNK_DEPTH, UNROLL)
        sweep = _share(m, max(_FEW_ROWS, floats // slab), self._rows)
        tasks = panels * -(-m // sweep)
        work_ns = max(2 * m * n * k / _FLOPS_PER_NS, 4 * n * k / _BYTES_PER_NS)
        parallel = tasks > 1 and work_ns > SERIAL_WORK_NS
        strides = (4 * x_stride, 4 * out_stride)
        packed = PLAN.pack(k, n, panels, chunk, m, *strides, accumulate, slab, sweep, tasks, parallel)
        return ctypes.create_string_buffer(packed, len(packed))


def panel_product(n: int) -> PanelProduct | None:
    """Return the products by weights of `n` rows: those whose panels are filled best, then the fastest.

    Returns:
        None on a CPU for which there are none.
    """
    isa = host_isa()
    blocks = _BLOCKS.get(isa.name, ())
    return _product(isa, min(blocks, key=lambda block: -n % block.width)) if blocks else None


@functools.cache
def _product(isa: Isa, block: Block) -> PanelProduct:
    return PanelProduct(isa, block)


def _share(total: int, most: int, multiple: int) -> int:
    """Return the size of the pieces, near `most`, of which equal ones make up `total`; a multiple of `multiple`."""
    pieces = -(-total // most)
    return -(-total // (pieces * multiple)) * multiple


def _object_code(text: str, isa: Isa) -> bytes:
    """Return the compiled module, from the cache where it is there."""
    key = hashlib.sha256("\n".join([llvmlite.__version__, repr(isa), text]).encode()).hexdigest()
    cache = SafeCacheManager(key)
    found = cache.get_group(_OBJECT)
    if found:
        return Path(found[_OBJECT]).read_bytes()
    code = jit.compile_object(text, isa)
    cache.put_group(_OBJECT, {_OBJECT: cache.put(code, _OBJECT)})
    return code
