"""Index expressions, written as tensor operations, say what evaluating them says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.codegen.onnx.masks import ExpressionWriter
from graphwright.ir.analyses import index as ix
from graphwright.ir.errors import ExportError
from graphwright.ir.ops.attention import SIZES

SHAPE = (2, 3, 5, 7)


def loads() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "in0": torch.randint(0, 2, (2, 7), generator=generator),
        "in1": torch.randn(3, 16, 16, generator=generator),
        "in2": torch.randn(1, 40, generator=generator),
        "in3": torch.randint(0, 2, (2, 7), generator=generator).bool(),
    }


TYPES: dict[str, Any] = {"in0": "int", "in1": "float", "in2": "float", "in3": "bool"}

EXPRESSIONS = [
    "q - k >= 0",
    "k - q + 2 >= 0 & q - k >= 0",
    "q + key_length - query_length - k >= 0",
    "not (in0[b, k] == 0)",
    "in3[b, k] & k - q >= 0",
    "q//2 == k//2",
    "3*q - 2*k + 1 >= 0",
    "q*k - 4 >= 0",
    "in1[h, q, k]",
    "in1[h, k, q]",
    "in1[1, q, k + 3]",
    "in1[h, q, q]",
    "in2[0, q - k + 20]",
    "where(q - k >= 0, in2[0, k], 0.5)",
    "float(q - k)*0.25",
    "min(in2[0, q], in2[0, k]) + exp(in2[0, h])",
    "abs(q - k) <= 2 | k < 1",
    "sum(j <= k, int(in3[b, j])) - 2 >= 0",
    "k < trunc(in2[0, b]*4.0)",
    "batch_size + heads - 5 == 0",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_keeps_its_meaning(text: str) -> None:
    """What is written has the values of the expression for every batch, head, query and key."""
    sizes = dict(zip(SIZES, SHAPE, strict=True))
    e = ix.parse(text, TYPES)
    found = ExpressionWriter(sizes, SHAPE, loads(), torch.device("cpu")).write(e)
    variables = {
        name: torch.arange(size).reshape([-1 if i == at else 1 for i in range(4)])
        for at, (name, size) in enumerate(zip("bhqk", SHAPE, strict=True))
    }
    expected = ix.evaluate(e, variables, loads(), sizes)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.expand(SHAPE), expected.expand(SHAPE), rtol=0, atol=0)


@pytest.mark.parametrize("text", ["sum(j <= q - k, int(in3[b, j])) >= 1", "mystery - k >= 0"])
def test_what_has_no_form_is_refused(text: str) -> None:
    """A sum up to something else than an index, and an unknown name, are refused by name."""
    writer = ExpressionWriter(dict(zip(SIZES, SHAPE, strict=True)), SHAPE, loads(), torch.device("cpu"))
    with pytest.raises(ExportError, match=r"sums up to|mystery"):
        writer.write(ix.parse(text, TYPES))
