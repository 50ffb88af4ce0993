"""Caches of ONNX models in few bits: keys and values in codes with scales that were found beforehand."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.diagnostics import at_node
from graphwright.ir.errors import ExportError
from graphwright.ir.program import Program, calls, replace

aten = torch.ops.aten


@dataclass(frozen=True)
class StaticCodes:
    """How a layer keeps keys and values.

    Args:
        bits: of a code, 8 or 4.
        k_scale: [key heads * features], float32, above 0.
        v_scale: likewise.
    """

    bits: int
    k_scale: torch.Tensor
    v_scale: torch.Tensor


def with_static_codes(program: Program, layers: Mapping[int, StaticCodes]) -> Program:
    """Return a program with past keys and values whose layers keep them in codes.

    Args:
        program: what `with_past_inputs` makes; it is not changed.
        layers: number of an attention, in order -> how it keeps keys and values.

    Raises:
        ExportError: a layer has no form over codes in ONNX.
    """
    result = program.copy()
    attentions = list(calls(result.graph, dialect.attention))
    for layer, form in layers.items():
        _rewrite(result, attentions[layer], layer, form)
    result.drop_unused()
    dtypes = {node: node.meta["val"] for node in result.inputs}
    specs = tuple(
        dataclasses.replace(spec, dtype=dtypes[node].dtype, shape=(*spec.shape[:3], int(dtypes[node].shape[3])))
        if spec.name.startswith("past_key_values.")
        else spec
        for node, spec in zip(result.inputs, result.signature.tensors, strict=True)
    )
    result.signature = dataclasses.replace(result.signature, tensors=specs)
    return result


def _rewrite(program: Program, node: fx.Node, layer: int, form: StaticCodes) -> None:
    given = arguments(node)
    longer: list[fx.Node] = [given[name] for name in "kv"]
    reason = _why_not(node, given, longer)
    if reason:
        message = f"layer {layer} cannot keep keys and values in {form.bits} bits in ONNX: {reason}. Leave it in 16 bits."
        raise at_node(ExportError(message), program, node)
    pairs: list[Any] = [cache.args[0] for cache in longer]
    for past, new in pairs:
        batch, heads, size, _ = past.meta["val"].shape
        width = int(new.meta["val"].shape[3]) * form.bits // 8
        with program.fake_mode:
            past.meta["val"] = torch.empty(
                (batch, heads, size, width), dtype=torch.int8 if form.bits == 8 else torch.uint8, device=new.meta["val"].device
            )
    with program.graph.inserting_before(node):
        scales = [program.weight(f"layers.{layer}.{name}_scale", getattr(form, f"{name}_scale")) for name in "kv"]
        keywords = {name: given[name] for name in ("predicate", "bias", "softcap") if given[name]}
        made = program.call(
            dialect.kv_static_attention,
            given["q"],
            *(new for _, new in pairs),
            *(past for past, _ in pairs),
            *scales,
            given["operands"],
            like=node,
            bits=form.bits,
            scale=given["scale"],
            **keywords,
        )
        parts = [program.call(operator.getitem, made, at, like=node) for at in range(3)]
    for old, new in zip((node, *longer), parts, strict=True):
        replace(old, new)


def _why_not(node: fx.Node, given: Mapping[str, Any], longer: list[fx.Node]) -> str:
    """Return why an attention cannot read codes; "" if it can."""
    for cache in longer:
        parts: Any = cache.args[0] if cache.target is aten.cat.default else ()
        if len(parts) != 2 or parts[0].op != "placeholder":
            return "its keys and values are not those of the past with new ones behind"
        if any(user is not node and user.op != "output" for user in cache.users):
            return "several attentions read its keys"
    if given["sink"] is not None:
        return "it has a sink"
    k, v = (given[name].meta["val"] for name in "kv")
    if k.dtype != torch.float32:
        return f"keys are {k.dtype}, and must be float32"
    if k.shape[3] != v.shape[3] or int(k.shape[3]) % 8:
        return f"keys have {k.shape[3]} features and values {v.shape[3]}: both must have as many, a multiple of 8"
    return ""
