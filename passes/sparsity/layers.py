"""Which attentions of a model are meant by their numbers, and why there may be none."""

from __future__ import annotations

from graphwright.ir import dialect
from graphwright.ir.errors import OptionError
from graphwright.ir.program import Program, calls


def not_chosen(who: str, number: int, count: int, layers: tuple[int, ...] | None) -> str | None:
    """Return why an attention is not meant; None if it is.

    Args:
        who: the name of the pass, for errors.
        number: of the attention, counted from 0 in the graph's order.
        count: number of attentions.
        layers: the numbers that are meant; None for all.

    Raises:
        OptionError: there is no attention of a number.
    """
    wrong = [layer for layer in layers or () if not 0 <= layer < count]
    if wrong:
        raise OptionError(f"{who}: layers names {wrong[0]}, and the attentions are numbered from 0 to {count - 1}")
    return None if layers is None or number in layers else f"attention {number} is not among the layers {sorted(layers)}"


def why_no_attention(program: Program) -> str:
    """Return why a program has no attention that could see less."""
    listed = any(calls(program.graph, dialect.sparse_attention, dialect.kv_sparse_attention))
    return "its attentions see no more than listed keys already" if listed else "there is no attention"
