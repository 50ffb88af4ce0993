"""Operations of PyTorch by name."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.errors import ArtifactError
from graphwright.runtime.calls import copy_result, filled, find_operation
from graphwright.runtime.schedule import Symbolic, View


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::mm.default", torch.ops.aten.mm.default),
        ("aten::add.Tensor", torch.ops.aten.add.Tensor),
        ("aten::convolution", torch.ops.aten.convolution.default),
        ("prims::convert_element_type.default", torch.ops.prims.convert_element_type.default),
    ],
)
def test_operations_are_found(name, expected):
    """A name stands for one overload, the default one where it names none."""
    assert find_operation(name) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::mm.default", torch.ops.aten.mm.out),
        ("aten::add.Tensor", torch.ops.aten.add.out),
        ("aten::sum.dim_IntList", torch.ops.aten.sum.IntList_out),
        ("aten::cat.default", torch.ops.aten.cat.out),
    ],
)
def test_operations_that_write_are_found(name, expected):
    """The overload that writes into `out` takes the same arguments."""
    assert find_operation(name, into=True) is expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aten::from_file.default", "may not be called"),
        ("aten::add_.Tensor", "changes its argument 'self'"),
        ("aten::copy_.default", "changes its argument 'self'"),
        ("aten::nothing.default", "no such operation"),
        ("aten::add.Nothing", "no such operation"),
        ("aten::size.int", "returns no tensor"),
        ("aten::item.default", "returns no tensor"),
        ("aten::__class__", "may not be called"),
        ("aten::", "may not be called"),
        ("os::system", "only operations of aten"),
        ("system", "only operations of aten"),
        ("c10d::broadcast_", "only operations of aten"),
        ("graphwright::nothing.default", "import the library that defines graphwright::"),
    ],
)
def test_other_names_are_refused(name, message):
    """What does not compute tensors from tensors cannot be called."""
    with pytest.raises(ArtifactError, match=message):
        find_operation(name)


def test_an_operation_that_cannot_write_is_refused():
    """`into` needs an overload with `out`."""
    with pytest.raises(ArtifactError, match="no overload of the same arguments"):
        find_operation("aten::native_layer_norm.default", into=True)


def test_arguments_are_filled_in():
    """Views and sizes inside lists and mappings become tensors and numbers; the rest stays."""
    view, tensor = View("x", (1,), (1,)), torch.ones(1)
    value = (view, [1, Symbolic("n")], None, "text", {"a": (view, torch.float32)})
    found = filled(value, lambda found: tensor if found is view else None, lambda size: {"n": 7}[size])
    assert found == [tensor, [1, 7], None, "text", {"a": [tensor, torch.float32]}]


def test_results_are_copied_into_their_buffers():
    """Each result goes into its buffer, whatever its strides, and unused ones nowhere."""
    out = torch.zeros(3, 2).t()
    copy_result((torch.arange(6.0).reshape(2, 3), torch.ones(1)), [out, None])
    assert out.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(1), r"float32 of shape \[1\]; planned was torch.float32 of shape \[2\]"),
        (torch.ones(2).double(), "float64"),
        ((torch.ones(2), torch.ones(2)), "returned 2 tensors, and 1 were planned"),
    ],
)
def test_results_that_were_not_planned_are_refused(result, message):
    """A result of another shape or dtype is an error, and is not broadcast or converted."""
    with pytest.raises(ArtifactError, match=message):
        copy_result(result, [torch.zeros(2)])
