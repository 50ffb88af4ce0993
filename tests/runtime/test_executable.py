"""Calling a compiled program."""

from __future__ import annotations

import threading

import pytest
import torch
from graphwright.ir.errors import GraphwrightError, InputError
from graphwright.runtime.schedule import CallStep, KernelStep, View


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(example, run, x):
    for found, expected in zip(run(x), example.reference(x), strict=True):
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert error(found, expected) < 2e-6


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 63), (1, 500), (2, 8)])
def test_computes_the_program(example, shape):
    """The results are those of the same program in double precision, for awkward sizes."""
    check(example, example.executable(), torch.randn(*shape, 24))


def test_sizes_may_change_from_call_to_call(example):
    """One executable serves many sizes, larger and smaller ones in any order, and comes back to the first."""
    run = example.executable()
    for batch, tokens in [(2, 5), (1, 1), (4, 33), (2, 5), (1, 300), (2, 5)]:
        check(example, run, torch.randn(batch, tokens, 24))


def test_more_sizes_than_are_kept(example):
    """Forgotten sizes are planned again."""
    run = example.executable()
    for tokens in [*range(1, 40), 1]:
        check(example, run, torch.randn(1, tokens, 24))


def test_empty_batch(example):
    """A batch of 0 gives empty results."""
    y, z = example.executable()(torch.randn(0, 5, 24))
    assert y.shape == (0, 5, 10)
    assert z.shape == (0, 5, 24)


def test_nan_stays_in_its_row(example):
    """NaN in one row gives NaN in that row alone."""
    x = torch.randn(1, 6, 24)
    x[0, 2, 3] = float("nan")
    y, z = example.executable()(x)
    assert torch.isnan(y).all(-1).tolist() == [[False, False, True, False, False, False]]
    assert torch.isnan(z).sum() == 1


def test_old_contents_of_the_arena_do_not_matter(example):
    """Results are the same over memory full of NaN."""
    run = example.executable()
    x = torch.randn(3, 9, 24)
    run(x)
    run._arena.view(torch.float32).fill_(float("nan"))
    check(example, run, x)


def test_results_are_new_tensors(example):
    """Results of earlier calls stay as they are, whatever later calls compute."""
    run = example.executable()
    x = torch.randn(2, 5, 24)
    first = run(x)
    kept = [t.clone() for t in first]
    second = run(torch.randn(2, 5, 24))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    addresses = {t.untyped_storage().data_ptr() for t in (*first, *second)}
    assert len(addresses) == 4
    assert run._arena.untyped_storage().data_ptr() not in addresses


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
        lambda x: x[:1].expand(x.shape),
        lambda x: x.flip(0)[[1, 0, 2]],
    ],
    ids=["transposed", "strided", "unaligned", "expanded", "gathered"],
)
def test_inputs_may_lie_anyhow(example, change):
    """Strides and alignment of the input do not matter, and it is not changed."""
    x = change(torch.randn(3, 7, 24))
    before = x.clone()
    run = example.executable()
    check(example, run, x)
    check(example, run, torch.randn(3, 7, 24))
    assert torch.equal(x, before)


def test_gradient_modes(example):
    """Calls work in every gradient mode and give results without gradients; one mode's plans serve another."""
    run = example.executable()
    x = torch.randn(2, 4, 24, requires_grad=True)
    with torch.inference_mode():
        check(example, run, x)
    with torch.no_grad():
        check(example, run, x)
    y, z = run(x)
    assert not y.requires_grad
    assert not z.requires_grad
    assert not y.is_inference()
    check(example, run, x.detach())
    assert torch.is_grad_enabled()


def test_threads_share_one_executable(example):
    """Calls from several threads, with several sizes, do not disturb one another."""
    run = example.executable()
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for k in range(20):
            x = torch.randn(1 + (seed + k) % 3, 1 + k, 24, generator=generator)
            try:
                check(example, run, x)
            except Exception as problem:
                failures.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 24), "rank"),
        (torch.randn(2, 5, 23), "must be 24"),
        (torch.randn(2, 5, 24).double(), "dtype"),
        (torch.randn(2, 513, 24), "tokens"),
        (torch.randn(2, 0, 24), "tokens"),
        (None, "tensor"),
    ],
)
def test_wrong_inputs_are_refused(example, x, message):
    """What does not fit is refused with the reason, also after calls that did."""
    run = example.executable()
    check(example, run, torch.randn(2, 5, 24))
    with pytest.raises(InputError, match=message):
        run(x)
    check(example, run, torch.randn(2, 5, 24))


def test_failing_step_is_named(example):
    """An error says which step failed, what it computes, and why; later calls work."""
    run = example.executable()
    x = torch.randn(1, 2, 24)
    check(example, run, x)
    plan = next(iter(run._plans.values()))
    runs = plan.runs

    def fail():
        raise ValueError("out of luck")

    object.__setattr__(plan, "runs", (fail, *runs[1:]))
    with pytest.raises(GraphwrightError, match=r"(?s)'first'.*out of luck.*line 1 of the model"):
        run(x)
    object.__setattr__(plan, "runs", runs)
    check(example, run, x)


def test_memory_is_that_of_live_buffers_and_of_weights_once(example):
    """Of the four temporary buffers no more than two are alive at once, and no weight is held twice."""
    run = example.executable()
    run(torch.randn(2, 50, 24))
    assert run.memory.arena_bytes <= 2 * 100 * 40 * 4 + 256
    total = sum(w.nbytes for w in example.weights.values())
    assert total <= run.memory.weight_bytes <= 1.5 * total + 4096


def test_weights_can_be_had_back(example):
    """The weights come back as they were passed."""
    found = example.executable().weights()
    assert found.keys() == example.weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in example.weights.items())


def test_profile_names_every_step(example):
    """A profile has a row for each step, and its parts sum up to the call."""
    profile = example.executable().profile(torch.randn(2, 5, 24), repeat=3)
    assert [row.name for row in profile.rows] == ["first", "bias_relu", "second", "softmax", "reshape", "scale"]
    assert [row.kind for row in profile.rows] == ["matmul", "kernel", "matmul", "call", "call", "kernel"]
    assert all(row.us > 0 for row in profile.rows)
    assert profile.total_us == pytest.approx(profile.overhead_us + sum(row.us for row in profile.rows))
