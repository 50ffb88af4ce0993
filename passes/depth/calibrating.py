"""What sample calls tell of a model: how much each unit changes the stream, and what leaving it out costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from graphwright.ir.errors import InputError, PassError
from graphwright.ir.program import Program, calls

from .units import Unit

aten = torch.ops.aten

_CAST = (aten._to_copy.default, aten.to.dtype, aten.view.default, aten.reshape.default, aten.alias.default)


class Calibration:
    """The sample calls of a model, as flat tensors, and what is measured with them.

    Tokens that an input called `attention_mask` hides count for nothing where the mask is of the measured value's [batch,
    tokens].

    Args:
        program: what the calls are of.
        samples: each (args, kwargs), or named arguments alone.
        who: the name of the pass, for errors.

    Attributes:
        loss: what `increase` is the increase of: "next-token" for the mean cross entropy of the next token in nats, of a
            causal model that returns logits over the table that its token ids are looked up in; "cosine" for the mean of 1 -
            cosine similarity of the results with the whole model's.

    Raises:
        PassError: there are no calls, or one is not what the program takes.
    """

    def __init__(self, program: Program, samples: Sequence[Any], who: str) -> None:
        if not samples:
            raise PassError(
                f"{who}: scores rest on sample calls, and there are none: compile with calibration=[...], a list of (args, "
                f"kwargs) or of dicts of named arguments (on the command line: --calibration FILE)"
            )
        self._program, self._who = program, who
        self.calls = [_flatten(program, sample, f"{who}: calibration call {k}") for k, sample in enumerate(samples)]
        masks = [spec.name.rpartition(".")[2] == "attention_mask" for spec in program.signature.tensors]
        self._mask = masks.index(True) if True in masks else None
        self._logits = self._language_model()
        self.loss = "next-token" if self._logits else "cosine"
        self._wanted: list[list[torch.Tensor]] = []
        if self.loss == "cosine":
            self._wanted = self._results(program)
            self._base = 0.0
        else:
            self._base = self._next_token(program)
        if not math.isfinite(self._base):
            raise PassError(f"{who}: the model's own loss on the calibration is {self._base}: give other sample calls")

    def tokens(self, units: Sequence[Unit]) -> int:
        """Return the number of tokens that scores of units rest on: the least of any."""
        nodes = {node.name: node for node in self._program.graph.nodes}
        before = {nodes[unit.before] for unit in units}
        counts = dict.fromkeys(before, 0)
        for call, values in zip(self.calls, _run(self._program, list(before), self.calls), strict=True):
            for node, value in zip(before, values, strict=True):
                mask = self._mask_for(node, call, value)
                counts[node] += int(mask.sum()) if mask is not None else value.shape[:-1].numel()
        return min(counts.values(), default=0)

    def influence(self, program: Program, units: Sequence[Unit], resolve: Any) -> list[float]:
        """Return for each unit 1 - cosine similarity of the stream before and after it, the mean over tokens.

        Args:
            program: without what is left out already.
            units: of it.
            resolve: gives the name of the node that stands for a name, after what is left out.
        """
        nodes = {node.name: node for node in program.graph.nodes}
        pairs = [(nodes[resolve(unit.before)], nodes[unit.added or unit.where]) for unit in units]
        wanted = list(dict.fromkeys(node for pair in pairs for node in pair))
        mean = [_Mean() for _ in units]
        for call, values in zip(self.calls, _run(program, wanted, self.calls), strict=True):
            known = dict(zip(wanted, values, strict=True))
            for unit, (before, after), total in zip(units, pairs, mean, strict=True):
                old, new = known[before], known[after]
                total.add(_distance(old, old + new if unit.added else new), self._mask_for(before, call, old))
        return [total.value for total in mean]

    def increase(self, program: Program) -> float:
        """Return how much more the loss of a changed program is; infinite where it is not a finite number."""
        if self.loss == "next-token":
            found = self._next_token(program) - self._base
        else:
            total = _Mean()
            for call, old, new in zip(self.calls, self._wanted, self._results(program), strict=True):
                for node, one, other in zip(_float_results(self._program), old, new, strict=True):
                    total.add(_distance(one, other), self._mask_for(node, call, one))
            found = total.value
        return found if math.isfinite(found) else math.inf

    def _results(self, program: Program) -> list[list[torch.Tensor]]:
        wanted = _float_results(program)
        if not wanted:
            raise PassError(f"{self._who}: the model returns no floating point values, so that no loss can be measured")
        return list(_run(program, wanted, self.calls))

    def _next_token(self, program: Program) -> float:
        assert self._logits is not None
        result, ids = self._logits
        node = program.results[result]
        total = _Mean()
        for call, (logits,) in zip(self.calls, _run(program, [node], self.calls), strict=True):
            losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), call[ids][:, 1:], reduction="none")
            mask = self._mask_for(node, call, logits)
            total.add(losses, None if mask is None else mask[:, 1:])
        return total.value

    def _language_model(self) -> tuple[int, int] | None:
        """Return which result are logits of the next token, and which input the ids; None if the model is none of these."""
        program = self._program
        for node in calls(program.graph, aten.embedding.default):
            source: Any = node.args[1]
            while source.op == "call_function" and source.target in _CAST:
                source = source.args[0]
            if source.op != "placeholder" or source.meta["val"].dim() != 2 or source.meta["val"].dtype != torch.int64:
                continue
            table: Any = node.args[0]
            shape = (*program.shape(source), program.shape(table)[0])
            for index, result in enumerate(program.results):
                is_wanted = isinstance(result, fx.Node) and _is_float(result) and program.shape(result) == shape
                if is_wanted and self._is_causal(result, program.inputs.index(source)):
                    return index, program.inputs.index(source)
        return None

    def _is_causal(self, result: fx.Node, ids: int) -> bool:
        """Return whether no logits of the longest call depend on a later token: its last one is changed to see."""
        call = max(self.calls, key=lambda tensors: tensors[ids].shape[1])
        if call[ids].shape[1] < 2:
            return False
        changed = list(call)
        changed[ids] = call[ids].clone()
        changed[ids][:, -1] = torch.where(call[ids][:, -1] == 0, 1, 0)
        (one,), (other,) = _run(self._program, [result], [call, changed])
        return bool(torch.allclose(one[:, :-1], other[:, :-1], rtol=1e-4, atol=1e-4, equal_nan=True))

    def _mask_for(self, node: fx.Node, call: Sequence[torch.Tensor], value: torch.Tensor) -> torch.Tensor | None:
        """Return which tokens of a value count, bool; None for all."""
        if self._mask is None:
            return None
        mask = call[self._mask]
        return mask != 0 if mask.dim() == 2 and value.dim() == 3 and mask.shape == value.shape[:2] else None


class _Mean:
    """A mean over tokens."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        chosen = values if mask is None else values[mask]
        self._sum += float(chosen.double().sum())
        self._count += chosen.numel()

    @property
    def value(self) -> float:
        return self._sum / self._count if self._count else math.nan


def _flatten(program: Program, sample: Any, what: str) -> list[torch.Tensor]:
    args, kwargs = ((), sample) if isinstance(sample, dict) else sample
    try:
        return program.signature.flatten(args, kwargs)
    except InputError as error:
        raise PassError(f"{what} is not what the model takes: {error}") from error


def _run(program: Program, wanted: Sequence[fx.Node], samples: Sequence[Sequence[torch.Tensor]]) -> Any:
    """Yield the values of nodes for each call, in plain PyTorch; what they do not need is not computed."""
    part = program.copy()
    nodes = {node.name: node for node in part.graph.nodes}
    part.output.args = (tuple(nodes[node.name] for node in wanted),)
    part.drop_unused()
    module = part.module()
    for tensors in samples:
        with torch.no_grad():
            yield list(module(*tensors))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _float_results(program: Program) -> list[fx.Node]:
    return [node for node in program.results if isinstance(node, fx.Node) and _is_float(node)]


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine similarity along the last dimension; 0 where both are the same, two zeros among them."""
    if one.dim() == 0:
        one, other = one[None], other[None]
    distance = 1 - F.cosine_similarity(one.float(), other.float(), dim=-1)
    return distance.masked_fill((one == other).all(-1), 0.0)
