"""Caches of ONNX models in few bits: scales from sample calls, and what the codes cost there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.codegen.onnx.emitting import shapes_for
from graphwright.codegen.onnx.past_inputs import MASK, PAST
from graphwright.codegen.onnx.static_codes import StaticCodes, with_static_codes
from graphwright.ir import dialect
from graphwright.ir.errors import ExportError, OptionError
from graphwright.ir.ops.kv_static import STATIC_BITS
from graphwright.ir.program import Program, calls


@dataclass(frozen=True)
class CacheError:
    """What codes do to the scores of the next token, on sample calls.

    Args:
        tokens: that were compared.
        divergence: of the exact distribution from that with codes, in nats, mean over tokens.
        agreement: share of the tokens after which both find the same one most likely.
        relative: the largest difference of a score, over the largest score.
    """

    tokens: int
    divergence: float
    agreement: float
    relative: float

    def __str__(self) -> str:
        return (
            f"on {self.tokens} tokens of the calibration predictions change by {self.divergence:.3g} nats per token, "
            f"{self.agreement:.1%} of the most likely tokens stay, scores differ by {self.relative:.2g} of the largest at most"
        )


def quantised(program: Program, bits: Mapping[int, int], samples: Sequence[Any]) -> Program:
    """Return a program with past keys and values whose caches are codes; what that costs is in its notes.

    Every channel of every head has one scale: the largest value that sample calls have there is the greatest code. Values
    beyond it later are cut off.

    Args:
        program: what `with_past_inputs` makes.
        bits: number of a layer -> 8 or 4.
        samples: sample calls of the model, as in `Context.calibration`.

    Raises:
        OptionError: there are no sample calls.
        ExportError: a number of bits, or a layer, has no form in ONNX, or the calls give values that are not finite.
    """
    for layer, width in bits.items():
        if width not in STATIC_BITS:
            known = " and ".join(map(str, STATIC_BITS))
            raise ExportError(f"layer {layer}: caches in {width} bits have no form in ONNX: {known} bits have one, and 16")
    given = list(_calls(program, samples))
    if not given:
        raise OptionError(
            "caches in few bits have scales in ONNX that are found on sample calls, and there are none: pass "
            "calibration=[...], a list of dicts of named arguments (--calibration)"
        )
    made = with_static_codes(program, _scales(program, bits, given))
    error = compare_caches(program, made, given)
    widths = ", ".join(str(bits.get(layer, 16)) for layer in range(len(list(calls(program.graph, dialect.attention)))))
    made.notes.append(f"keys and values are kept in {widths} bits, a scale for each channel: {error}")
    made.notes.append("onnxruntime takes a prompt in parts for one sequence at a time where keys and values are in few bits")
    return made


def compare_caches(exact: Program, changed: Program, given: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> CacheError:
    """Return how far the scores of two programs with past keys and values are apart.

    Args:
        exact: the one that is right.
        changed: the other.
        given: tokens and mask of each call.
    """
    modules = exact.module(), changed.module()
    tokens, divergence, same, gap, scale = 0, 0.0, 0, 0.0, 0.0
    for ids, mask in given:
        with torch.no_grad():
            found = [m(ids, mask, *_empty(p, ids))[0] for m, p in zip(modules, (exact, changed), strict=True)]
        right, other = (scores[mask.bool()].double() for scores in found)
        logs = torch.log_softmax(right, -1), torch.log_softmax(other, -1)
        divergence += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        same += int((right.argmax(-1) == other.argmax(-1)).sum())
        gap, scale = max(gap, float((right - other).abs().max())), max(scale, float(right.abs().max()))
        tokens += len(right)
    return CacheError(tokens, divergence / tokens, same / tokens, gap / (scale or 1.0))


def _scales(
    program: Program, bits: Mapping[int, int], given: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> dict[int, StaticCodes]:
    """Return how each layer keeps keys and values, with scales that reach what the calls give."""
    watched = program.copy()
    attentions: list[Any] = list(calls(watched.graph, dialect.attention))
    # Each reads cat([past, new]), of which the past is empty here.
    watched.output.args = (tuple(node.args[at] for node in attentions for at in (1, 2)),)
    module, largest = watched.module(), [torch.zeros(())] * (2 * len(attentions))
    for ids, mask in given:
        with torch.no_grad():
            found = module(ids, mask, *_empty(program, ids))
        for at, value in enumerate(found):
            there = value.permute(0, 2, 1, 3)[mask.bool()]
            largest[at] = torch.maximum(largest[at], there.abs().amax(0).flatten())
    layers = {}
    for layer, width in bits.items():
        pair = []
        for what, most in zip(("keys", "values"), largest[2 * layer : 2 * layer + 2], strict=True):
            if not bool(most.isfinite().all()):
                raise ExportError(f"layer {layer}: {what} of the calibration are not finite, so that they have no scale")
            pair.append(torch.where(most > 0, most / (2 ** (width - 1) - 1), 1.0).to(torch.float32))
        layers[layer] = StaticCodes(width, *pair)
    return layers


def _calls(program: Program, samples: Sequence[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    name = program.signature.tensors[0].name
    for number, sample in enumerate(samples):
        args, kwargs = ((), sample) if isinstance(sample, Mapping) else sample
        ids = kwargs.get(name, args[0] if args else None)
        if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
            raise OptionError(f"calibration call {number} has no {name} of [batch, tokens]")
        mask = kwargs.get(MASK)
        yield ids, torch.ones(ids.shape[:2], dtype=torch.int64, device=ids.device) if mask is None else mask.to(torch.int64)


def _empty(program: Program, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return past keys and values of no tokens."""
    sizes = {**dict.fromkeys(program.dimensions, 1), "batch": len(ids), "tokens": ids.shape[1], PAST: 0}
    specs = program.signature.tensors
    return [
        torch.zeros(shape, dtype=spec.dtype, device=spec.device)
        for spec, shape in zip(specs[2:], shapes_for(program, sizes)[2:], strict=True)
    ]
