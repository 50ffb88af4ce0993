"""A pass from nothing to kernel: products that skip what the activations before them hardly use."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from graphwright.codegen.external import view_of
from graphwright.codegen.indexing import contiguous_strides, product, size_text
from graphwright.codegen.provenance import provenance_of
from graphwright.codegen.step_table import STEP_MAKERS
from graphwright.codegen.steps import StepMaker
from graphwright.ir import dialect
from graphwright.ir.analyses.axes_registry import rule
from graphwright.ir.errors import OptionError, PassError, PlanError
from graphwright.ir.ops.definition import computed_in, define, expect
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal
from graphwright.passes.local import Places, erase_unused
from graphwright.runtime.schedule import KernelStep


def reference(x: torch.Tensor, weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return x @ weight, with elements of x that are no larger than the threshold taken for 0.

    Args:
        x: [..., E], floating point.
        weight: [E, F] of x's dtype: what an element of x is multiplied by lies together.
        threshold: magnitudes up to this one count for nothing; below 0, all count. NaN counts.

    Returns:
        [..., F] in x's dtype; summed in float32 at least.
    """
    wide = computed_in(x.dtype)
    kept = torch.where(x.abs() <= threshold, 0, x)
    return (kept.to(wide) @ weight.to(wide)).to(x.dtype)


def fake(x: torch.Tensor, weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return what the reference returns as far as shape and dtype go; refuse what does not fit."""
    expect(x.is_floating_point() and x.dtype == weight.dtype, f"x is {x.dtype}, the weight {weight.dtype}")
    expect(x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[0], "x must be [..., E], the weight [E, F]")
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def flops(program: Program, node: fx.Node) -> Any:
    """Return the operations if nothing is skipped: how much is, is known when it runs."""
    return 2 * product(program.shape(node)) * program.shape(node.args[1])[0]


skipping_linear = define("skipping_linear(Tensor x, Tensor weight, float threshold) -> Tensor", reference, fake, flops)


@rule("graphwright.skipping_linear")
def axes(state: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    """Return the result's dimensions, x's but the last one, which must be neither batch nor tokens."""
    dims = state.dims(given["x"])
    state.demand_free(dims, [-1], "reduce", "the product contracts")
    return (*dims[:-1], state.dim(state.shape(node)[-1]))


KERNEL = '''\
@triton.jit
def {name}(p_x, p_weight, p_out, threshold, features, columns, BLOCK: tl.constexpr):
    """Compute BLOCK columns of a row: the rows of the weight that are multiplied by next to nothing are not read."""
    row = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = o_n < columns
    sums = tl.zeros([BLOCK], tl.float32)
    for k in range(0, features):
        x = tl.load(p_x + row * features + k).to(tl.float32)
        if not tl.abs(x) <= threshold:
            w = tl.load(p_weight + k.to(tl.int64) * columns + o_n, mask=inside, other=0).to(tl.float32)
            sums += x * w
    tl.store(p_out + row * columns + o_n, sums.to(p_out.dtype.element_ty), mask=inside)
'''

LARGEST_BLOCK = 2048
"""The most columns that one program computes: rows of a weight are read whole where they are no longer."""


def steps(program: Program, node: fx.Node, place: Any, sources: Any, device: str) -> list[KernelStep]:
    """Return the launch that computes a call: the kernel, its grid, its arguments, and what it reads and writes."""
    x, weight, threshold = node.args
    (*rows, features), (_, columns) = program.shape(x), program.shape(weight)
    views = tuple(view_of(place(t), program.shape(t)) for t in (x, weight, node))
    values = (*views, float(threshold), size_text(features), size_text(columns))
    block = min(1 << (int(columns) - 1).bit_length(), LARGEST_BLOCK)
    grid = (-(-int(columns) // block), size_text(product(rows)))
    kernel = sources.add("skipping_linear", KERNEL, provenance_of([node]))
    reads, writes = (place(x).buffer, place(weight).buffer), (place(node).buffer,)
    return [KernelStep(node.name, kernel, grid, values, {"BLOCK": block}, reads, writes, provenance_of([node]))]


def lies_in_order(node: fx.Node, argument: fx.Node, stored: Any, shape: tuple[Any, ...]) -> bool:
    """Return whether an argument can be read where it lies: without gaps, its last dimension innermost."""
    found = zip(shape, stored.strides, contiguous_strides(shape), strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in found)


def is_for_one_token(node: fx.Node) -> bool:
    """Return whether a call is for one token: several skip different rows, and PyTorch's product then is the faster one."""
    tokens = node.args[0].meta["val"].shape[-2]
    return isinstance(tokens, int) and tokens == 1


STEP_MAKERS[skipping_linear] = StepMaker(make=steps, accepts=lies_in_order, applies=is_for_one_token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipInactive(Pass):
    """Multiply no activation of a gated feed-forward that is next to nothing: a token then reads a part of the weight.

    Before: `%h = graphwright.glu(%gate, %up, "silu"); %y = linear(%h, weights["down"])`

    After: `%y = graphwright.skipping_linear(%h, weights["down_by_rows"], 0.013)`

    Applies when: a product without bias is all that reads what a gated feed-forward computes.

    Declines when: something else reads it too, the product has a bias, or the weight is another operation's result.

    Fidelity: lossy; `ratio=0` is the identity.

    Source: Liu et al., Training-Free Activation Sparsity in Large Language Models, 2024, arXiv 2408.14690 (TEAL). Differs from
        the paper in: one ratio for all layers, and only the products behind gated feed-forwards.

    Cost: a single token reads `1 - ratio` of the weights of these products. More tokens read all.

    Args:
        ratio: share of the activations that are skipped on the calibration, in [0, 1).
    """

    name = "skip-inactive"
    fidelity = Fidelity.LOSSY
    source = "TEAL, arXiv 2408.14690"

    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise OptionError(f"{self.name}: ratio must be in [0, 1), got {self.ratio}")

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the products, and the threshold of each."""
        reasons = {node: why_not(node) for node in calls(program.graph, dialect.glu)}
        refusals = tuple(Refusal(node.name, reason) for node, reason in reasons.items() if reason)
        found = [node for node, reason in reasons.items() if not reason]
        if not reasons:
            refusals = (Refusal("", "there is no gated feed-forward"),)
        if not found or self.ratio == 0:
            return Plan(self.name, (), refusals)
        if not context.calibration:
            raise PassError(f"{self.name}: thresholds rest on sample calls, and there are none: give calibration=[...]")
        sampled = Activations(program, found).over(context.calibration)
        decisions = []
        for node in found:
            threshold = float(torch.quantile(sampled[node.name], self.ratio))
            (reader,) = node.users
            what = f"skip activations up to {threshold:.3g}"
            why = f"{self.ratio:.0%} of {sampled[node.name].numel()} are no larger"
            decisions.append(Decision(reader.name, what, why, {"threshold": threshold}))
        return Plan(self.name, tuple(decisions), refusals)

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with the plan's products skipping.

        Raises:
            PlanError: the plan does not fit the program.
        """
        result = program.copy()
        places = Places(result.graph, self.name)
        for decision in plan.decisions:
            node = places.once(decision.where)
            if "threshold" not in decision.detail:
                raise PlanError(f"{self.name}: the decision about %{node.name} does not say which `threshold`")
            if node.target is not torch.ops.aten.linear.default or (reason := why_not(node.args[0])):
                raise PlanError(f"{self.name}: %{node.name} cannot skip activations: {reason or 'it is no such product'}")
            activations, weight = node.args
            with result.graph.inserting_before(node):
                by_rows = result.weights[weight.target].t().contiguous()
                turned = result.weight(f"{weight.target}_by_rows", by_rows)
                new = result.call(skipping_linear, activations, turned, decision.detail["threshold"], like=node)
            node.replace_all_uses_with(new)
            places.move(decision.where, new)
            erase_unused(result, [node])
        return result


def why_not(node: fx.Node) -> str:
    """Return why what reads an activation cannot skip parts of it; "" if it can."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].target is not torch.ops.aten.linear.default:
        return f"it is read by {', '.join(str(reader.target) for reader in readers)}, and not by one product alone"
    if len(readers[0].args) > 2 and readers[0].args[2] is not None:
        return "the product has a bias"
    return "" if readers[0].args[1].op == "get_attr" else "the product's weight is computed"


class Activations(fx.Interpreter):
    """Runs a program on sample calls, and keeps the magnitudes of some values."""

    def __init__(self, program: Program, wanted: list[fx.Node]) -> None:
        super().__init__(program.module())
        self.signature, self.wanted = program.signature, {node.name for node in wanted}
        self.kept: dict[str, list[torch.Tensor]] = {name: [] for name in self.wanted}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        value = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name].append(value.abs().flatten().float())
        return value

    @torch.no_grad()
    def over(self, samples: Any) -> dict[str, torch.Tensor]:
        """Return the magnitudes by the name of the value, a seventh of them, and no more than a hundred thousand."""
        for sample in samples:
            args, kwargs = ((), sample) if isinstance(sample, dict) else sample
            self.run(*self.signature.flatten(args, kwargs))
        return {name: torch.cat(parts)[::7][:100_000] for name, parts in self.kept.items()}
