"""The line level of TTIR text: values, blocks and regions."""

from __future__ import annotations

from typing import Any

from .errors import TtirSyntaxError
from .ttir import Block, Op, Type, Value
from .ttir_forms import read_attributes
from .ttir_text import Locations, parse_type, tokenize


class BlockReader:
    """Reads the lines of a module in order; a subclass says what an operation is.

    Args:
        text: the text of the module.
    """

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.row = 0
        self.locations = Locations(text)
        self.line = ""
        """Source location of the line read last."""
        self.values: dict[str, Value] = {}
        self.pending: dict[str, Value] = {}
        """Values that were used before the line that defines them (blocks need not be in order of dominance)."""
        self.labels: dict[str, Block] = {}
        self.position = 0

    def next(self) -> list[str]:
        """Return the tokens of the next line that has any, without its location; an empty list at the end."""
        for row in range(self.row, len(self.lines)):
            line = self.lines[row]
            if not line or line[0] == "#":
                continue
            tokens = tokenize(line)
            if tokens and tokens[-1].startswith("//"):
                tokens.pop()
            if tokens:
                self.row = row + 1
                self.line = self.locations.line(tokens.pop()) if tokens[-1].startswith("loc(") else ""
                return tokens
        self.row = len(self.lines)
        return []

    def value(self, name: str) -> Value:
        """Return the value of a name that is used, to be completed if its definition comes later."""
        value = self.values.get(name)
        if value is None:
            value = self.values[name] = self.pending[name] = Value(name, Type((), "undefined"))
        return value

    def define(self, name: str, type_: Type, op: Op | None, index: int, block: Block | None) -> Value:
        """Return the value that a name stands for from here on."""
        if self.pending and name in self.pending:
            value = self.pending.pop(name)
            value.type, value.op, value.index, value.block = type_, op, index, block
        else:
            value = self.values[name] = Value(name, type_, op, index, block)
        return value

    def block(self, label: str) -> Block:
        """Return the block of the region being read that has this label."""
        block = self.labels.get(label)
        if block is None:
            block = self.labels[label] = Block()
        return block

    def arguments(self, tokens: list[str], i: int, block: Block) -> tuple[int, list[dict[str, Any]]]:
        """Read `(%x: type {attributes} loc(...), ...)` into a block's arguments."""
        attrs: list[dict[str, Any]] = []
        i += 1
        while tokens[i] != ")":
            if tokens[i + 1] != ":":
                raise TtirSyntaxError("expected an argument")
            block.args.append(self.define(tokens[i], parse_type(tokens[i + 2]), None, len(block.args), block))
            i += 3
            attrs.append({})
            if tokens[i] == "{":
                i = read_attributes(tokens, i, attrs[-1])
            if tokens[i].startswith("loc("):
                i += 1
            if tokens[i] == ",":
                i += 1
        return i + 1, attrs

    def region(self, parent: Op | None, entry: Block) -> tuple[list[Block], list[str]]:
        """Read the blocks of a region; also returns the tokens of its closing line."""
        outer, self.labels = self.labels, {}
        block, blocks = entry, [entry]
        entry.parent = parent
        while True:
            tokens = self.next()
            if not tokens:
                raise TtirSyntaxError("expected }")
            first = tokens[0]
            if first[0] == "}":
                break
            if first[0] == "^":
                if block is not entry or entry.ops:
                    block = self.block(first)
                    block.parent = parent
                    blocks.append(block)
                else:
                    self.labels[first] = entry
                if tokens[1] == "(":
                    self.arguments(tokens, 1, block)
            else:
                self.operation(tokens, block)
        if len(self.labels) > len(blocks) or any(block not in blocks for block in self.labels.values()):
            raise TtirSyntaxError("a branch to a block that is not here")
        self.labels = outer
        return blocks, tokens

    def operation(self, tokens: list[str], block: Block) -> None:
        """Read the operation that starts at a line, with its regions, into `block`."""
        raise NotImplementedError
