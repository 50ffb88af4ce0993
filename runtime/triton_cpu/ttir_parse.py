"""Reader of TTIR text; `ttir_forms` describes the attributes that it gives to operations."""

from __future__ import annotations

from .errors import TtirSyntaxError
from .ttir import Block, Function, Op, Type
from .ttir_blocks import BlockReader
from .ttir_forms import (
    ABBREVIATED,
    DEFAULTS,
    GENERIC,
    RENAMED,
    STRINGS,
    WORDS,
    name_words,
    read_attributes,
    read_types,
    result_type,
)
from .ttir_text import parse_dense, parse_number, parse_type, unquote


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


class _Parser(BlockReader):
    """Reads functions and operations."""

    def module(self) -> dict[str, Function]:
        functions: dict[str, Function] = {}
        try:
            if self.next()[0] != "module":
                raise TtirSyntaxError("expected a module")
            while (tokens := self.next()) and tokens[0] == "tt.func":
                function = self._function(tokens)
                functions[function.name] = function
            if tokens != ["}"]:
                raise TtirSyntaxError("expected a function or }")
            if self.next():
                raise TtirSyntaxError("expected the end of the text")
        except (TtirSyntaxError, IndexError, KeyError, ValueError) as error:
            reason = error if isinstance(error, TtirSyntaxError) else "not understood"
            raise TtirSyntaxError(f"line {self.row}: {reason}: {self.lines[self.row - 1].strip()}") from error
        return functions

    def _function(self, tokens: list[str]) -> Function:
        self.values, self.pending, self.labels, self.position = {}, {}, {}, 0
        at = next(i for i, token in enumerate(tokens) if token[0] == "@")
        name = unquote(tokens[at][1:]) if tokens[at][1] == '"' else tokens[at][1:]
        entry = Block()
        i, attrs = self.arguments(tokens, at + 1, entry)
        result_types: list[Type] = []
        if tokens[i] == "->":
            i, result_types = read_types(tokens, i + 1)
        if tokens[i] == "attributes":
            i = read_attributes(tokens, i + 1, {})
        if tokens[i:] != ["{"]:
            raise TtirSyntaxError("expected the body of a function")
        blocks, closing = self.region(None, entry)
        if closing != ["}"]:
            raise TtirSyntaxError("expected the end of a function")
        if self.pending:
            raise TtirSyntaxError(f"{', '.join(self.pending)} not defined in {name}")
        for block in blocks:
            if not block.ops or not (block.terminator.successors or block.terminator.name == "tt.return"):
                raise TtirSyntaxError("a block does not end with a branch or tt.return")
        return Function(name, blocks, attrs, "private" not in tokens[:at], result_types)

    def operation(self, tokens: list[str], block: Block) -> None:
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
        if "." not in name:
            raise TtirSyntaxError("expected an operation")
        op = Op(name, [], dict(DEFAULTS[name]) if name in DEFAULTS else {}, [], [], block, self.position)
        op.line = self.line
        self.position += 1
        block.ops.append(op)
        special = _SPECIAL.get(name)
        if special is not None:
            types = special(self, op, tokens, i + 1)
        elif name[0] == '"':
            op.name = unquote(name)
            if op.name not in GENERIC:
                raise TtirSyntaxError("this operation is not expected in the generic form")
            types = self._generic_form(op, tokens, i + 1)
        else:
            types = self._plain(op, tokens, i + 1, len(names))
        for operand in op.operands:
            operand.uses.append(op)
        if len(types) != len(names):
            raise TtirSyntaxError(f"{len(types)} result types for {len(names)} results")
        for k, type_ in enumerate(types):
            op.results.append(self.define(names[k], type_, op, k, block))

    def _plain(self, op: Op, tokens: list[str], i: int, results: int) -> list[Type]:
        """Read `operands and attributes : types`, the form of all operations without regions."""
        name, operands, attrs = op.name, op.operands, op.attrs
        words: list[str] = []
        end = len(tokens)
        while i < end:
            token = tokens[i]
            first = token[0]
            if first == "%":
                operands.append(self.value(token))
            elif first == ":":
                if name != "tt.print" or tokens[i + 1][0] != "%":
                    break
            elif first == "{":
                i = read_attributes(tokens, i, attrs)
                continue
            elif first in ",[]()":
                pass
            elif first == '"' and name in STRINGS:
                attrs[STRINGS[name]] = unquote(token)
            elif first == "@" and name == "tt.call":
                attrs["callee"] = unquote(token[1:]) if token[1] == '"' else token[1:]
            elif i + 1 < end and tokens[i + 1] == "=":
                attrs[RENAMED.get(token, token)] = tokens[i + 2]
                i += 3
                continue
            elif token[-1] == ">" and token.startswith(("overflow<", "fastmath<")):
                attrs[token[:8]] = [flag.strip() for flag in token[9:-1].split(",")]
            else:
                words.append(token)
            i += 1
        if words or name in WORDS:
            name_words(op, words)
        if i == end:
            return []
        i, types = read_types(tokens, i + 1)
        arrow = i < end and tokens[i] in ("->", "to")
        if arrow:
            i, types = read_types(tokens, i + 1)
            if results == 2 and name == "tt.split":
                types = types * 2
        if i != end:
            raise TtirSyntaxError("expected the end of the operation")
        if not results or arrow:
            return types if results else []
        if results == 1:
            return [result_type(name, types)]
        return types * results if len(types) == 1 else types

    def _generic_form(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        """Read `"name"(operands) <{properties}> ({regions}) {attributes} : (types) -> types`."""
        if tokens[i] != "(":
            raise TtirSyntaxError("expected operands")
        op.attrs.update(DEFAULTS.get(op.name, {}))
        while tokens[i] != ")":
            if tokens[i][0] == "%":
                op.operands.append(self.value(tokens[i]))
            i += 1
        i += 1
        if tokens[i] == "<{":
            i = read_attributes(tokens, i, op.attrs)
        if tokens[i] == "(":
            if tokens[i:] != ["(", "{"]:
                raise TtirSyntaxError("expected a region")
            while True:
                blocks, tokens = self.region(op, Block())
                op.regions.append(blocks)
                if tokens != ["}", ",", "{"]:
                    break
            if tokens[:2] != ["}", ")"]:
                raise TtirSyntaxError("expected the end of a region")
            op.line = self.line
            i = 2
        if tokens[i] == "{":
            i = read_attributes(tokens, i, op.attrs)
        if tokens[i] != ":":
            raise TtirSyntaxError("expected types")
        i, _ = read_types(tokens, i + 1)
        i, types = read_types(tokens, i + 1) if tokens[i] == "->" else (0, [])
        if i != len(tokens):
            raise TtirSyntaxError("expected the end of the operation")
        return types

    def _close(self, op: Op, tokens: list[str]) -> None:
        """Read the end of an operation with regions: `}` or `} {attributes}` or `} attributes {attributes}`."""
        op.line = self.line
        i = 2 if tokens[1:2] == ["attributes"] else 1
        if i < len(tokens):
            i = read_attributes(tokens, i, op.attrs)
        if i != len(tokens):
            raise TtirSyntaxError("expected the end of a region")

    def _body(self, op: Op, entry: Block) -> list[str]:
        """Read a region whose terminator is not printed where it yields nothing; returns its closing line."""
        blocks, closing = self.region(op, entry)
        op.regions.append(blocks)
        block = blocks[-1]
        if not block.ops or block.terminator.name != "scf.yield":
            block.ops.append(Op("scf.yield", [], block=block, position=self.position))
            self.position += 1
        return closing

    def _inits(self, op: Op, tokens: list[str], i: int) -> tuple[int, list[str]]:
        """Read `(%arg = %init, ...)` into the operands; returns the names of the arguments."""
        names: list[str] = []
        if tokens[i] != "(":
            raise TtirSyntaxError("expected (")
        while tokens[i] != ")":
            if tokens[i + 2] != "=":
                raise TtirSyntaxError("expected an initial value")
            names.append(tokens[i + 1])
            op.operands.append(self.value(tokens[i + 3]))
            i += 4
        return i + 1, names

    def _constant(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        if tokens[i] == "{":
            i = read_attributes(tokens, i, op.attrs)
        token = tokens[i]
        if i + 1 == len(tokens):
            if token not in ("true", "false"):
                raise TtirSyntaxError("expected a type")
            type_ = Type((), "i1")
        elif tokens[i + 1] == ":" and i + 3 == len(tokens):
            type_ = parse_type(tokens[i + 2])
        else:
            raise TtirSyntaxError("expected a type")
        dense = token.startswith("dense<")
        if type_.shape and not dense:
            raise TtirSyntaxError("expected dense<...>")
        op.attrs["value"] = parse_dense(token, type_) if dense else parse_number(token, type_.element)
        return [type_]

    def _for(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        op.attrs["unsigned"] = tokens[i] == "unsigned"
        i += tokens[i] == "unsigned"
        if [tokens[i + 1], tokens[i + 3], tokens[i + 5]] != ["=", "to", "step"]:
            raise TtirSyntaxError("expected %i = %lower to %upper step %step")
        names = [tokens[i]]
        op.operands += [self.value(tokens[i + 2]), self.value(tokens[i + 4]), self.value(tokens[i + 6])]
        i += 7
        types: list[Type] = []
        if tokens[i] == "iter_args":
            i, arguments = self._inits(op, tokens, i + 1)
            names += arguments
            if tokens[i] != "->":
                raise TtirSyntaxError("expected the types of the results")
            i, types = read_types(tokens, i + 1)
        index = Type((), "index")
        if tokens[i] == ":":
            index = parse_type(tokens[i + 1])
            i += 2
        if tokens[i:] != ["{"]:
            raise TtirSyntaxError("expected the body of the loop")
        entry = Block()
        for k, (name, type_) in enumerate(zip(names, [index, *types], strict=True)):
            entry.args.append(self.define(name, type_, None, k, entry))
        self._close(op, self._body(op, entry))
        return types

    def _while(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        names: list[str] = []
        if tokens[i] == "(":
            i, names = self._inits(op, tokens, i)
        i, inits = read_types(tokens, i + 1)
        i, types = read_types(tokens, i + 1)
        if tokens[i:] != ["{"]:
            raise TtirSyntaxError("expected the condition of the loop")
        entry = Block()
        for k, (name, type_) in enumerate(zip(names, inits, strict=True)):
            entry.args.append(self.define(name, type_, None, k, entry))
        blocks, closing = self.region(op, entry)
        op.regions.append(blocks)
        if closing != ["}", "do", "{"]:
            raise TtirSyntaxError("expected the body of the loop")
        blocks, closing = self.region(op, Block())
        op.regions.append(blocks)
        self._close(op, closing)
        return types

    def _if(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        op.operands.append(self.value(tokens[i]))
        i += 1
        types: list[Type] = []
        if tokens[i] == "->":
            i, types = read_types(tokens, i + 1)
        if tokens[i:] != ["{"]:
            raise TtirSyntaxError("expected the branches")
        closing = self._body(op, Block())
        if closing == ["}", "else", "{"]:
            closing = self._body(op, Block())
        self._close(op, closing)
        return types

    def _branch(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        if op.name == "cf.cond_br":
            op.operands.append(self.value(tokens[i]))
            i += 2
        while i < len(tokens):
            if tokens[i][0] != "^":
                raise TtirSyntaxError("expected a block")
            target, passed = self.block(tokens[i]), []
            i += 1
            if tokens[i : i + 1] == ["("]:
                while tokens[i] != ":":
                    if tokens[i][0] == "%":
                        passed.append(self.value(tokens[i]))
                    i += 1
                i = tokens.index(")", i) + 1
            op.successors.append((target, passed))
            for value in passed:
                value.uses.append(op)
            i += tokens[i : i + 1] == [","]
        if len(op.successors) != 1 + len(op.operands):
            raise TtirSyntaxError("expected the blocks of the branch")
        return []

    def _dot_scaled(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        commas = [k for k, token in enumerate(tokens) if token == ","][:2]
        op.attrs["has_lhs_scale"] = "scale" in tokens[i : commas[0]]
        op.attrs["has_rhs_scale"] = "scale" in tokens[commas[0] : commas[1]]
        return self._plain(op, tokens, i, 1)

    def _abbreviated(self, op: Op, tokens: list[str], i: int) -> list[Type]:
        """Read an operation that prints `<...>`, what is between the brackets of its type."""
        tokens[-1] = ABBREVIATED[op.name] + tokens[-1]
        if op.name == "tt.make_tensor_descriptor":
            del tokens[-3:-1]
        self._plain(op, tokens, i, 0)
        return [parse_type(tokens[-1])]


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
