"""Which threads run the programs of a grid, and that each program runs once."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import prepare
from graphwright.runtime.triton_cpu.launch_code import launch_code
from graphwright.runtime.triton_cpu.threads import thread_pool

COUNT = """, ptr %out) #0 {
  %a = mul i32 %pid2, %np1
  %b = add i32 %a, %pid1
  %c = mul i32 %b, %np0
  %d = add i32 %c, %pid0
  %at = getelementptr i32, ptr %out, i32 %d
  %old = atomicrmw add ptr %at, i32 1 monotonic
  ret void
}
"""

WHO = """, ptr %out, i64 %spin) #0 {
entry:
  %self = call i64 @pthread_self()
  %at = getelementptr i64, ptr %out, i32 %pid0
  br label %wait
wait:
  %k = phi i64 [ 0, %entry ], [ %next, %wait ]
  store volatile i64 %self, ptr %at
  %next = add i64 %k, 1
  %more = icmp slt i64 %next, %spin
  br i1 %more, label %wait, label %done
done:
  ret void
}
"""

SCRATCH = """, ptr %out, i64 %size) #0 {
  %last = sub i64 %size, 8
  %end = getelementptr i8, ptr %scratch, i64 %last
  store i64 17, ptr %scratch
  store i64 25, ptr %end
  %a = load i64, ptr %scratch
  %b = load i64, ptr %end
  %address = ptrtoint ptr %scratch to i64
  %low = and i64 %address, 63
  %shifted = shl i64 %low, 8
  %ab = add i64 %a, %b
  %value = or i64 %ab, %shifted
  %at = getelementptr i64, ptr %out, i32 %pid0
  store i64 %value, ptr %at
  ret void
}
"""


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) * factor, mask=mask)


@triton.jit
def busy_kernel(x_ptr, rounds, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    for _ in range(rounds):
        x = tl.sqrt(x + 1.0)
    tl.store(x_ptr + offsets, x)


@pytest.fixture
def who(ir_kernel):
    """Return a function that runs programs and returns the ids of their threads."""
    kernel = ir_kernel(WHO, ("ptr", "i64"), before="declare i64 @pthread_self()\n")

    def run(programs: int, threads: int, spin: int) -> list[int]:
        out = torch.zeros(programs, dtype=torch.int64)
        kernel.run((programs, 1, 1), threads, out.data_ptr(), spin)
        return out.tolist()

    return run


@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 1, 1), (3, 5, 2), (1, 1, 9), (1000, 3, 1), (2, 500, 3)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_program_runs_once(ir_kernel, grid, threads):
    """Each point of a grid is visited exactly once, for any number of threads, launch after launch."""
    kernel = ir_kernel(COUNT, ("ptr",))
    out = torch.zeros(grid, dtype=torch.int32)
    for k in range(1, 6):
        assert kernel.run(grid, threads, out.data_ptr()).state == 0
        assert torch.equal(out, torch.full_like(out, k))


def test_pool_is_torch_s():
    """The pool is found where torch is installed."""
    assert thread_pool().parallel
    assert thread_pool().count


def test_thread_count_follows_torch(threads):
    """A launch uses torch's number of threads, in threads that torch has not seen too."""
    seen = []
    for count in (1, 3, 2):
        threads(count)
        assert launch_code().thread_count() == count
        thread = threading.Thread(target=lambda: seen.append(launch_code().thread_count()))
        thread.start()
        thread.join()
    assert seen == [1, 3, 2]


def test_one_thread_is_the_caller_s(who):
    """With one thread all programs run on the caller's."""
    assert set(who(50, 1, 1000)) == {threading.get_ident()}


def test_one_program_runs_on_the_caller_s_thread(who):
    """A single program wakes nobody."""
    assert who(1, 2, 100_000) == [threading.get_ident()]


def test_large_work_is_spread(who):
    """Programs that take long run on as many threads as were asked for, the caller's among them."""
    ids = set(who(64, 2, 1_000_000))
    assert len(ids) == 2
    assert threading.get_ident() in ids


def test_small_work_stays_on_the_caller_s_thread(who):
    """Once a kernel is known to be short, waking threads is spared."""
    who(2, 2, 1)
    assert any(set(who(2, 2, 1)) == {threading.get_ident()} for _ in range(50))


@pytest.mark.parametrize("size", [8, 64, 1000, 200_000, 300_000, 5 << 20])
def test_scratch_is_aligned_and_whole(ir_kernel, size):
    """A scratch buffer starts at a multiple of 64 and can be written to its end, on the stack or off it."""
    kernel = ir_kernel(SCRATCH, ("ptr", "i64"), scratch_bytes=size)
    out = torch.zeros(8, dtype=torch.int64)
    assert kernel.run((8, 1, 1), 2, out.data_ptr(), size).state == 0
    # A buffer of 8 bytes is written to its start only.
    assert out.tolist() == [42 if size > 8 else 50] * 8


def test_concurrent_launches_do_not_meet(threads):
    """Launches of one kernel from several Python threads each compute their own result."""
    threads(2)
    wrong = []

    def work(seed: int) -> None:
        x, y = torch.full((20_000,), float(seed)), torch.zeros(20_000)
        launch = prepare(scale_kernel, (79,), x, y, 20_000, 3.0, BLOCK=256)
        for k in range(60):
            y.zero_()
            if k % 2:
                launch()
            else:
                scale_kernel[(79,)](x, y, 20_000, 3.0, BLOCK=256)
            if not torch.equal(y, x * 3):
                wrong.append((seed, k))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 7)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert not wrong


def test_other_python_threads_run_during_a_launch(threads):
    """The GIL is free while a kernel runs."""
    threads(1)
    x = torch.rand(1024)
    busy_kernel[(1,)](x, 10, BLOCK=1024)
    ticks, running = [], threading.Event()

    def launch() -> None:
        running.set()
        busy_kernel[(1,)](x, 300_000, BLOCK=1024)
        running.clear()

    thread = threading.Thread(target=launch)
    thread.start()
    running.wait()
    while running.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    thread.join()
    assert len(ticks) > 5


def test_without_a_pool_one_thread_does_the_work(run_python):
    """Where torch brings no OpenMP that can be used, programs run on the calling thread."""
    script = """import torch, triton, triton.language as tl
from graphwright.runtime.triton_cpu import threads
threads.thread_pool = lambda: threads.ThreadPool(0, 0)
from graphwright.runtime.triton_cpu.launch_code import launch_code
@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1)
x = torch.zeros(1 << 16)
kernel[(64,)](x, BLOCK=1024)
print(launch_code().thread_count(), bool((x == 1).all()))
"""
    assert run_python(script) == "1 True\n"


def test_forked_child_can_launch(run_python):
    """A child that was forked after the parent's threads were started runs kernels on its one thread."""
    script = """import os, sys, torch, triton, triton.language as tl
@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1)
torch.set_num_threads(2)
x = torch.zeros(1 << 20)
kernel[(1024,)](x, BLOCK=1024)
kernel[(1024,)](x, BLOCK=1024)
child = os.fork()
if child == 0:
    kernel[(1024,)](x, BLOCK=1024)
    # Torch's own operations would wait for threads that the child does not have.
    os._exit(0 if (x.numpy() == 3).all() else 1)
_, status = os.waitpid(child, 0)
kernel[(1024,)](x, BLOCK=1024)
print(os.waitstatus_to_exitcode(status), bool((x == 3).all()))
"""
    assert run_python(script) == "0 True\n"
