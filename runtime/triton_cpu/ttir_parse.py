"""Reader of TTIR text.

Attributes keep their TTIR names, except that the ones which are bare words in the text get a name and a few are renamed:

    arith.constant      value: int, float, or list of elements in row-major order
    arith.cmpi, cmpf    predicate: 'slt', 'oeq', ...
    arith.*, math.*     overflow, fastmath: list of flags; exact, nneg: True; rounding: MLIR's name
    tt.get_program_id, tt.get_num_programs    axis: 0, 1 or 2
    tt.load, tt.store   volatile (load), cache: 'none', 'ca', ...; evict: 'evict_normal', ...; boundary_check, padding
    tt.atomic_rmw       kind: 'fadd', ...; sem; scope
    tt.atomic_cas       sem; scope
    tt.dot              precision: 'ieee', 'tf32', ...; max_num_imprecise_acc
    tt.dot_scaled       lhs, rhs: 'e5m2', ...; has_lhs_scale, has_rhs_scale; fastMath, lhs_k_pack, rhs_k_pack
    tt.fp_to_fp         rounding: 'rtne' or 'rtz'
    tt.clampf           propagate_nan: 'none' or 'all'
    tt.reshape          allow_reorder, efficient_layout: True where present
    tt.print            prefix, hex, is_signed
    tt.assert           message
    tt.elementwise_inline_asm   asm_string, constraints, packed_element, pure
    tt.extern_elementwise       symbol, libname, libpath, pure
    tt.descriptor_reduce        kind
    tt.call             callee
    scf.for             unsigned: bool, and those of tl.range, such as 'tt.num_stages'
"""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import TtirSyntaxError
from .ttir import Block, Function, Op, Type, Value
from .ttir_text import Locations, parse_dense, parse_number, parse_type, tokenize, unquote

_WORDS = {
    "arith.cmpi": ("predicate",),
    "arith.cmpf": ("predicate",),
    "arith.truncf": ("rounding",),
    "tt.get_program_id": ("axis",),
    "tt.get_num_programs": ("axis",),
    "tt.atomic_rmw": ("kind", "sem", "scope"),
    "tt.atomic_cas": ("sem", "scope"),
    "tt.descriptor_reduce": ("kind",),
    "ttg.barrier": ("space",),
}
"""Names of the attributes that are bare words in the text."""

_STRINGS = {"tt.print": "prefix", "tt.assert": "message", "tt.elementwise_inline_asm": "asm_string"}
"""Names of the attributes that are bare strings in the text."""

_FLAGS = frozenset({"exact", "nneg", "allow_reorder", "efficient_layout"})

_RENAMED = {
    "isVolatile": "volatile",
    "cacheModifier": "cache",
    "evictionPolicy": "evict",
    "boundaryCheck": "boundary_check",
    "inputPrecision": "precision",
    "maxNumImpreciseAcc": "max_num_imprecise_acc",
    "propagateNan": "propagate_nan",
    "isSigned": "is_signed",
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "tt.load": {"volatile": False, "cache": "none", "evict": "evict_normal"},
    "tt.store": {"cache": "none", "evict": "evict_normal"},
    "tt.dot": {"precision": "ieee", "max_num_imprecise_acc": 0},
    "tt.scan": {"reverse": False},
}

_SAME_TYPE = frozenset(
    "tt.addptr tt.clampf tt.get_num_programs tt.get_program_id tt.make_range tt.mulhiui tt.precise_divf "
    "tt.precise_sqrt".split()
)
"""Operations outside arith, math and ub whose printed type is that of the result."""

_ABBREVIATED = {
    "tt.advance": "!tt.ptr",
    "tt.make_tensor_ptr": "!tt.ptr",
    "tt.make_tensor_descriptor": "!tt.tensordesc",
}
"""Operations that print only what is between the brackets of their (last) type."""


def parse(text: str) -> dict[str, Function]:
    """Read the functions of a TTIR module, with or without source locations.

    Args:
        text: a module as `str(module)` or `module.str_nodebug()` print it.

    Returns:
        The functions by name, in order.

    Raises:
        TtirSyntaxError: the text has a form that is not known; the message shows the line.
    """
    return _Parser(text).module()


class _Parser:
    """One reading of a module's text; `_row` is the index of the next line."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._row = 0
        self._locations = Locations(text)
        self._line = ""
        """Source location of the line read last."""
        self._values: dict[str, Value] = {}
        self._pending: dict[str, Value] = {}
        """Values that were used before the line that defines them (blocks need not be in order of dominance)."""
        self._labels: dict[str, Block] = {}
        self._position = 0

    # Lines and names

    def _fail(self, reason: str) -> NoReturn:
        raise TtirSyntaxError(f"line {self._row}: {reason}: {self._lines[self._row - 1].strip()}")

    def _next(self) -> list[str]:
        """Return the tokens of the next line that has any, without its location; an empty list at the end."""
        for row in range(self._row, len(self._lines)):
            line = self._lines[row]
            if not line or line[0] == "#":
                continue
            tokens = tokenize(line)
            if tokens and tokens[-1].startswith("//"):
                tokens.pop()
            if tokens:
                self._row = row + 1
                self._line = self._locations.line(tokens.pop()) if tokens[-1].startswith("loc(") else ""
                return tokens
        self._row = len(self._lines)
        return []

    def _value(self, name: str) -> Value:
        value = self._values.get(name)
        if value is None:
            value = self._values[name] = self._pending[name] = Value(name, Type((), "undefined"))
        return value

    def _define(self, name: str, type_: Type, op: Op | None, index: int, block: Block | None) -> Value:
        if self._pending and name in self._pending:
            value = self._pending.pop(name)
            value.type, value.op, value.index, value.block = type_, op, index, block
        else:
            value = self._values[name] = Value(name, type_, op, index, block)
        return value

    def _block(self, label: str) -> Block:
        block = self._labels.get(label)
        if block is None:
            block = self._labels[label] = Block()
        return block

    # Module, functions and blocks

    def module(self) -> dict[str, Function]:
        functions: dict[str, Function] = {}
        try:
            while tokens := self._next():
                if tokens[0] == "tt.func":
                    function = self._function(tokens)
                    functions[function.name] = function
                elif tokens[0] != "module" and tokens != ["}"]:
                    self._fail("not a function")
        except TtirSyntaxError as error:
            if str(error).startswith("line "):
                raise
            self._fail(str(error))
        except (IndexError, KeyError, ValueError):
            self._fail("not understood")
        return functions

    def _function(self, tokens: list[str]) -> Function:
        self._values, self._pending, self._labels, self._position = {}, {}, {}, 0
        at = next(i for i, token in enumerate(tokens) if token[0] == "@")
        name = unquote(tokens[at][1:]) if tokens[at][1] == '"' else tokens[at][1:]
        entry = Block()
        i, attrs = self._arguments(tokens, at + 1, entry)
        result_types: list[Type] = []
        if tokens[i] == "->":
            i, result_types = self._types(tokens, i + 1)
        if tokens[i] == "attributes":
            i = self._attributes(tokens, i + 1, {})
        if tokens[i:] != ["{"]:
            self._fail("expected the body of a function")
        blocks, closing = self._region(None, entry)
        if closing != ["}"]:
            self._fail("expected the end of a function")
        if self._pending:
            self._fail(f"{', '.join(self._pending)} not defined in {name}")
        return Function(name, blocks, attrs, "private" not in tokens[:at], result_types)

    def _arguments(self, tokens: list[str], i: int, block: Block) -> tuple[int, list[dict[str, Any]]]:
        """Read `(%x: type {attributes} loc(...), ...)` into a block's arguments."""
        attrs: list[dict[str, Any]] = []
        i += 1
        while tokens[i] != ")":
            if tokens[i + 1] != ":":
                self._fail("expected an argument")
            block.args.append(self._define(tokens[i], parse_type(tokens[i + 2]), None, len(block.args), block))
            i += 3
            attrs.append({})
            if tokens[i] == "{":
                i = self._attributes(tokens, i, attrs[-1])
            if tokens[i].startswith("loc("):
                i += 1
            if tokens[i] == ",":
                i += 1
        return i + 1, attrs

    def _region(self, parent: Op | None, entry: Block) -> tuple[list[Block], list[str]]:
        """Read the blocks of a region; also returns the tokens of its closing line."""
        outer, self._labels = self._labels, {}
        block, blocks = entry, [entry]
        entry.parent = parent
        while True:
            tokens = self._next()
            if not tokens:
                self._fail("expected }")
            first = tokens[0]
            if first[0] == "}":
                break
            if first[0] == "^":
                if block is not entry or entry.ops:
                    block = self._block(first)
                    block.parent = parent
                    blocks.append(block)
                else:
                    self._labels[first] = entry
                if tokens[1] == "(":
                    self._arguments(tokens, 1, block)
            else:
                self._operation(tokens, block)
        if len(self._labels) > len(blocks) or any(block not in blocks for block in self._labels.values()):
            self._fail("a branch to a block that is not here")
        self._labels = outer
        return blocks, tokens

    # Operations

    def _operation(self, tokens: list[str], block: Block) -> None:
        """Read the operation that starts at a line."""
        names: list[str] = []
        i = 0
        if tokens[0][0] == "%":
            while True:
                name = tokens[i]
                if tokens[i + 1] == ":":
                    names += [f"{name}#{k}" for k in range(int(tokens[i + 2]))]
                    i += 3
                else:
                    names.append(name)
                    i += 1
                i += 1
                if tokens[i - 1] == "=":
                    break
        name = tokens[i]
        op = Op(name, [], dict(_DEFAULTS[name]) if name in _DEFAULTS else {}, [], [], block, self._position)
        op.line = self._line
        self._position += 1
        block.ops.append(op)
        special = _SPECIAL.get(name)
        if special is not None:
            types = special(self, op, tokens, i + 1)
        elif name[0] == '"':
            op.name = unquote(name)
            types = self._generic_form(op, tokens, i + 1)
        else:
            types = self._plain(op, tokens, i + 1, len(names))
        for operand in op.operands:
            operand.uses.append(op)
        if len(types) != len(names):
            self._fail(f"{len(types)} result types for {len(names)} results")
        for k, type_ in enumerate(types):
            op.results.append(self._define(names[k], type_, op, k, block))

    def _plain(self, op: Op, tokens: list[str], i: int, results: int) -> list[Type]:
        """Read `operands and attributes : types`, the form of all operations without regions."""
        name, operands, attrs = op.name, op.operands, op.attrs
        words: list[str] = []
        end = len(tokens)
        while i < end:
            token = tokens[i]
            first = token[0]
            if first == "%":
                operands.append(self._value(token))
            elif first == ":":
                if name != "tt.print" or tokens[i + 1][0] != "%":
                    break
            elif first == "{":
                i = self._attributes(tokens, i, attrs)
                continue
            elif first in ",[]()":
                pass
            elif first == '"' and name in _STRINGS:
                attrs[_STRINGS[name]] = unquote(token)
            elif first == "@" and name == "tt.call":
                attrs["callee"] = unquote(token[1:]) if token[1] == '"' else token[1:]
            elif i + 1 < end and tokens[i + 1] == "=":
                attrs[_RENAMED.get(token, token)] = tokens[i + 2]
                i += 3
                continue
            elif token[-1] == ">" and token.startswith(("overflow<", "fastmath<")):
                attrs[token[:8]] = [flag.strip() for flag in token[9:-1].split(",")]
            else:
                words.append(token)
            i += 1
        if words:
            self._name_words(op, words)
        if i == end:
            return []
        i, types = self._types(tokens, i + 1)
        arrow = i < end and tokens[i] in ("->", "to")
        if arrow:
            i, types = self._types(tokens, i + 1)
            if results == 2 and name == "tt.split":
                types = types * 2
        if i != end:
            self._fail("expected the end of the operation")
        if not results or arrow:
            return types if results else []
        if results == 1:
            return [self._result_type(name, types)]
        return types * results if len(types) == 1 else types

    def _result_type(self, name: str, types: list[Type]) -> Type:
        """Return the type of the only result of an operation that does not print it after an arrow."""
        first = types[0]
        if name == "tt.load":
            if first.pointee is None:
                self._fail("expected a pointer type")
            pointee = parse_type(first.pointee)
            return pointee if pointee.shape else pointee.with_shape(first.shape)
        if name == "arith.cmpi" or name == "arith.cmpf":
            return Type(first.shape, "i1")
        if name == "arith.select":
            return types[-1]
        if name in _SAME_TYPE or name.startswith(("arith.", "math.", "ub.")):
            return first
        if name == "tt.unsplat":
            return first.with_shape(())
        self._fail("the result type of this operation is not known")

    def _name_words(self, op: Op, words: list[str]) -> None:
        """Turn the bare words of an operation into attributes."""
        name, attrs = op.name, op.attrs
        if name == "tt.dot_scaled":
            return
        for word in [word for word in words if word in _FLAGS]:
            attrs[word] = True
            words.remove(word)
        keys = _WORDS.get(name, ())
        if name == "ttg.barrier":
            words = ["".join(words)]
        if len(words) > len(keys):
            self._fail(f"unexpected {words[-1]}")
        attrs.update(zip(keys, words, strict=False))
        if keys == ("axis",):
            attrs["axis"] = "xyz".index(words[0])

    def _generic_form(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        """Read `"name"(operands) <{properties}> ({regions}) {attributes} : (types) -> types`."""
        if tokens[i] != "(":
            self._fail("expected operands")
        op.attrs.update(_DEFAULTS.get(op.name, {}))
        while tokens[i] != ")":
            if tokens[i][0] == "%":
                op.operands.append(self._value(tokens[i]))
            i += 1
        i += 1
        if tokens[i] == "<{":
            i = self._attributes(tokens, i, op.attrs)
        if tokens[i] == "(":
            if tokens[i:] != ["(", "{"]:
                self._fail("expected a region")
            while True:
                blocks, tokens = self._region(op, Block())
                op.regions.append(blocks)
                if tokens != ["}", ",", "{"]:
                    break
            if tokens[:2] != ["}", ")"]:
                self._fail("expected the end of a region")
            op.line = self._line
            i = 2
        if tokens[i] == "{":
            i = self._attributes(tokens, i, op.attrs)
        if tokens[i] != ":":
            self._fail("expected types")
        i, _ = self._types(tokens, i + 1)
        i, types = self._types(tokens, i + 1) if tokens[i] == "->" else (0, [])
        if i != len(tokens):
            self._fail("expected the end of the operation")
        return types

    def _close(self, op: Op, tokens: list[str]) -> None:
        """Read the end of an operation with regions: `}` or `} {attributes}` or `} attributes {attributes}`."""
        op.line = self._line
        i = 2 if tokens[1:2] == ["attributes"] else 1
        if i < len(tokens):
            i = self._attributes(tokens, i, op.attrs)
        if i != len(tokens):
            self._fail("expected the end of a region")

    def _inits(self, op: Op, tokens: list[str], i: int) -> tuple[int, list[str]]:
        """Read `(%arg = %init, ...)` into the operands; returns the names of the arguments."""
        names: list[str] = []
        if tokens[i] != "(":
            self._fail("expected (")
        while tokens[i] != ")":
            if tokens[i + 2] != "=":
                self._fail("expected an initial value")
            names.append(tokens[i + 1])
            op.operands.append(self._value(tokens[i + 3]))
            i += 4
        return i + 1, names

    def _constant(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        if tokens[i] == "{":
            i = self._attributes(tokens, i, op.attrs)
        token = tokens[i]
        if i + 1 == len(tokens):
            if token not in ("true", "false"):
                self._fail("expected a type")
            type_ = Type((), "i1")
        elif tokens[i + 1] == ":" and i + 3 == len(tokens):
            type_ = parse_type(tokens[i + 2])
        else:
            self._fail("expected a type")
        dense = token.startswith("dense<")
        if type_.shape and not dense:
            self._fail("expected dense<...>")
        op.attrs["value"] = parse_dense(token, type_) if dense else parse_number(token, type_.element)
        return [type_]

    def _for(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        op.attrs["unsigned"] = tokens[i] == "unsigned"
        i += tokens[i] == "unsigned"
        if [tokens[i + 1], tokens[i + 3], tokens[i + 5]] != ["=", "to", "step"]:
            self._fail("expected %i = %lower to %upper step %step")
        names = [tokens[i]]
        op.operands += [self._value(tokens[i + 2]), self._value(tokens[i + 4]), self._value(tokens[i + 6])]
        i += 7
        types: list[Type] = []
        if tokens[i] == "iter_args":
            i, arguments = self._inits(op, tokens, i + 1)
            names += arguments
            if tokens[i] != "->":
                self._fail("expected the types of the results")
            i, types = self._types(tokens, i + 1)
        index = Type((), "index")
        if tokens[i] == ":":
            index = parse_type(tokens[i + 1])
            i += 2
        if tokens[i:] != ["{"]:
            self._fail("expected the body of the loop")
        entry = Block()
        for k, (name, type_) in enumerate(zip(names, [index, *types], strict=True)):
            entry.args.append(self._define(name, type_, None, k, entry))
        blocks, closing = self._region(op, entry)
        op.regions.append(blocks)
        self._close(op, closing)
        return types

    def _while(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        names: list[str] = []
        if tokens[i] == "(":
            i, names = self._inits(op, tokens, i)
        i, inits = self._types(tokens, i + 1)
        i, types = self._types(tokens, i + 1)
        if tokens[i:] != ["{"]:
            self._fail("expected the condition of the loop")
        entry = Block()
        for k, (name, type_) in enumerate(zip(names, inits, strict=True)):
            entry.args.append(self._define(name, type_, None, k, entry))
        blocks, closing = self._region(op, entry)
        op.regions.append(blocks)
        if closing != ["}", "do", "{"]:
            self._fail("expected the body of the loop")
        blocks, closing = self._region(op, Block())
        op.regions.append(blocks)
        self._close(op, closing)
        return types

    def _if(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        op.operands.append(self._value(tokens[i]))
        i += 1
        types: list[Type] = []
        if tokens[i] == "->":
            i, types = self._types(tokens, i + 1)
        if tokens[i:] != ["{"]:
            self._fail("expected the branches")
        blocks, closing = self._region(op, Block())
        op.regions.append(blocks)
        if closing == ["}", "else", "{"]:
            blocks, closing = self._region(op, Block())
            op.regions.append(blocks)
        self._close(op, closing)
        return types

    def _branch(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        if op.name == "cf.cond_br":
            op.operands.append(self._value(tokens[i]))
            i += 2
        while i < len(tokens):
            if tokens[i][0] != "^":
                self._fail("expected a block")
            target, passed = self._block(tokens[i]), []
            i += 1
            if tokens[i : i + 1] == ["("]:
                while tokens[i] != ":":
                    if tokens[i][0] == "%":
                        passed.append(self._value(tokens[i]))
                    i += 1
                i = tokens.index(")", i) + 1
            op.successors.append((target, passed))
            for value in passed:
                value.uses.append(op)
            i += tokens[i : i + 1] == [","]
        if len(op.successors) != 1 + len(op.operands):
            self._fail("expected the blocks of the branch")
        return []

    def _dot_scaled(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        commas = [k for k, token in enumerate(tokens) if token == ","][:2]
        op.attrs["has_lhs_scale"] = "scale" in tokens[i : commas[0]]
        op.attrs["has_rhs_scale"] = "scale" in tokens[commas[0] : commas[1]]
        return self._plain(op, tokens, i, 1)

    def _abbreviated(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        """Read an operation that prints `<...>`, what is between the brackets of its type."""
        tokens[-1] = _ABBREVIATED[op.name] + tokens[-1]
        if op.name == "tt.make_tensor_descriptor":
            del tokens[-3:-1]
        self._plain(op, tokens, i, 0)
        return [parse_type(tokens[-1])]

    # Types and attributes

    def _types(self, tokens: list[str], i: int) -> tuple[int, list[Type]]:
        """Read `type, type * type` or `(type, type)`."""
        types: list[Type] = []
        if tokens[i] == "(":
            i += 1
            while tokens[i] != ")":
                types.append(parse_type(tokens[i]))
                i += 1 + (tokens[i + 1] == ",")
            return i + 1, types
        end = len(tokens)
        while True:
            types.append(parse_type(tokens[i]))
            i += 1
            if i == end or tokens[i] not in (",", "*"):
                return i, types
            i += 1

    def _attributes(self, tokens: list[str], i: int, attrs: dict[str, Any]) -> int:
        """Read `{key = value, key}` or `<{...}>` into `attrs`."""
        if tokens[i] not in ("{", "<{"):
            self._fail("expected {")
        i += 1
        while tokens[i] not in ("}", "}>"):
            key = unquote(tokens[i]) if tokens[i][0] == '"' else tokens[i]
            value: Any = True
            i += 1
            if tokens[i] == "=":
                i, value = self._attribute(tokens, i + 1)
            attrs[_RENAMED.get(key, key)] = value
            if tokens[i] == ",":
                i += 1
        return i + 1

    def _attribute(self, tokens: list[str], i: int) -> tuple[int, Any]:
        """Read the value of an attribute, with its type if there is one."""
        token = tokens[i]
        first = token[0]
        value: Any = token
        type_ = ""
        i += 1
        if first == "[":
            value = []
            while tokens[i] != "]":
                i, item = self._attribute(tokens, i)
                value.append(item)
                i += tokens[i] == ","
            return i + 1, value
        if first == "{":
            value = {}
            return self._attributes(tokens, i - 1, value), value
        if tokens[i] == ":":
            type_ = tokens[i + 1]
            i += 2
        if first == '"':
            value = unquote(token)
        elif token == "true" or token == "false":
            value = token == "true"
        elif token.startswith("array<"):
            element, _, items = token[6:-1].partition(":")
            value = [parse_number(item.strip(), element) for item in items.split(",") if item.strip()]
        elif token.startswith("dense<") and type_:
            value = parse_dense(token, parse_type(type_))
        elif first in "-0123456789":
            value = parse_number(token, type_ or "f64" if "." in token else type_ or "i64")
        elif not (first.isalpha() or first in "#!@"):
            self._fail(f"unexpected {token}")
        return i, value


_SPECIAL = {
    "arith.constant": _Parser._constant,
    "scf.for": _Parser._for,
    "scf.while": _Parser._while,
    "scf.if": _Parser._if,
    "cf.br": _Parser._branch,
    "cf.cond_br": _Parser._branch,
    "tt.dot_scaled": _Parser._dot_scaled,
    "tt.advance": _Parser._abbreviated,
    "tt.make_tensor_ptr": _Parser._abbreviated,
    "tt.make_tensor_descriptor": _Parser._abbreviated,
}
"""Operations with a form of their own; a region's closing line gives the location."""
