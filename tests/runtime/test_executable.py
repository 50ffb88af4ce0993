"""Calling a compiled program."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from dataclasses import replace

import pytest
import torch

from graphwright.ir.containers import Container, Leaf
from graphwright.ir.errors import ArtifactError, GraphwrightError, InputError
from graphwright.ir.signature import Range, TensorSpec
from graphwright.runtime.chained import alone
from graphwright.runtime.executable import Executable
from graphwright.runtime.schedule import Buffer, CallStep, KernelStep, MatmulStep, Symbolic, View


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
            except (AssertionError, GraphwrightError) as problem:
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
    runs = plan.chained

    def fail():
        raise ValueError("out of luck")

    object.__setattr__(plan, "chained", (alone(plan.steps[0], fail), *runs))
    with pytest.raises(GraphwrightError, match=r"(?s)'first'.*out of luck.*line 1 of the model"):
        run(x)
    object.__setattr__(plan, "chained", runs)
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
    assert 0 <= profile.overhead_us < profile.total_us


N = View("x", ("n",), (1,))

SCALE = """import triton
import triton.language as tl


@triton.jit
def scale(x, out, count, factor, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    tl.store(out + k, tl.load(x + k, mask=k < count) * factor, mask=k < count)
"""


def flat(name, offset=0, size="n"):
    return View(name, (size,), (1,), offset)


def test_results_that_are_no_buffers_of_their_own(make_program):
    """Results may be an argument itself, a part of one, a temporary, sizes and constants."""
    step = CallStep("double", "aten::mul.Tensor", (N, 2.0), {}, ("t",))
    outputs = [N, flat("x", 1, "max(n-1, 0)"), flat("t"), flat("t", 0, 2), Symbolic("n*3"), None, "text"]
    schedule, signature = make_program([step], {"t": "temporary"}, outputs, {})
    run = Executable(schedule, {}, signature)
    x = torch.randn(5)
    same, part, twice, first, size, nothing, text = run(x)
    assert same is x
    assert torch.equal(part, x[1:])
    assert part.data_ptr() == x[1:].data_ptr()
    assert torch.equal(twice, 2 * x)
    assert torch.equal(first, 2 * x[:2])
    assert (size, nothing, text) == (15, None, "text")
    run(torch.randn(5))
    assert torch.equal(twice, 2 * x)


def test_an_argument_that_is_returned_keeps_its_own_strides(make_program):
    """As in PyTorch, it is the tensor that was passed."""
    schedule, signature = make_program([], {}, [N], {})
    x = torch.randn(10)[::2]
    (found,) = Executable(schedule, {}, signature)(x)
    assert found is x


def test_calls_see_the_tensors_of_their_own_call(make_program):
    """Operations on arguments and results read and write those of the present call, in lists as well."""
    steps = [
        CallStep("cat", "aten::cat.default", ([flat("x"), flat("x")], 0), {}, ("both",), into=True),
        CallStep("sort", "aten::sort.default", (N,), {}, ("y", "")),
        CallStep("copy", "aten::full.default", ([Symbolic("n")], 3.0), {"dtype": torch.float32}, ("z",)),
    ]
    buffers = {"both": "output", "y": "output", "z": "output"}
    schedule, signature = make_program(steps, buffers, [flat("both", 0, "2*n"), flat("y"), flat("z")], {})
    both = Buffer("both", "float32", ("2*n",), (1,), "output")
    run = Executable(replace(schedule, buffers={**schedule.buffers, "both": both}), {}, signature)
    for _ in range(3):
        x = torch.randn(7)
        found, ordered, threes = run(x)
        assert torch.equal(found, torch.cat([x, x]))
        assert torch.equal(ordered, x.sort().values)
        assert threes.tolist() == [3.0] * 7


def test_products_on_arguments_and_results(example):
    """A product whose operands are new in each call reads and writes those, with an offset; adding keeps what was there."""
    w = torch.randn(8, 8)
    buffers = {
        "x": Buffer("x", "float32", ("batch", 16), (16, 1), "input", "0"),
        "w": Buffer("w", "float32", (8, 8), (8, 1), "weight", "w"),
        "y": Buffer("y", "float32", ("batch", 16), (16, 1), "output"),
    }
    half = ("batch", 8), (16, 1)
    steps = (
        MatmulStep("left", View("x", *half), "w", View("y", *half)),
        MatmulStep("right", View("x", *half, 8), "w", View("y", *half, 8)),
        MatmulStep("more", View("x", *half), "w", View("y", *half, 8), accumulate=True),
    )
    whole = View("y", ("batch", 16), (16, 1))
    schedule = replace(
        example.schedule, dimensions={"batch": (0, None)}, outputs=(whole,), buffers=buffers, steps=steps, kernels={}
    )
    spec = TensorSpec("x", torch.float32, "cpu", ("batch", 16))
    signature = replace(example.signature, tensors=(spec,), dimensions={"batch": Range(0, None)}, results=Leaf(0))
    run = Executable(schedule, {"w": w}, signature)
    for batch in (3, 3, 1, 0, 40):
        x = torch.randn(batch, 16)
        left, right = x[:, :8] @ w.T, x[:, 8:] @ w.T
        assert torch.allclose(run(x), torch.cat([left, left + right], 1), atol=1e-5)


def test_a_weight_that_is_also_read(example):
    """A weight that is multiplied by and read elsewhere is there in both forms; as a result it is a copy."""
    schedule = example.schedule
    table = replace(schedule.buffers["w2"], name="table")
    view = View("table", table.shape, table.strides)
    step = CallStep("sum", "aten::sum.default", (view,), {}, ("total",))
    buffers = {**schedule.buffers, "table": table, "total": Buffer("total", "float32", (), (), "output")}
    signature = replace(example.signature, results=Container("tuple", "", (), tuple(Leaf(k) for k in range(4))))
    changed = replace(
        schedule, buffers=buffers, steps=(*schedule.steps, step), outputs=(*schedule.outputs, view, View("total", (), ()))
    )
    run = Executable(changed, example.weights, signature)
    x = torch.randn(2, 3, 24)
    y, _, weight, total = run(x)
    assert error(y, example.reference(x)[0]) < 2e-6
    assert torch.equal(weight, example.weights["second.weight"])
    assert torch.allclose(total, weight.sum())
    weight.zero_()
    assert torch.equal(run(x)[2], example.weights["second.weight"])
    assert torch.equal(run(x)[0], y)


def test_weights_that_lie_otherwise_are_copied(example):
    """Strides and alignment of the weights passed do not matter, and they are left as they are."""
    weights = {
        "first.weight": example.weights["first.weight"].T.contiguous().T,
        "first.bias": torch.cat([torch.zeros(1), example.weights["first.bias"]])[1:],
        "second.weight": torch.stack([example.weights["second.weight"]] * 2, -1)[..., 0],
    }
    assert all(torch.equal(weights[name], weight) for name, weight in example.weights.items())
    run = Executable(example.schedule, weights, example.signature)
    check(example, run, torch.randn(2, 5, 24))


def test_a_weight_of_equal_elements_may_be_stored_as_one(example):
    """A weight whose buffer has a stride of 0 takes the memory of one element, however it was passed."""
    schedule = example.schedule
    buffers = {**schedule.buffers, "e": Buffer("e", "float32", (500, 7), (0, 1), "weight", "e")}
    changed = replace(schedule, buffers=buffers, outputs=(View("e", (500, 7), (0, 1)),), steps=(), kernels={})
    row = torch.randn(7)
    for weight in (row.expand(500, 7), row.expand(500, 7).contiguous()):
        run = Executable(changed, {**example.weights, "e": weight}, replace(example.signature, results=Leaf(0)))
        assert torch.equal(run(torch.randn(1, 1, 24)), weight)
        assert run.memory.weight_bytes < 500


def test_weights_are_not_kept_when_they_are_prepared(example):
    """The weight of a product is dropped once it is prepared, where its form is another."""
    big = torch.randn(512, 24)
    reference = weakref.ref(big)
    schedule, shape = example.schedule, (512, 24)
    buffers = {name: schedule.buffers[name] for name in ("x",)}
    buffers["w"] = Buffer("w", "float32", shape, (24, 1), "weight", "w")
    buffers["y"] = Buffer("y", "float32", ("batch*tokens", 512), (512, 1), "output")
    step = MatmulStep("m", View("x", ("batch*tokens", 24), (24, 1)), "w", View("y", ("batch*tokens", 512), (512, 1)))
    changed = replace(schedule, buffers=buffers, steps=(step,), outputs=(View("y", ("batch*tokens", 512), (512, 1)),))
    run = Executable(changed, {"w": big}, replace(example.signature, results=Leaf(0)))
    shared = run._weights.prepared("w").layout == "nk"
    x = torch.randn(1, 3, 24)
    assert torch.allclose(run(x), x[0] @ big.T, atol=1e-5)
    del big
    gc.collect()
    assert shared or reference() is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"first.bias": torch.zeros(41)}, r"first.bias: expected float32 of shape \[40\]"),
        ({"first.bias": torch.zeros(40).double()}, "got torch.float64"),
        ({"first.bias": torch.zeros(40, device="meta")}, "on cpu, got torch.float32 .* on meta"),
    ],
)
def test_weights_that_do_not_fit_are_refused(example, weights, message):
    """Shape, dtype and device of a weight are those that the schedule says."""
    with pytest.raises(ArtifactError, match=message):
        Executable(example.schedule, {**example.weights, **weights}, example.signature)


@pytest.mark.parametrize(
    "view",
    [flat("x", 1), flat("x", 0, "n+1"), View("x", ("n",), (2,)), View("x", (2, "n"), (1, 1)), flat("x", "0-1")],
)
def test_views_that_reach_out_of_their_buffer_are_refused(make_program, view):
    """No step gets memory beyond the buffer that it names, for any sizes."""
    kernel = KernelStep("k", "scale", (1,), (view, flat("y"), "n", 2.0), {"BLOCK": 64}, ("x",), ("y",))
    schedule, signature = make_program([kernel], {"y": "output"}, [flat("y")], {"scale": SCALE})
    with pytest.raises(GraphwrightError, match=r"'k'.*reaches out of buffer x"):
        Executable(schedule, {}, signature)(torch.randn(5))


def test_an_operation_that_returns_something_else_is_named(make_program):
    """A result of another shape than planned is an error, also where the operation writes it."""
    for into in (False, True):
        step = CallStep("wide", "aten::cat.default", ([N, N],), {}, ("y",), into=into)
        schedule, signature = make_program([step], {"y": "output"}, [flat("y")], {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(GraphwrightError, match=r"'wide' failed.*planned"):
                Executable(schedule, {}, signature)(torch.randn(5))


def test_a_division_by_a_size_of_zero(make_program):
    """A size that divides by 0 for some sizes is an error that says which."""
    schedule, signature = make_program([], {"y": "output"}, [flat("y", "n % n")], {})
    with pytest.raises(GraphwrightError, match=r"divides by 0 where \{'n': 0\}"):
        Executable(schedule, {}, signature)(torch.randn(0))
