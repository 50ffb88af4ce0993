"""Inlined calls and structured early returns: no call or branch is left, and the code does what it did."""

import random
import re
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphwright.runtime.triton_cpu.errors import UnsupportedError
from graphwright.runtime.triton_cpu.inline import clone_blocks, inline_calls
from graphwright.runtime.triton_cpu.structure import structure
from graphwright.runtime.triton_cpu.ttir_parse import parse

OPTIONS = SimpleNamespace(
    num_warps=4, debug=False, sanitize_overflow=False, enable_fp_fusion=True, backend_name="test", extern_libs=()
)


def kernel_functions(kernel, signature):
    """Return the functions of a kernel as the front end leaves them, with all its calls."""
    context = ir.context()
    ir.load_dialects(context)
    target, functions = GPUTarget("test", 0, 32), {"convert_custom_types": None}
    return parse(str(ASTSource(kernel, signature).make_ir(target, OPTIONS, functions, {}, context)))


def check_flat(function):
    """Check that a function is made of single blocks in which definitions precede uses, with links that agree."""
    uses = {}
    position = 0

    def visit(block, parent, known):
        nonlocal position
        assert block.parent is parent
        known = known | set(block.args)
        for op in block.ops:
            assert op.name not in ("tt.call", "cf.br", "cf.cond_br")
            assert (op.block, op.position) == (block, position)
            position += 1
            assert known.issuperset(op.operands)
            for value in op.operands:
                uses.setdefault(value, []).append(op)
            for region in op.regions:
                assert len(region) == 1
                visit(region[0], op, known)
            for k, value in enumerate(op.results):
                assert (value.op, value.index, value.block) == (op, k, block)
            known |= set(op.results)

    assert len(function.blocks) == 1
    visit(function.blocks[0], None, set())
    for op in function.walk():
        for value in op.results:
            assert value.uses == uses.get(value, [])


def run(functions, name, args, log):
    """Interpret a function on integers; `log` receives what it stores. Poison is None, which nothing may look at."""
    env = {}

    def block(b, values):
        env.update(zip(b.args, values, strict=True))
        for op in b.ops:
            a = [env[v] for v in op.operands]
            if op.name in ("tt.return", "scf.yield"):
                return a
            if op.successors:
                assert a[:1] != [None]
                target, passed = op.successors[0 if not a or a[0] else 1]
                return block(target, [env[v] for v in passed])
            results = execute(op, a)
            env.update(zip(op.results, results, strict=True))
        raise AssertionError("no terminator")

    def execute(op, a):
        match op.name:
            case "arith.constant":
                return [op.attrs["value"]]
            case "ub.poison":
                return [None]
            case "arith.addi":
                return [(a[0] + a[1]) % 2**32]
            case "arith.muli":
                return [a[0] * a[1] % 2**32]
            case "arith.andi":
                return [a[0] & a[1]]
            case "arith.xori":
                return [a[0] ^ a[1]]
            case "arith.cmpi":
                compare = {"eq": int.__eq__, "slt": int.__lt__, "sgt": int.__gt__}
                return [int(compare[op.attrs["predicate"]](a[0], a[1]))]
            case "tt.store":
                assert None not in a
                log.append(tuple(a))
                return []
            case "scf.if":
                assert a[0] is not None
                side = 0 if a[0] else 1
                return block(op.regions[side][0], []) if side < len(op.regions) else []
            case "scf.for":
                carried = a[3:]
                for i in range(a[0], a[1], a[2]):
                    carried = block(op.body, [i, *carried])
                return carried
            case "tt.call":
                return run(functions, op.attrs["callee"], a, log)
            case _:
                raise AssertionError(op.name)

    return block(functions[name].blocks[0], args)


def same_behaviour(text, entry, inputs):
    """Check an entry function before and after for the same results and stores on all inputs; returns it after."""
    before, after = parse(text), parse(text)
    flat = inline_calls(after, entry)
    check_flat(flat)
    for args in inputs:
        expected, actual = [], []
        assert run({entry: flat}, entry, args, actual) == run(before, entry, args, expected)
        assert actual == expected
    return flat


def module(*functions):
    """Return the text of a module of functions, given as their lines after the name."""
    return "module {\n" + "\n".join(f"tt.func private @{function}\n}}" for function in functions) + "\n}\n"


def random_function(rng):
    """Return the text of a function whose blocks branch forwards at random, in random order."""
    count, returned = rng.randint(1, 12), rng.randint(0, 2)
    passed = [0] + [rng.randint(0, 2) for _ in range(count - 1)]
    successors = [
        [rng.choice(range(k + 1, count)[:4]) for _ in range(rng.choice((0, 1, 1, 2, 2, 2)))] if k + 1 < count else []
        for k in range(count)
    ]
    dominators = [{0}]
    for k in range(1, count):
        before = [dominators[p] for p in range(k) if k in successors[p] and dominators[p]]
        dominators.append({k} | set.intersection(*before) if before else set())
    values = [[] for _ in range(count)]
    names = iter(f"%v{k}" for k in range(1000))
    blocks = []
    for k in range(count):
        values[k] += ["%a", "%b"] if k == 0 else [next(names) for _ in range(passed[k])]
        arguments = ", ".join(f"{name}: i32" for name in values[k])

        def some(number, k=k):
            visible = [name for d in dominators[k] | {0, k} for name in values[d]]
            return ", ".join(rng.choice(visible) for _ in range(number))

        def target(to, some=some):
            types = ", ".join(["i32"] * passed[to])
            return f"^bb{to}({some(passed[to])} : {types})" if passed[to] else f"^bb{to}"

        lines = [f"^bb{k}({arguments}):" if arguments else f"^bb{k}:"] if k else []
        for _ in range(rng.randint(0, 2)):
            name = next(names)
            lines.append(f"{name} = arith.{rng.choice(('addi', 'muli'))} {some(2)} : i32")
            values[k].append(name)
        lines.append(f"tt.store {some(2)} : i32")
        if not successors[k]:
            lines.append(f"tt.return {some(returned)} : {', '.join(['i32'] * returned)}" if returned else "tt.return")
        elif len(successors[k]) == 1:
            lines.append(f"cf.br {target(successors[k][0])}")
        else:
            bit, masked, condition = next(names), next(names), next(names)
            lines += [
                f"{bit} = arith.constant {1 << rng.randint(0, 3)} : i32",
                f"{masked} = arith.andi {some(1)}, {bit} : i32",
                f"{condition} = arith.cmpi eq, {masked}, {bit} : i32",
                f"cf.cond_br {condition}, {target(successors[k][0])}, {target(successors[k][1])}",
            ]
        blocks.append("\n".join(lines))
    rest = blocks[1:]
    rng.shuffle(rest)
    results = ("", " -> i32", " -> (i32, i32)")[returned]
    return module(f"f(%a: i32, %b: i32){results} {{\n" + "\n".join([blocks[0], *rest]))


@pytest.mark.parametrize("seed", range(300))
def test_random_branches(seed):
    """Any branches that go forwards become scf.if without a copy of an operation."""
    rng = random.Random(seed)
    text = random_function(rng)
    flat = same_behaviour(text, "f", [[rng.getrandbits(32), rng.getrandbits(32)] for _ in range(16)])
    assert sum(op.name == "tt.store" for op in flat.walk()) <= text.count("tt.store")


EARLY = """k(%p: i32, %n: i32) {
    %3 = arith.constant 3 : i32
    %5 = arith.constant 5 : i32
    %0 = arith.cmpi slt, %n, %3 : i32
    cf.cond_br %0, ^bb1, ^bb2
  ^bb1:
    tt.return
  ^bb2:
    %1 = arith.cmpi eq, %p, %3 : i32
    cf.cond_br %1, ^bb3, ^bb5
  ^bb3:
    tt.store %p, %3 : i32
    %2 = arith.cmpi eq, %n, %5 : i32
    cf.cond_br %2, ^bb1, ^bb4
  ^bb4:
    tt.store %p, %n : i32
    cf.br ^bb5
  ^bb5:
    tt.store %n, %n : i32
    tt.return"""


def test_early_return():
    """A return at the top makes the rest an else; one inside an if makes a flag for what follows the if."""
    flat = same_behaviour(module(EARLY), "k", [[p, n] for p in range(6) for n in range(8)])
    outer = flat.blocks[0].ops[-2]
    assert [op.name for op in flat.blocks[0].ops[-2:]] == ["scf.if", "tt.return"]
    assert outer.results == []
    assert [op.name for op in outer.regions[0][0].ops] == ["scf.yield"]
    assert [op.name for op in outer.regions[1][0].ops] == ["arith.cmpi", "scf.if", "scf.if", "scf.yield"]
    inner, rest = outer.regions[1][0].ops[1:3]
    assert [v.element for v in inner.results] == ["i1"]
    assert rest.operands == inner.results


def test_branches_backwards():
    """Loops made of branches are refused."""
    text = module("k(%c: i1) {\n cf.br ^bb1\n ^bb1:\n cf.cond_br %c, ^bb1, ^bb2\n ^bb2:\n tt.return")
    with pytest.raises(UnsupportedError, match="backwards"):
        structure(parse(text)["k"])


CALLEE = """g(%x: i32, %n: i32) -> (i32, i32) {
    %3 = arith.constant 3 : i32
    %0 = arith.cmpi eq, %n, %3 : i32
    cf.cond_br %0, ^bb1, ^bb2
  ^bb1:
    tt.return %x, %n : i32, i32
  ^bb2:
    tt.store %x, %n : i32
    %1 = arith.addi %x, %n : i32
    tt.return %1, %x : i32, i32"""

CALLER = """k(%x: i32, %n: i32) -> i32 {
    %0 = arith.constant 0 : i32
    %1 = arith.constant 1 : i32
    %2:2 = scf.for %i = %0 to %n step %1 iter_args(%a = %x, %b = %n) -> (i32, i32)  : i32 {
      %3:2 = tt.call @g(%a, %i) : (i32, i32) -> (i32, i32)
      %4:2 = tt.call @h(%3#0, %3#1) : (i32, i32) -> (i32, i32)
      scf.yield %4#1, %4#0 : i32, i32
    }
    %5:2 = tt.call @g(%2#0, %2#1) : (i32, i32) -> (i32, i32)
    %6 = arith.addi %5#0, %5#1 : i32
    tt.return %6 : i32"""

BETWEEN = """h(%x: i32, %n: i32) -> (i32, i32) {
    tt.store %n, %x : i32
    %0:2 = tt.call @g(%n, %x) : (i32, i32) -> (i32, i32)
    tt.return %n, %0#1 : i32, i32"""


def test_calls():
    """Calls in loops and of functions that call others become copies of the code, each with values of its own."""
    text = module(CALLER, CALLEE, BETWEEN)
    flat = same_behaviour(text, "k", [[x, n] for x in range(-2, 3) for n in range(6)])
    assert sum(op.name == "arith.cmpi" for op in flat.walk()) == 3


def test_caller_with_branches():
    """A function may have both calls and branches."""
    caller = (
        "k(%x: i32, %n: i32) -> i32 {\n"
        "%0:2 = tt.call @g(%x, %n) : (i32, i32) -> (i32, i32)\n"
        "%1 = arith.cmpi slt, %0#0, %n : i32\n"
        "cf.cond_br %1, ^bb1, ^bb2(%0#1 : i32)\n"
        "^bb1:\n"
        "%2:2 = tt.call @g(%0#1, %x) : (i32, i32) -> (i32, i32)\n"
        "cf.br ^bb2(%2#0 : i32)\n"
        "^bb2(%y: i32):\n"
        "tt.return %y : i32"
    )
    same_behaviour(module(caller, CALLEE), "k", [[x, n] for x in range(6) for n in range(6)])


@pytest.mark.parametrize("name", ["f", "missing"])
def test_calls_without_end(name):
    """Recursion and undefined functions are refused."""
    text = module(f"f() {{\n tt.call @{name}() : () -> ()\n tt.return")
    with pytest.raises(UnsupportedError, match=name):
        inline_calls(parse(text), "f")


def test_clone_blocks():
    """Copies have blocks and values of their own, and share what comes from outside."""
    original = parse(module(CALLEE))["g"]
    n = original.args[1]
    mapping = {}
    copies = clone_blocks(original.blocks, mapping)
    assert [op.name for block in copies for op in block.ops] == [op.name for op in original.walk()]
    assert copies[0].terminator.successors[1][0] is copies[2]
    assert copies[0].args == [mapping[arg] for arg in original.args]
    assert mapping[n] in copies[0].ops[1].operands
    inner = clone_blocks(original.blocks[2:], {})
    assert inner[0].ops[0].operands == original.args
    assert inner[0].terminator.operands[0] is inner[0].ops[1].result


@triton.jit(noinline=True)
def early(p, x, n):
    if n == 3:
        return x
    if x > 2:
        tl.store(p, x)
        if n == 4:
            return x + 1
        tl.store(p + 1, n)
    return x + n


@triton.jit
def pick(a, b):
    if a > b:
        return a
    return b * 2


@triton.jit
def calling_kernel(X, n):
    if tl.program_id(0) > n:
        return
    x = tl.load(X).to(tl.int32)
    for k in range(n):
        x = early(X, x, k)
    i = tl.arange(0, 16)
    tl.store(X + i, tl.map_elementwise(pick, i, i + x))
    tl.store(X + i, tl.cumsum(tl.sort(i), 0))


def test_kernel():
    """A kernel as the front end leaves it, with early returns in a function called in a loop and in a mapped one."""
    functions = kernel_functions(calling_kernel, {"X": "*i32", "n": "i32"})
    lines = {op.line for function in functions.values() for op in function.walk()}
    flat = inline_calls(functions, "calling_kernel")
    check_flat(flat)
    assert flat is functions["calling_kernel"]
    assert {op.line for op in flat.walk()} <= lines | {""}
    (mapped,) = [op for op in flat.walk() if op.name == "tt.map_elementwise"]
    assert [op.name for op in mapped.body.ops][-2:] == ["scf.if", "tt.map_elementwise.return"]
    assert re.search(r"test_inline\.py:\d+$", mapped.line)
