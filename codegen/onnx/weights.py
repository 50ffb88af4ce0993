"""Weights of an ONNX model: each is held once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir


def share_transposed(model: onnx_ir.Model) -> None:
    """Read a weight that is the transpose of another through a Transpose, which runtimes fold when they load the model.

    A table of embeddings that is also the weight of the last projection would be held twice.

    Args:
        model: changed in place.
    """
    import onnx_ir

    graph = model.graph
    tables: Any = dict.fromkeys(node.inputs[0] for node in graph if node.op_type in ("Gather", "Transpose"))
    shared: Any = [value for value in tables if value is not None and value.is_initializer() and len(value.shape or ()) == 2]
    values: list[Any] = list(graph.initializers.values())
    for value in values:
        shape = value.shape
        if shape is None or len(shape) != 2 or value in shared or not value.uses():
            continue
        for table in shared:
            if list(table.shape) == list(shape)[::-1] and _is_transpose(value, table):
                node = onnx_ir.node("Transpose", [table], {"perm": [1, 0]})
                made = node.outputs[0]
                made.dtype, made.shape, made.name = value.dtype, shape, f"{table.name}.transposed"
                value.replace_all_uses_with(made, replace_graph_outputs=True)
                graph.insert_before(graph[0], node)
                del graph.initializers[value.name]
                break


def _is_transpose(value: Any, table: Any) -> bool:
    first, second = value.const_value, table.const_value
    if first is None or second is None or first.dtype != second.dtype:
        return False
    return bool((first.numpy() == second.numpy().T).all())
