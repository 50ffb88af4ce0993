"""Windows, sinks and blocks: what attentions see afterwards, what is left alone, and the laws of lossy passes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import graphwright
from graphwright.ir import dialect
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.program import calls
from graphwright.passes.base import Context, Decision, Plan
from graphwright.passes.kv.cached_decode import CachedDecode
from graphwright.passes.kv.self_check import check_derived
from graphwright.passes.sparsity.window_attention import WindowAttention
from graphwright.pipeline import run_passes

NAME = "window-attention"


def program_of(builder, *predicates: str, heads: int = 4, key_heads: int = 2, tokens: int | str = "tokens"):
    """Return a program of attentions of one sequence to itself."""
    made = builder()
    q = made.input("q", "batch", heads, tokens, 8)
    k, v = (made.input(name, "batch", key_heads, tokens, 8) for name in "kv")
    found = []
    for predicate in predicates or ("q - k >= 0",):
        found.append(made.call(dialect.attention, q, k, v, [], None, scale=0.3, predicate=predicate))
    return made.program(*found)


def drawn(tokens: int, batch: int = 2) -> list[torch.Tensor]:
    """Return queries, keys and values of one sequence."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, heads, tokens, 8, generator=generator) for heads in (4, 2, 2)]


def predicates(program) -> list[str]:
    """Return what the attentions of a program see."""
    return [node.kwargs.get("predicate", "") for node in calls(program.graph) if node.target is dialect.attention]


def masked(given: list[torch.Tensor], seen: torch.Tensor) -> torch.Tensor:
    """Return attention where `seen` [S, T] holds."""
    return dialect.attention(*given, [seen], None, predicate="in0[q, k]", scale=0.3)


FORMS = {
    "window=5": lambda q, k: (k <= q) & (q - k < 5),
    "window=5,sinks=3": lambda q, k: (k <= q) & ((q - k < 5) | (k < 3)),
    "block=8": lambda q, k: (k <= q) & (q // 8 == k // 8),
    "block=8,neighbours=2": lambda q, k: (k <= q) & (q // 8 - k // 8 <= 2),
}
BOTH_WAYS = {
    "window=5": lambda q, k: (q - k).abs() < 5,
    "window=5,sinks=3": lambda q, k: ((q - k).abs() < 5) | (k < 3) | (q < 3),
    "block=8": lambda q, k: q // 8 == k // 8,
    "block=8,neighbours=2": lambda q, k: (q // 8 - k // 8).abs() <= 2,
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", FORMS)
def test_what_a_query_sees(builder, run, executable_of, options, causal) -> None:
    """Near keys and the first ones are seen, by the reference and by a kernel that has nothing left to test for each key."""
    done = run(f"{NAME}:{options}", program_of(builder, "q - k >= 0" if causal else ""))
    executable = executable_of(done.after)
    (source,) = executable.schedule.kernels.values()
    assert "with predicate" not in source.replace("sinks, ", "")
    for tokens in (1, 63, 200):
        given = drawn(tokens)
        at = torch.arange(tokens)
        expected = masked(given, (FORMS if causal else BOTH_WAYS)[options](at[:, None], at[None]))
        assert torch.equal(done.after.module()(*given)[0], expected)
        torch.testing.assert_close(executable(*given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "same"), [("window=40,sinks=23", 63), ("block=21,neighbours=2", 63)])
@pytest.mark.parametrize("predicate", ["q - k >= 0", ""])
def test_identity_up_to_the_break_even(builder, run, options, same, predicate) -> None:
    """Up to the length that the plan states nothing changes, bit for bit; one token more, and something does."""
    done = run(f"{NAME}:{options}", program_of(builder, predicate))
    assert done.plan.decisions[0].detail["break_even_tokens"] == same + 1
    done.check(*drawn(same))
    given = drawn(same + 1)
    assert not torch.equal(done.before.reference(*given)[0], done.after.reference(*given)[0])


@pytest.mark.parametrize("predicate", ["q - k >= 0", ""])
def test_the_error_falls_with_the_window(builder, run, predicate) -> None:
    """The more keys are seen, the smaller the error."""
    program, given = program_of(builder, predicate), drawn(256, batch=1)
    expected = program.reference(*given)[0]
    errors = []
    for window in (8, 32, 96, 192, 255, 256):
        after = run(f"{NAME}:window={window},sinks=2", program).after
        errors.append(float((after.reference(*given)[0] - expected).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2] > errors[-1] == 0.0


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_ratio_counts_the_pairs(options, causal) -> None:
    """The ratio that a plan states is that of the pairs that are seen."""
    values = dict(item.split("=") for item in options.split(","))
    step = WindowAttention(**{name: int(value) for name, value in values.items()})
    for tokens in (1, 7, 100):
        at = torch.arange(tokens)
        seen = (FORMS if causal else BOTH_WAYS)[options](at[:, None], at[None])
        pairs = tokens * (tokens + 1) / 2 if causal else tokens**2
        assert step.pairs_ratio(tokens, causal) == pytest.approx(float(seen.sum()) / pairs)


def test_what_was_hidden_stays_hidden(builder, run) -> None:
    """The new limits join those that are there, such as padding."""
    made = builder()
    q, k, v = (made.input(name, "batch", 2, "tokens", 8) for name in "qkv")
    kept = made.input("kept", "batch", "tokens", dtype=torch.bool)
    program = made.program(made.call(dialect.attention, q, k, v, [kept], None, scale=0.3, predicate="in0[b, k]"))
    after = run(f"{NAME}:window=4", program).after
    given = [torch.randn(2, 2, 30, 8) for _ in range(3)]
    kept = torch.arange(30) < torch.tensor([[17], [30]])
    at = torch.arange(30)
    near = (at[:, None] - at[None]).abs() < 4
    expected = dialect.attention(*given, [kept, near], None, predicate="in0[b, k] & in1[q, k]", scale=0.3)
    assert torch.equal(after.reference(*given, kept)[0], expected)
    assert (expected[0, :, 25] == 0).all()


def test_layers_are_counted_in_the_graphs_order(builder, run) -> None:
    """Only the attentions that are named see less, and the others are refused with the reason."""
    done = run(f"{NAME}:window=3,layers=1", program_of(builder, "q - k >= 0", "q - k >= 0", ""))
    assert predicates(done.after) == ["q - k >= 0", "k - q + 2 >= 0 & q - k >= 0", ""]
    assert [reason for reason in done.reasons if "is not among the layers [1]" in reason] == done.reasons
    with pytest.raises(OptionError, match="layers names 3, and the attentions are numbered from 0 to 2"):
        run(f"{NAME}:window=3,layers=3", program_of(builder, "", "", ""))


def test_refusals_name_the_reason(builder, run) -> None:
    """What cannot see less, or is not asked to, is left alone, with the reason."""
    assert run(NAME, program_of(builder)).reasons == ["nothing is asked for: give a window, or a block"]
    made = builder()
    assert run(f"{NAME}:window=3", made.program(made.input("x", "batch"))).reasons == ["there is no attention"]
    made = builder()
    q, k = made.input("q", "batch", 2, "tokens", 8), made.input("k", "batch", 2, 9, 8)
    cross = made.program(made.call(dialect.attention, q, k, k, [], None, scale=1.0))
    assert run(f"{NAME}:window=3", cross).reasons == ["there are tokens queries and 9 keys: they are not of one sequence"]
    short = program_of(builder, tokens=7)
    assert run(f"{NAME}:window=5,sinks=2", short).reasons == ["its 7 tokens all see each other with this window too"]
    assert not run(f"{NAME}:window=5,sinks=1", short).reasons
    done = run(f"{NAME}:window=3", program_of(builder))
    assert run(f"{NAME}:window=3", done.after).reasons == ["it sees no more than that already"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 4, "sinks": -1}, "sinks must be at least 0, got -1"),
        ({"window": 4, "block": 4}, "each say what is near"),
        ({"window": 4, "neighbours": 1}, "give block"),
        ({"block": 4, "sinks": 1}, "give window"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    """Options that say nothing, or too much, are errors."""
    with pytest.raises(OptionError, match=message):
        WindowAttention(**options)


def test_a_plan_edited_by_hand_is_obeyed(builder, run) -> None:
    """Another window in the plan is the window of the program; what makes no sense is a PlanError."""

    def edited(**detail):
        return lambda plan: Plan(
            plan.pass_name, tuple(dataclasses.replace(d, detail={**d.detail, **detail}) for d in plan.decisions)
        )

    program = program_of(builder)
    done = run(f"{NAME}:window=3", program, edited(window=6))
    assert predicates(done.after) == ["k - q + 5 >= 0 & q - k >= 0"]
    with pytest.raises(PlanError, match="window must be at least 1, got 0"):
        run(f"{NAME}:window=3", program, edited(window=0))
    step = WindowAttention(window=3)
    with pytest.raises(PlanError, match="%nowhere, which is not in the graph"):
        step.apply(program, Plan(NAME, (Decision("nowhere", "", "", {}),)))
    with pytest.raises(PlanError, match="does not say 'window'"):
        step.apply(program, Plan(NAME, (Decision(step.plan(program, Context()).decisions[0].where, "", "", {}),)))
    with pytest.raises(PlanError, match="and no attention"):
        step.apply(run(f"{NAME}:window=3", program).after, edited()(Plan(NAME, (Decision("q", "", "", _detail()),))))


def _detail() -> dict[str, int | None]:
    return {"window": 3, "sinks": 0, "block": None, "neighbours": 0}


@pytest.mark.parametrize("options", ["window=4,sinks=2", "block=4,neighbours=1"])
def test_decoding_follows_by_itself(captured, options) -> None:
    """A prompt in parts, and then token by token, gives what the whole sequence gives: check_derived compares them."""
    program = run_passes(captured("llama"))
    plain = WindowAttention(**_parsed(options))
    narrow = plain.apply(program, plain.plan(program, Context()))
    derived = CachedDecode(check=False).apply(narrow, CachedDecode().plan(narrow, Context()))
    check_derived(narrow, derived)
    after = plain.apply(derived, plain.plan(derived, Context()))
    assert not plain.plan(derived, Context()).decisions
    later = CachedDecode(check=False).apply(program, CachedDecode().plan(program, Context()))
    after = plain.apply(later, plain.plan(later, Context()))
    check_derived(narrow, after)


def _parsed(options: str) -> dict[str, int]:
    return {name: int(value) for name, value in (item.split("=") for item in options.split(","))}


@pytest.mark.slow
def test_generating_and_exporting(built, families, tmp_path) -> None:
    """A model with a window generates what calls of it choose, and its ONNX file computes what it computes."""
    runtime = pytest.importorskip("onnxruntime")
    model, ids = built("llama"), families["llama"].sample(2, 24, 1)["input_ids"]
    passes = [f"{NAME}:window=5,sinks=2"]
    compiled = graphwright.compile(model, input_ids=ids, passes=passes, generate=True)
    expected = ids
    for _ in range(6):
        logits = compiled(input_ids=expected)
        scores = logits["logits"] if hasattr(logits, "keys") else logits[0]
        expected = torch.cat((expected, scores[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(compiled.generate(ids, max_new_tokens=6), expected)
    path = tmp_path / "model.onnx"
    graphwright.export_onnx(model, str(path), input_ids=ids, passes=passes)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got, *_) = session.run(None, {"input_ids": ids.numpy()})
    wanted = compiled(input_ids=ids)
    wanted = wanted["logits"] if hasattr(wanted, "keys") else wanted[0]
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-4, atol=1e-4)
    dense = model(ids).logits
    assert (dense - wanted).abs().max() > 1e-2
