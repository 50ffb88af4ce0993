"""Operations that rearrange elements or make them from their index, against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

DYNAMIC = {"args.0": {0: "a", 1: "b"}}


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor]]:
    """Return the arguments of one call for each shape."""
    torch.manual_seed(len(shapes))
    return [((torch.randn(shape) * 5).to(dtype),) for shape in shapes]


def rearranged(x: torch.Tensor) -> dict[str, Any]:
    """Return a value for every kind of view, each computed with."""
    return {
        "permute": x.permute(2, 0, 1) + 1,
        "transpose": x.transpose(0, 1) * 2,
        "mT": x.mT + 1,
        "flatten": x.flatten() + 1,
        "flatten_part": x.flatten(1) + 1,
        "split": x.unflatten(2, (2, 6)).transpose(1, 2) + 1,
        "merged": x.transpose(1, 2).flatten(0, 1) + 1,
        "unsqueeze": x.unsqueeze(1).unsqueeze(-1) + 1,
        "squeeze": x.unsqueeze(0).squeeze(0) + 1,
        "expand": x.unsqueeze(1).expand(-1, 3, -1, -1) + 1,
        "repeat": x.repeat(1, 2, 1) + 1,
        "interleave": x.repeat_interleave(2, dim=2) + 1,
        "slice": x[1:, :-1, 2:9] + 1,
        "steps": x[::2, 1::2, 1::3] + 1,
        "last": x[-1] + 1,
        "select": x[:, 0, 3] + 1,
        "flip": x.flip(0, 2) + 1,
        "roll": x.roll((1, -2), (1, 2)) + 1,
        "chunks": [c + 1 for c in x.chunk(3, -1)],
        "split_sizes": [c + 1 for c in x.split([5, 7], -1)],
        "unbind": [c + 1 for c in x.unbind(-1)[:3]],
        "cat": torch.cat([x, x + 1], 0) * 2,
        "cat_last": torch.cat([x[..., :5], -x, x[..., 7:]], -1) * 2,
        "cat_dynamic": torch.cat([x[:, :1], x, x.flip(1)], 1) * 2,
        "stack": torch.stack([x, -x, x * 2], -1) + 1,
        "stack_first": torch.stack([x, -x], 0) + 1,
        "pad": F.pad(x, (1, 2)) + 1,
        "pad_all": F.pad(x, (0, 1, 2, 0, 1, 1), value=0.5) + 1,
        "pad_negative": F.pad(x, (-2, 3)) + 1,
        "tril": x.tril() + 1,
        "triu": x.triu(1) + 1,
        "diagonal": torch.where(torch.eye(12, dtype=torch.bool), 1.0, x[:1, :1]),
        "narrow": x.narrow(2, 3, 4) + 1,
        "movedim": x.movedim(0, -1) + 1,
        "window": x.unfold(2, 4, 2).sum(-1),
    }


def test_views_of_fixed_sizes(check: Any) -> None:
    """Every kind of view reads the elements that it names."""
    check(rearranged, *draw((4, 5, 12)))


def test_views_of_any_size(check: Any) -> None:
    """Views of dimensions that vary are right at other sizes, larger and smaller."""
    check(rearranged, *draw((4, 5, 12), (7, 9, 12), (2, 2, 12)), dynamic=DYNAMIC)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool], ids=str)
def test_views_of_other_dtypes(check: Any, dtype: torch.dtype) -> None:
    """Elements of any dtype are moved as they are."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        return {
            "permute": x.permute(2, 0, 1).contiguous(),
            "cat": torch.cat([x, x.flip(0)], 1),
            "stack": torch.stack([x, x.roll(1, 0)]),
            "pad": F.pad(x, (1, 2)),
            "where": torch.where(x == x[0], x, x[:1]),
            "tril": x.tril(),
        }

    check(function, *draw((3, 4, 5), dtype=dtype))


def test_mixed_dtypes_meet_in_cat(check: Any) -> None:
    """Parts of other dtypes, and empty ones, are joined in the common dtype."""
    x = torch.randn(3, 4)
    y = torch.arange(12).view(3, 4)

    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        return torch.cat([x, y], 1), torch.cat([y, x[:, :0], x.double()], 1), torch.stack([x, y.float()])

    check(function, (x, y))


def generated(x: torch.Tensor) -> dict[str, Any]:
    """Return values that follow from their index and from sizes."""
    n = x.shape[1]
    at = torch.arange(n)
    return {
        "arange": at,
        "arange_float": torch.arange(0, 1, 0.1),
        "arange_step": torch.arange(10, -5, -3),
        "arange_int32": torch.arange(n, dtype=torch.int32) * 2,
        "arange_half": torch.arange(7, dtype=torch.bfloat16) / 2,
        "causal": at[None, :] <= at[:, None],
        "window": (at[None, :] - at[:, None]).abs() < 3,
        "ones": torch.ones(n, 2) * x[0, :, :2],
        "full": torch.full((2, n), 3.5) + 1,
        "full_int": torch.full((n,), 7),
        "full_like": torch.full_like(x, 2),
        "zeros_like": torch.zeros_like(x) - 0.0,
        "new_ones": x.new_ones(3) * 2,
        "scalar": torch.tensor(2.5) * x[0, 0],
        "positions": x + at[None, :, None] * 0.5,
        "size": x * n + x.shape[0],
        "mean_by_size": x.sum(1) / n,
        "buckets": torch.where(at < 3, at, torch.log(at.float().clamp_min(1)).long() + 3),
        "linspace": torch.linspace(-1, 1, 5) + 1,
        "tri": torch.ones(n, n).tril(-1),
        "minus_infinity": torch.full((n, n), float("-inf")).triu(1),
        "frequencies": 1.0 / (10000.0 ** (torch.arange(0, 12, 2).float() / 12)),
    }


def test_generated_values(check: Any) -> None:
    """Ranges, constants, and masks made of them are eager's."""
    check(generated, *draw((3, 5, 12)))
    check(generated, *draw((3, 5, 12), (2, 9, 12), (1, 2, 12)), dynamic=DYNAMIC)


def test_views_into_views(check: Any) -> None:
    """Chains of views between computations are one index."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        heads = x.unflatten(-1, (3, 4)).transpose(1, 2)
        turned = torch.cat([-heads[..., 2:], heads[..., :2]], -1)
        merged = turned.transpose(1, 2).flatten(2)
        shifted = F.pad(merged, (0, 0, 1, 0))[:, :-1]
        windows = shifted.unflatten(0, (1, -1)).permute(0, 2, 1, 3).flatten(0, 1)
        return {
            "merged": merged + x,
            "shifted": shifted * x,
            "windows": windows.flip(-1) + 1,
            "back": windows.transpose(0, 1) - x,
        }

    check(function, *draw((4, 6, 12)))
    check(function, *draw((4, 6, 12), (2, 3, 12)), dynamic=DYNAMIC)


def test_windows_and_patches(check: Any) -> None:
    """Pictures are cut into windows and patches, and put together again."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        b, c = x.shape[0], x.shape[1]
        patches = x.view(b, c, 4, 2, 6, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, 24, 4 * c)
        normal = F.layer_norm(patches, (4 * c,))
        back = normal.view(b, 4, 6, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, 8, 12)
        rolled = back.roll((-1, 2), (2, 3))
        return {"patches": patches * 2, "back": back + x, "rolled": rolled * 2, "pooled": F.avg_pool2d(x, 2) + 1}

    check(function, *draw((2, 3, 8, 12)))
    check(function, *draw((2, 3, 8, 12), (5, 3, 8, 12)), dynamic={"args.0": {0: "n"}})


def test_indices_past_the_end_raise(check: Any) -> None:
    """Looking up what is not there raises, as in eager, and reads no memory."""
    table = torch.randn(10, 4)
    ids = torch.tensor([[1, 2], [3, 9]])

    def function(ids: torch.Tensor, table: torch.Tensor) -> Any:
        return F.embedding(ids, table) + 1, table[ids] * 2, table.index_select(0, ids[0]), table.t().gather(1, ids)

    compiled = check(function, (ids,), weights=[table], dynamic={"args.0": {1: "n"}})
    for wrong in (10, -11, 2**40):
        with pytest.raises(Exception, match=r"(?i)out of (range|bounds)"):
            compiled(torch.tensor([[1, wrong], [0, 0]]))


def test_each_lookup_checks_its_indices(check: Any) -> None:
    """Each way of looking up raises for indices that are too large and for negative ones, where eager does."""
    table = torch.randn(10, 4)
    functions: dict[str, Any] = {
        "embedding": lambda ids, table: F.embedding(ids, table) * 2,
        "index": lambda ids, table: table[ids] * 2,
        "index_column": lambda ids, table: table[:, ids] * 2,
        "index_select": lambda ids, table: table.index_select(0, ids) * 2,
        "gather": lambda ids, table: table.gather(0, ids[:, None].expand(-1, 4)) * 2,
        "scatter": lambda ids, table: torch.zeros(10).scatter(0, ids, 1.0) + table[:, 0],
    }
    for name, function in functions.items():
        ids = torch.tensor([3, 0, 2, 3] if name == "index_column" else [3, 0, 9, 3])
        compiled = check(function, (ids,), weights=[table])
        for wrong in (10, -11):
            ids[1] = wrong
            with pytest.raises((IndexError, RuntimeError)):
                function(ids, table)
            with pytest.raises(Exception, match=r"(?i)(out of|outside|range|bounds|invalid)"):
                compiled(ids)


def test_negative_indices(check: Any) -> None:
    """Indices that count from the end are followed where eager follows them."""
    check(lambda ids, table: table[ids] + 1, (torch.tensor([-1, 0, -10]),), weights=[torch.randn(10, 4)])


def test_padding_of_what_is_one_number_per_row(check: Any) -> None:
    """Short rows made of one element each are padded by rows and by columns."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        wide = x.expand(-1, -1, 2)
        return {
            "rows": F.pad(wide[0], (0, 0, 0, 2)),
            "columns": F.pad(x[:, 0], (2, 1)),
            "both": torch.cat([x[:, 0], wide[:, 0]], 1),
        }

    check(function, *draw((5, 1, 1)))
    check(function, *draw((5, 1, 1), (2, 1, 1)), dynamic={"args.0": {0: "n"}})


def test_masks_of_dimensions_that_share_a_row(check: Any) -> None:
    """A condition on one of the dimensions that a row is made of changes back and forth along it."""

    def function(x: torch.Tensor) -> dict[str, Any]:
        parts = x[:, :, 1:].unflatten(2, (-1, 4))
        return {
            "triu": parts.triu(2).mean((-2, -1)),
            "tril": parts.tril(-1).sum((-2, -1)),
            "cut": (parts[..., :2] * 2).flatten(2).amax(-1),
        }

    check(function, *draw((5, 6, 33)))
