"""Kernel sources that come from a file: checking that they are Triton kernels and nothing else, and making them functions.

Triton runs parts of a kernel in Python while it compiles, so that a text is let through only where it is known to hold
nothing but arithmetic, Triton's own operations, and calls of the text's other functions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import linecache
from collections.abc import Iterable
from typing import Any

from graphwright.ir.errors import ArtifactError

_IMPORTS = {
    "import triton": "triton",
    "import triton.language as tl": "tl",
    "from triton.language.extra import libdevice": "libdevice",
}
"""What a source may import -> the name that it binds."""

_JIT_OPTIONS = frozenset({"do_not_specialize", "do_not_specialize_on_alignment", "noinline"})
_BUILTINS = frozenset({"range", "min", "max", "abs", "float", "int", "bool", "len"})
_TRITON = frozenset({"cdiv", "next_power_of_2"})
_LANGUAGE = frozenset({"constexpr", "range", "static_range", "PropagateNan.ALL", "PropagateNan.NONE"})
# Those that bring in code which Triton does not check.
_REFUSED = frozenset({"inline_asm_elementwise", "extern_elementwise"})
_ATTRIBUTES = frozenset({"T", "shape", "dtype", "element_ty", "value", "numel", "primitive_bitwidth", "int_bitwidth"})

_PLAIN = (
    ast.Return, ast.Pass, ast.Expr, ast.Assign, ast.AugAssign, ast.For, ast.While, ast.If, ast.Tuple, ast.List, ast.IfExp,
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Slice, ast.keyword,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip


def kernel_functions(source: str) -> dict[str, Any]:
    """Return the Triton functions that a kernel source defines, by name in the source's order.

    The same text gives the same functions, so that equal kernels are compiled once.

    Args:
        source: a module: a docstring, `import triton` and `import triton.language as tl`, constants such as
            `SIZE: tl.constexpr = tl.constexpr(64)`, and functions decorated with `triton.jit`.

    Raises:
        ArtifactError: the text holds anything else; the message names the line.
    """
    return dict(_functions(source))


@functools.lru_cache(maxsize=4096)
def _functions(source: str) -> tuple[tuple[str, Any], ...]:
    tree = check_source(source)
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    digest = hashlib.sha256(source.encode()).hexdigest()
    name = f"graphwright_kernel_{digest[:16]}"
    # Triton reads the functions' source through `inspect`, which asks here for what is not in a file.
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    code = compile(ast.Module(body, []), filename, "exec", dont_inherit=True)
    space: dict[str, Any] = {
        "__name__": name,
        "__builtins__": {"float": float},
        "triton": triton,
        "tl": tl,
        "libdevice": libdevice,
    }
    exec(code, space)
    functions = tuple((node.name, space[node.name]) for node in body if isinstance(node, ast.FunctionDef))
    for function_name, function in functions:
        # Triton would find the key by walking through the function and all that it calls, which takes longer than the rest
        # of loading a kernel. All of that is in this text, or in Triton, whose own key is part of the whole one.
        function.hash = hashlib.sha256(f"{function_name} {digest}".encode()).hexdigest()
    return functions


@functools.lru_cache(maxsize=256)
def check_source(source: str) -> ast.Module:
    """Return the tree of a kernel source that holds nothing but kernels.

    Raises:
        ArtifactError: it holds something else; the message names the line.
    """
    try:
        tree = ast.parse(source)
        _Checker(source).module(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"a kernel source is not Python: {error}") from error
    return tree


class _Checker:
    def __init__(self, source: str) -> None:
        self._lines = source.splitlines()
        self._globals: set[str] = set()

    def _refuse(self, node: ast.AST, reason: str) -> ArtifactError:
        line = getattr(node, "lineno", 0)
        text = self._lines[line - 1].strip() if 0 < line <= len(self._lines) else ""
        return ArtifactError(f"kernel source, line {line}: {reason}: {text}")

    def module(self, tree: ast.Module) -> None:
        imported: set[str] = set()
        constants: set[str] = set()
        functions: dict[str, ast.FunctionDef] = {}
        for k, node in enumerate(tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound = _IMPORTS.get(ast.unparse(node))
                if bound is None:
                    raise self._refuse(node, f"only these may be imported: {'; '.join(_IMPORTS)}")
                imported.add(bound)
            elif isinstance(node, ast.FunctionDef):
                functions[self._new(node, node.name, {*functions, *constants})] = node
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                constants.add(self._new(node, self._constant(node), {*functions, *constants}))
            elif not (k == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                raise self._refuse(node, "only imports, constants and functions may stand in a kernel source")
        if not functions:
            raise ArtifactError("a kernel source must define a function")
        self._globals = {*imported, *constants, *functions}
        for function in functions.values():
            self._function(function)

    def _new(self, node: ast.AST, name: str, taken: Iterable[str]) -> str:
        if name.startswith("_") or name in _BUILTINS or name in _IMPORTS.values() or name in taken:
            raise self._refuse(node, f"the name {name!r} is private or taken")
        return name

    def _constant(self, node: ast.AnnAssign | ast.Assign) -> str:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        value = node.value
        fits = (
            isinstance(target, ast.Name)
            and (isinstance(node, ast.AnnAssign) or len(node.targets) == 1)
            and (not isinstance(node, ast.AnnAssign) or ast.unparse(node.annotation) == "tl.constexpr")
            and isinstance(value, ast.Call)
            and ast.unparse(value.func) == "tl.constexpr"
            and len(value.args) == 1
            and not value.keywords
            and _is_number(value.args[0])
        )
        if not fits:
            raise self._refuse(node, "a constant must be written NAME: tl.constexpr = tl.constexpr(number)")
        assert isinstance(target, ast.Name)
        return target.id

    def _function(self, function: ast.FunctionDef) -> None:
        self._decorator(function)
        arguments = function.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs or function.returns:
            raise self._refuse(function, "a kernel takes plain parameters only, and its result has no annotation")
        local: set[str] = set()
        for argument in arguments.args:
            if argument.annotation is not None and ast.unparse(argument.annotation) != "tl.constexpr":
                raise self._refuse(argument, "a parameter may be annotated with tl.constexpr only")
            local.add(self._new(argument, argument.arg, {*self._globals, *local}))
        for default in arguments.defaults:
            if not (isinstance(default, ast.Constant) or _is_number(default)):
                raise self._refuse(default, "a default must be a constant")
        for node in ast.walk(ast.Module(function.body, [])):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                if node.id not in local:
                    local.add(self._new(node, node.id, self._globals))
            elif isinstance(node, ast.keyword) and (node.arg is None or node.arg.startswith("_")):
                raise self._refuse(node, "a call's arguments may not be private or opened")
        for statement in function.body:
            self._node(statement, local)

    def _decorator(self, function: ast.FunctionDef) -> None:
        written = function.decorator_list
        if len(written) == 1 and ast.unparse(written[0]) == "triton.jit":
            return
        if len(written) == 1 and isinstance(written[0], ast.Call) and ast.unparse(written[0].func) == "triton.jit":
            call = written[0]
            if not call.args and all(k.arg in _JIT_OPTIONS and _is_literal(k.value) for k in call.keywords):
                return
        raise self._refuse(function, "a function must be decorated with @triton.jit and nothing else")

    def _node(self, node: ast.AST, local: set[str]) -> None:
        if isinstance(node, ast.Attribute):
            self._attribute(node, local)
            return
        if isinstance(node, ast.Name):
            known = local | self._globals | _BUILTINS
            if node.id in _IMPORTS.values() or node.id not in known:
                raise self._refuse(node, f"the name {node.id!r} stands for nothing here")
            return
        if isinstance(node, ast.Constant):
            if not isinstance(node.value, int | float | str | None):
                raise self._refuse(node, "only numbers and texts may be written out")
            return
        if isinstance(node, ast.AnnAssign):
            if ast.unparse(node.annotation) != "tl.constexpr" or not isinstance(node.target, ast.Name) or node.value is None:
                raise self._refuse(node, "a local may be annotated with tl.constexpr only")
            self._node(node.value, local)
            return
        if isinstance(node, ast.Call):
            # A call of a call, or of an element, could reach functions that have no name here.
            if not isinstance(node.func, ast.Name | ast.Attribute):
                raise self._refuse(node, "only functions with a name may be called")
            if isinstance(node.func, ast.Name) and node.func.id in local:
                raise self._refuse(node, "a local or a parameter may not be called")
        elif not isinstance(node, _PLAIN):
            raise self._refuse(node, f"a kernel may not hold {type(node).__name__}")
        for child in ast.iter_child_nodes(node):
            self._node(child, local)

    def _attribute(self, node: ast.Attribute, local: set[str]) -> None:
        if not isinstance(node.ctx, ast.Load):
            raise self._refuse(node, "an attribute may not be set")
        path = ast.unparse(node)
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in _IMPORTS.values():
            if root.id not in self._globals or path not in _known_paths():
                raise self._refuse(node, f"{path} may not be used in a kernel")
            return
        if node.attr not in _known_attributes():
            raise self._refuse(node, f"the attribute {node.attr!r} may not be used in a kernel")
        self._node(node.value, local)


def _dotted(node: ast.expr) -> str:
    """Return names with dots between them as they are written, "" for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if isinstance(node, ast.Call):
        return ast.unparse(node) in ("float('inf')", "float('nan')")
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _is_literal(node: ast.expr) -> bool:
    entries = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
    return all(isinstance(entry, ast.Constant) for entry in entries)


@functools.cache
def _known_paths() -> frozenset[str]:
    """Return what may be written with a dot after an imported name."""
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.jit import JITCallable

    def operations(prefix: str, module: Any) -> set[str]:
        return {
            f"{prefix}.{name}"
            for name, value in vars(module).items()
            if not name.startswith("_")
            and name not in _REFUSED
            and (isinstance(value, JITCallable | tl.dtype) or getattr(value, "__triton_builtin__", False))
        }

    return frozenset(
        operations("tl", tl)
        | operations("tl.math", tl.math)
        | {f"libdevice.{name}" for name in vars(libdevice) if not name.startswith("_") and callable(getattr(libdevice, name))}
        | {f"tl.{name}" for name in _LANGUAGE}
        | {f"triton.{name}" for name in _TRITON}
    )


@functools.cache
def _known_attributes() -> frozenset[str]:
    """Return what may be written with a dot after a value: operations of tensors, and questions about types."""
    import triton.language as tl

    names = {name for name in dir(tl.tensor) if not name.startswith("_")}
    return frozenset(names | _ATTRIBUTES | {name for name in dir(tl.dtype) if name.startswith("is_")})
