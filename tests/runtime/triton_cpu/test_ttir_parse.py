"""What the TTIR reader makes of the text that Triton's own front end prints, and of hand-written text."""

import inspect
import math
import re
import struct
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl
from triton._C.libtriton import ir, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice

from graphwright.runtime.triton_cpu.errors import TtirSyntaxError
from graphwright.runtime.triton_cpu.ttir import Type
from graphwright.runtime.triton_cpu.ttir_parse import parse
from graphwright.runtime.triton_cpu.ttir_text import Locations, float_from_bits, parse_number, parse_type

OPTIONS = SimpleNamespace(
    num_warps=4,
    num_ctas=1,
    debug=True,
    sanitize_overflow=False,
    enable_fp_fusion=True,
    supported_fp8_dtypes=("fp8e5", "fp8e4nv"),
    deprecated_fp8_dot_operand_dtypes=(),
    default_dot_input_precision="tf32",
    allowed_dot_input_precisions=("ieee", "tf32", "tf32x3"),
    max_num_imprecise_acc_default=0,
    backend_name="test",
    arch="",
    instrumentation_mode="",
    extern_libs=(),
)


def ttir(kernel, signature, *, simplify=True):
    """Return the text of a kernel's module with and without locations; constants are the ints in `signature`."""
    constants = {name: type_ for name, type_ in signature.items() if isinstance(type_, int)}
    types = {name: "constexpr" if name in constants else type_ for name, type_ in signature.items()}
    source = ASTSource(kernel, types, constants, {(0,): [["tt.divisibility", 16]]})
    context = ir.context()
    ir.load_dialects(context)
    functions = {"min_dot_size": lambda a, b: (1, 1, 1), "convert_custom_types": None}
    modules = {"triton.language.extra.libdevice": cuda_libdevice}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Block pointers are deprecated, and still have to work.
        module = source.make_ir(GPUTarget("test", 0, 32), OPTIONS, functions, modules, context)
    if simplify:
        manager = ir.pass_manager(context)
        manager.enable_debug()
        passes.common.add_inliner(manager)
        passes.ttir.add_rewrite_tensor_pointer(manager)
        passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
        passes.common.add_canonicalizer(manager)
        passes.ttir.add_combine(manager)
        passes.common.add_cse(manager)
        passes.ttir.add_loop_unroll(manager)
        manager.run(module, "ttir")
    return str(module), module.str_nodebug()


def function(text):
    """Parse a module whose first function is the one of interest."""
    parsed = next(iter(parse(text).values()))
    check_links(parsed)
    return parsed


def body(lines, arguments="%p: !tt.ptr<f32>, %n: i32, %x: f32, %t: tensor<4xf32>, %c: i1"):
    """Parse hand-written lines as the body of a function."""
    return function(f"module {{\n tt.func public @k({arguments}) {{\n{lines}\n tt.return\n }}\n}}\n")


def named(parsed, name):
    """Return the operations of a name."""
    return [op for op in parsed.walk() if op.name == name]


def check_links(parsed):
    """Check that uses, blocks, indices and positions agree with the operations."""
    values, uses, positions = [], Counter(), []

    def visit(block, parent):
        assert block.parent is parent
        for k, arg in enumerate(block.args):
            assert (arg.op, arg.index, arg.block) == (None, k, block)
        values.extend(block.args)
        for op in block.ops:
            assert op.block is block
            positions.append(op.position)
            for target, passed in op.successors:
                assert [v.type for v in passed] == [a.type for a in target.args]
            for value in [*op.operands, *(v for _, passed in op.successors for v in passed)]:
                uses[value, op] += 1
            for k, value in enumerate(op.results):
                assert (value.op, value.index) == (op, k)
            values.extend(op.results)
            for region in op.regions:
                for inner in region:
                    visit(inner, op)

    for block in parsed.blocks:
        visit(block, None)
    assert positions == list(range(len(positions)))
    assert uses == Counter((value, user) for value in values for user in value.uses)
    assert all(value.type.element != "undefined" for value in values)


@triton.jit
def flash_attention_kernel(Q, K, V, O, S, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1) * S * D
    d = tl.arange(0, D)
    q = tl.load(Q + head + rows[:, None] * D + d[None, :], mask=rows[:, None] < S, other=0.0)
    m = tl.full([M], -1e30, tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for n in range(0, S, N):
        columns = n + tl.arange(0, N)
        k = tl.load(K + head + columns[:, None] * D + d[None, :], mask=columns[:, None] < S, other=0.0)
        s = tl.where(columns[None, :] < S, tl.dot(q, tl.trans(k)) * scale, -1e30)
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - new[:, None])
        alpha = tl.exp(m - new)
        l = l * alpha + tl.sum(p, 1)
        v = tl.load(V + head + columns[:, None] * D + d[None, :], mask=columns[:, None] < S, other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(tl.float16), v)
        m = new
    tl.store(O + head + rows[:, None] * D + d[None, :], acc / l[:, None], mask=rows[:, None] < S)


@triton.jit
def memory_kernel(X, Y, M, n, B: tl.constexpr):
    o = tl.program_id(1) * B + tl.arange(0, B)
    a = tl.load(X + o)
    b = tl.load(X + o, mask=o < n)
    c = tl.load(X + o, mask=o < n, other=float("-inf"), cache_modifier=".ca", eviction_policy="evict_first")
    d = tl.load(X + tl.num_programs(2), volatile=True)
    e = tl.load(M + o)
    tl.store(Y + o, a + b + c + d, mask=e, cache_modifier=".wb", eviction_policy="evict_last")
    tl.store(Y, d)


@triton.jit
def atomic_kernel(X, I, U, n, B: tl.constexpr):
    o = tl.arange(0, B)
    i = tl.load(I + o)
    tl.atomic_add(X + o, 1.0, mask=o < n)
    tl.atomic_add(X, 1.0, sem="relaxed", scope="cta")
    tl.atomic_max(I + o, i)
    tl.atomic_min(U + o, tl.load(U + o))
    tl.atomic_xchg(I + o, i, sem="acquire", scope="sys")
    tl.store(I + o, tl.atomic_cas(I + o, i, o, sem="release"))


@triton.jit
def keep_larger(a, i, b, j):
    larger = a > b
    return tl.where(larger, a, b), tl.where(larger, i, j)


@triton.jit
def reduction_kernel(X, I, Y, B: tl.constexpr):
    i = tl.arange(0, B)
    o = i[:, None] * B + i[None, :]
    x = tl.load(X + o)
    k = tl.load(I + o)
    value, index = tl.reduce((x, k), 1, keep_larger)
    tl.store(Y + i, value)
    tl.store(I + i, index)
    scanned, _ = tl.associative_scan((x, k), 1, keep_larger, reverse=True)
    tl.store(Y + o, scanned + tl.cumsum(x, 0))
    tl.store(Y + o, tl.sort(x) + tl.gather(x, k, 1) + tl.flip(x, 1))
    tl.store(I + i, tl.argmax(k, 0) + tl.histogram(tl.reshape(k, (B * B,)), B))


@triton.jit
def shape_kernel(X, I, Y, B: tl.constexpr):
    i = tl.arange(0, B)
    o = i[:, None] * B + i[None, :]
    x = tl.load(X + o)
    joined = tl.join(x, x + 1)
    a, b = tl.split(joined)
    tl.store(Y + i, tl.sum(tl.sum(tl.permute(joined, (2, 0, 1)), 0), 1))
    tl.store(Y + o, tl.trans(a) - b)
    tl.store(I + tl.arange(0, 2 * B), tl.cat(i, i, can_reorder=True) + tl.interleave(i, i))
    tl.store(Y + tl.arange(0, B * B), tl.reshape(x, (B * B,), can_reorder=True))
    tl.store(Y, tl.max(tl.load(X + tl.arange(0, 1)), 0))


@triton.jit
def arithmetic_kernel(X, I, U, H, Q, b, c, d, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    k = tl.load(I + i)
    u = tl.load(U + i)
    tl.store(X + i, tl.clamp(x, -1.0, 2.0) + tl.clamp(x, -1.0, 2.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(X + i, tl.exp(x) + tl.erf(x) + tl.rsqrt(x) + tl.fma(x, x, x) + tl.sqrt_rn(x) + tl.div_rn(x, x) + x % 2.0)
    tl.store(I + i, tl.umulhi(k, k) + k // 3 + k % 5 + (k << 2) + (k >> 1) + (k < 3) + (x >= 1) + (u < c))
    tl.store(H + i, x.to(tl.float16, fp_downcast_rounding="rtz"))
    tl.store(Q + i, x.to(tl.float8e5).to(tl.int8, bitcast=True))
    tl.store(I + i, x.to(tl.int32, bitcast=True) + tl.load(Q + i))
    tl.store(I + i, X.to(tl.int64).to(tl.int32))
    tl.store(b.to(tl.pointer_type(tl.int32)), 1)
    tl.store(X + i, tl.where(d, x, float("nan")))
    tl.store(U + i, tl.randint(c, i))
    tl.store(X + i, tl.randn(c, i))
    tl.assume(b > 0)
    tl.debug_barrier()


@triton.jit
def text_kernel(X, I, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.device_print('x "q" {a} -> b : c, d}// \\', tl.load(X + i), tl.load(I + i))
    tl.device_print("loc(#loc1)", n, hex=True)
    tl.device_print("nothing")
    tl.device_assert(tl.load(I + i) > 0, 'more "than" {0} -> : loc(#loc1)')
    tl.store(
        I + i,
        tl.inline_asm_elementwise('add $0, $1, $2; // "{x}" -> ', "=r,r,r", [i, i], dtype=tl.int32, is_pure=True, pack=1),
    )
    tl.store(X + i, libdevice.tanh(tl.load(X + i)))


@triton.jit
def map_function(a, b):
    if a > b:
        return a * 2, b
    return b, a + 1


@triton.jit
def map_kernel(X, Y, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    a, b = tl.map_elementwise(map_function, x, x + 1)
    tl.store(Y + i, a + b)


@triton.jit
def control_kernel(X, I, n, m, u, B: tl.constexpr):
    i = tl.arange(0, B)
    acc = tl.zeros((B,), tl.float32)
    t = 0
    for k in range(n):
        acc += tl.load(X + k * B + i)
        t += k
    for k in range(0, m, 4):
        acc += k.to(tl.float32)
    for k in tl.range(0, u):
        acc += tl.load(X + k)
    for _ in tl.range(0, n, 2, num_stages=3, disallow_acc_multi_buffer=True):
        acc *= 2
    for k in tl.range(0, n, 2, flatten=True, disable_licm=True):
        tl.store(X + k, 1.0)
    while t < n:
        t += 1
        if t == 7:
            acc += tl.load(X + i)
    if n == 4:
        tl.store(X + i, acc)
    elif n > 2:
        acc *= 3
    tl.store(X + i, acc)
    tl.store(I, t)


@triton.jit
def early_return_kernel(X, n, B: tl.constexpr):
    if tl.program_id(0) >= n:
        return
    if n == 3:
        tl.store(X, 1.0)
        if n == 5:
            return
    tl.store(X + tl.arange(0, B), 1.0)


@triton.jit(noinline=True)
def two_results(p, x, n):
    if n == 3:
        return x, n
    tl.store(p, x)
    return x + 2, n + 2


@triton.jit
def call_kernel(X, n, B: tl.constexpr):
    x = tl.load(X)
    for k in range(n):
        x, m = two_results(X, x, k)
        tl.store(X + m, x)
    tl.store(X + tl.arange(0, B), x)


@triton.jit
def block_pointer_kernel(X, n, m, s, B: tl.constexpr):
    p = tl.make_block_ptr(X, (n, m), (s, 1), (0, 0), (B, B), (1, 0))
    for _ in range(n):
        x = tl.load(p, boundary_check=(0, 1), padding_option="nan") + tl.load(p)
        tl.store(p, x, boundary_check=(0,))
        p = tl.advance(p, (B, 0))


@triton.jit
def descriptor_kernel(X, I, n, m, s, B: tl.constexpr):
    d = tl.make_tensor_descriptor(X, [n, m], [s, 1], [B, B])
    d.store([n, 0], d.load([0, 3]))
    rows = tl.make_tensor_descriptor(X, [n, m], [s, 1], [1, B], padding_option="nan")
    picked = rows.gather(tl.load(I + tl.arange(0, 32)), 3)
    rows.scatter(picked, tl.load(I + tl.arange(0, 32)), 0)


@triton.jit
def dot_kernel(X, Y, F, S, B: tl.constexpr):
    i = tl.arange(0, B)
    o = i[:, None] * B + i[None, :]
    y = tl.load(Y + o)
    f = tl.load(F + o)
    s = tl.load(S + i[:, None] * (B // 32) + tl.arange(0, B // 32)[None, :])
    a = tl.dot(tl.load(X + o), tl.load(X + o))
    a = tl.dot(y, y, a, input_precision="ieee")
    a = tl.dot(f, f, a, max_num_imprecise_acc=32)
    a = tl.dot_scaled(f, s, "e5m2", f, None, "e5m2", acc=a, fast_math=True)
    tl.store(Y + o, a)


@triton.jit
def pointer_kernel(P, X, B: tl.constexpr):
    i = tl.arange(0, B)
    pointers = P.to(tl.pointer_type(tl.pointer_type(tl.float16)), bitcast=True)
    tl.store(tl.load(pointers + i), 1.0)
    tl.store(tl.load(pointers), 1.0)
    current = X
    while tl.load(current) > 0:
        current += 1
    tl.store(tl.where(i > 3, current + i, X + i), 2.0)


SIGNATURES = {
    flash_attention_kernel: {
        "Q": "*fp16", "K": "*fp16", "V": "*fp16", "O": "*fp16", "S": "i32", "scale": "fp32", "D": 64, "M": 64, "N": 64
    },
    memory_kernel: {"X": "*fp32", "Y": "*fp32", "M": "*i1", "n": "i32", "B": 64},
    atomic_kernel: {"X": "*fp32", "I": "*i32", "U": "*u32", "n": "i32", "B": 64},
    reduction_kernel: {"X": "*fp32", "I": "*i32", "Y": "*fp32", "B": 16},
    shape_kernel: {"X": "*fp32", "I": "*i32", "Y": "*fp32", "B": 64},
    arithmetic_kernel: {
        "X": "*fp32", "I": "*i32", "U": "*u32", "H": "*fp16", "Q": "*i8", "b": "i64", "c": "u32", "d": "i1", "B": 64
    },
    text_kernel: {"X": "*fp32", "I": "*i32", "n": "i32", "B": 64},
    map_kernel: {"X": "*fp32", "Y": "*fp32", "B": 64},
    control_kernel: {"X": "*fp32", "I": "*i32", "n": "i32", "m": "i64", "u": "u32", "B": 64},
    early_return_kernel: {"X": "*fp32", "n": "i32", "B": 64},
    call_kernel: {"X": "*fp32", "n": "i32", "B": 64},
    block_pointer_kernel: {"X": "*fp16", "n": "i32", "m": "i32", "s": "i64", "B": 64},
    descriptor_kernel: {"X": "*fp16", "I": "*i32", "n": "i32", "m": "i32", "s": "i64", "B": 64},
    dot_kernel: {"X": "*fp16", "Y": "*fp32", "F": "*fp8e5", "S": "*u8", "B": 64},
    pointer_kernel: {"P": "*i64", "X": "*fp32", "B": 64},
}  # fmt: skip


def kernel_ttir(kernel, *, simplify=True):
    """Return the text of one of the kernels above."""
    return ttir(kernel, SIGNATURES[kernel], simplify=simplify)


@pytest.mark.parametrize("simplify", [False, True], ids=["front end", "passes"])
@pytest.mark.parametrize("kernel", SIGNATURES, ids=lambda kernel: kernel.__name__)
def test_kernels(kernel, simplify):
    """Every line of a real module becomes an operation, with links that agree, and locations change nothing else."""
    with_locations, without = kernel_ttir(kernel, simplify=simplify)
    left, right = parse(with_locations), parse(without)
    assert list(left) == list(right)
    for name in left:
        check_links(left[name])
        a, b = list(left[name].walk()), list(right[name].walk())
        assert [(op.name, op.attrs, [v.type for v in op.results]) for op in a if op.attrs] == [
            (op.name, op.attrs, [v.type for v in op.results]) for op in b if op.attrs
        ]
        assert [op.name for op in a] == [op.name for op in b]
        assert [[v.type for v in op.operands] for op in a] == [[v.type for v in op.operands] for op in b]
        assert not any(op.line for op in b)
    printed = Counter(re.findall(r'^ +(?:%.* = )?"?([a-z]+\.[\w.]+)', without, re.MULTILINE))
    parsed = Counter(op.name for each in right.values() for op in each.walk())
    parsed["tt.func"] = len(right)
    parsed["scf.yield"] = printed["scf.yield"]
    assert parsed == printed


@pytest.mark.parametrize("kernel", SIGNATURES, ids=lambda kernel: kernel.__name__)
def test_printed_operand_types(kernel):
    """The types that operations print for their operands are those of the values that define them."""
    text = kernel_ttir(kernel)[1]
    operands = {name: [] for name in ("scf.yield", "tt.reduce.return", "tt.return", "tt.broadcast", "tt.splat", "tt.addptr")}
    for parsed in parse(text).values():
        for op in parsed.walk():
            if op.name in operands and op.operands:
                operands[op.name].append(", ".join(str(v.type) for v in op.operands))
    for name, types in operands.items():
        assert types == re.findall(rf"^ +(?:%.* = )?{name} .* : (.*?)(?: -> .*)?$", text, re.MULTILINE)
    assert any(operands.values())


def test_lines():
    """Operations carry the line of the source that they come from."""
    text = kernel_ttir(flash_attention_kernel)[0]
    source, first = inspect.getsourcelines(flash_attention_kernel.fn)
    for name, code in (("tt.get_program_id", "rows ="), ("math.exp", "p ="), ("tt.store", "tl.store"), ("scf.for", "for")):
        line = first + next(k for k, line in enumerate(source) if line.strip().startswith(code))
        assert f"{__file__}:{line}" in [op.line for op in named(function(text), name)]
    assert all("standard.py:" in op.line for op in named(function(text), "tt.reduce"))


def test_functions():
    """Functions keep their visibility, the attributes of arguments and the types of results."""
    functions = parse(kernel_ttir(call_kernel, simplify=False)[1])
    kernel, callee = functions.values()
    assert (kernel.name, kernel.is_public, kernel.result_types) == ("call_kernel", True, [])
    assert kernel.arg_attrs == [{"tt.divisibility": 16}, {}]
    assert [arg.type for arg in kernel.args] == [Type((), "ptr", "f32"), Type((), "i32")]
    assert not callee.is_public
    assert callee.result_types == [Type((), "f32"), Type((), "i32")]
    (call,) = named(kernel, "tt.call")
    assert call.attrs == {"callee": callee.name}
    assert [v.name for v in call.results] == [call.results[0].name[:-1] + "0", call.results[0].name[:-1] + "1"]
    assert [v.type for v in call.results] == callee.result_types
    assert call.block.parent.name == "scf.for"


def test_memory():
    """Loads and stores have their modifiers as attributes, and the type of what they load."""
    parsed = function(kernel_ttir(memory_kernel)[1])
    loads = named(parsed, "tt.load")
    plain = {"volatile": False, "cache": "none", "evict": "evict_normal"}
    assert [op.attrs for op in loads] == [
        plain,
        plain,
        {"volatile": False, "cache": "ca", "evict": "evict_first"},
        {"volatile": True, "cache": "none", "evict": "evict_normal"},
        plain,
    ]
    assert [len(op.operands) for op in loads] == [1, 2, 3, 1, 1]
    assert [str(op.result.type) for op in loads] == ["tensor<64xf32>"] * 3 + ["f32", "tensor<64xi8>"]
    assert [op.attrs for op in named(parsed, "tt.store")] == [
        {"cache": "wb", "evict": "evict_last"},
        {"cache": "none", "evict": "evict_normal"},
    ]
    assert named(parsed, "tt.get_program_id")[0].attrs == {"axis": 1}
    assert named(parsed, "tt.get_num_programs")[0].attrs == {"axis": 2}
    assert named(parsed, "tt.make_range")[0].attrs == {"start": 0, "end": 64}


def test_block_pointers():
    """Block pointers keep the tensor type they point to, with the checked dimensions as lists."""
    parsed = function(kernel_ttir(block_pointer_kernel, simplify=False)[1])
    (make,) = named(parsed, "tt.make_tensor_ptr")
    assert make.attrs == {"order": [1, 0]}
    assert len(make.operands) == 7
    assert make.result.type == Type((), "ptr", "tensor<64x64xf16>")
    checked, plain = named(parsed, "tt.load")
    assert checked.attrs["boundary_check"] == [0, 1]
    assert checked.attrs["padding"] == 2
    assert "boundary_check" not in plain.attrs
    assert plain.result.type == Type((64, 64), "f16")
    assert named(parsed, "tt.advance")[0].result.type == make.result.type


def test_descriptors():
    """Tensor descriptors are of element type "tensordesc"."""
    parsed = function(kernel_ttir(descriptor_kernel, simplify=False)[1])
    make = named(parsed, "tt.make_tensor_descriptor")[0]
    assert make.result.type == Type((), "tensordesc", "tensor<64x64xf16>")
    assert [v.type.element for v in make.operands] == ["ptr", "i32", "i32", "i64", "i64"]
    assert named(parsed, "tt.descriptor_load")[0].result.type == Type((64, 64), "f16")
    assert named(parsed, "tt.descriptor_gather")[0].result.type == Type((32, 64), "f16")


def test_atomics():
    """Atomics have kind, order and scope; a mask is always there."""
    parsed = function(kernel_ttir(atomic_kernel)[1])
    assert [tuple(op.attrs.values()) for op in named(parsed, "tt.atomic_rmw")] == [
        ("fadd", "acq_rel", "gpu"),
        ("fadd", "relaxed", "cta"),
        ("max", "acq_rel", "gpu"),
        ("umin", "acq_rel", "gpu"),
        ("exch", "acquire", "sys"),
    ]
    assert list(named(parsed, "tt.atomic_rmw")[0].attrs) == ["kind", "sem", "scope"]
    (cas,) = named(parsed, "tt.atomic_cas")
    assert cas.attrs == {"sem": "release", "scope": "gpu"}
    assert cas.result.type == Type((64,), "i32")


def test_reductions():
    """Reductions and scans of several operands have an axis, a region and a result per operand."""
    parsed = function(kernel_ttir(reduction_kernel)[1])
    reduce = named(parsed, "tt.reduce")[0]
    assert reduce.attrs == {"axis": 1}
    assert [str(v.type) for v in reduce.results] == ["tensor<16xf32>", "tensor<16xi32>"]
    assert [str(v.type) for v in reduce.body.args] == ["f32", "i32", "f32", "i32"]
    assert reduce.body.terminator.name == "tt.reduce.return"
    assert reduce.body.parent is reduce
    assert {op.attrs["reverse"] for op in named(parsed, "tt.scan")} == {True, False}
    assert named(parsed, "tt.gather")[0].attrs == {"axis": 1}
    assert named(parsed, "tt.histogram")[0].result.type == Type((16,), "i32")


def test_shapes():
    """Operations that change shapes have the shape they print."""
    parsed = function(kernel_ttir(shape_kernel)[1])
    assert [op.attrs["order"] for op in named(parsed, "tt.trans")] == [[2, 0, 1], [1, 0]]
    (split,) = named(parsed, "tt.split")
    assert [v.shape for v in split.results] == [(64, 64), (64, 64)]
    assert {op.attrs["axis"] for op in named(parsed, "tt.expand_dims")} == {0, 1}
    assert any(op.attrs == {"allow_reorder": True} for op in named(parsed, "tt.reshape"))
    assert body("%a = tt.unsplat %t : tensor<4xf32>").blocks[0].ops[0].result.type == Type((), "f32")


def test_arithmetic():
    """Operations with words or attributes of their own have them by name."""
    parsed = function(kernel_ttir(arithmetic_kernel)[1])
    assert [op.attrs for op in named(parsed, "tt.clampf")] == [{"propagate_nan": "none"}, {"propagate_nan": "all"}]
    assert {op.attrs["predicate"] for op in named(parsed, "arith.cmpi")} >= {"slt", "ult", "sgt"}
    assert all(op.result.element == "i1" for op in named(parsed, "arith.cmpi") + named(parsed, "arith.cmpf"))
    assert [op.attrs for op in named(parsed, "tt.fp_to_fp")] == [{"rounding": "rtz"}, {"rounding": "rtne"}]
    assert named(parsed, "tt.bitcast")[0].result.type == Type((64,), "i8")
    assert named(parsed, "tt.ptr_to_int")[0].result.type == Type((), "i64")
    assert named(parsed, "tt.int_to_ptr")[0].result.type == Type((), "ptr", "i32")
    assert named(parsed, "llvm.intr.assume")
    constants = [op.attrs["value"] for op in named(parsed, "arith.constant")]
    assert any(isinstance(v, float) and math.isnan(v) for v in constants)


def test_text():
    """Strings may hold anything."""
    parsed = function(kernel_ttir(text_kernel)[0])
    values, number, nothing = named(parsed, "tt.print")
    assert values.attrs == {"prefix": ' x "q" {a} -> b : c, d}// \\: ', "hex": False, "is_signed": [0, 1]}
    assert len(values.operands) == 2
    assert number.attrs == {"prefix": " loc(#loc1): ", "hex": True, "is_signed": [1]}
    assert nothing.attrs["prefix"] == " nothing"
    assert nothing.attrs["is_signed"] == nothing.operands == []
    assert named(parsed, "tt.assert")[0].attrs == {"message": 'more "than" {0} -> : loc(#loc1)'}
    (asm,) = named(parsed, "tt.elementwise_inline_asm")
    assert asm.attrs == {
        "asm_string": 'add $0, $1, $2; // "{x}" -> ',
        "constraints": "=r,r,r",
        "packed_element": 1,
        "pure": True,
    }
    (extern,) = named(parsed, "tt.extern_elementwise")
    assert extern.attrs == {"libname": "", "libpath": "", "pure": True, "symbol": "__nv_tanhf"}
    assert all(op.line.startswith(__file__) for op in named(parsed, "tt.print"))


def test_dots():
    """Dots have their precision, and scaled dots say which scales they have."""
    parsed = function(kernel_ttir(dot_kernel)[1])
    assert [op.attrs for op in named(parsed, "tt.dot")] == [
        {"precision": "tf32", "max_num_imprecise_acc": 0},
        {"precision": "ieee", "max_num_imprecise_acc": 0},
        {"precision": "tf32", "max_num_imprecise_acc": 32},
    ]
    (scaled,) = named(parsed, "tt.dot_scaled")
    assert scaled.attrs == {
        "has_lhs_scale": True,
        "has_rhs_scale": False,
        "lhs": "e5m2",
        "rhs": "e5m2",
        "fastMath": True,
    }
    assert len(scaled.operands) == 4
    assert scaled.result.type == Type((64, 64), "f32")


def test_loops():
    """Loops have bounds, initial values and a body with the induction variable first."""
    parsed = function(kernel_ttir(control_kernel)[1])
    loops = named(parsed, "scf.for")
    assert [loop.body.args[0].element for loop in loops] == ["i32", "i64", "i32", "i32", "i32"]
    assert not any(loop.attrs["unsigned"] for loop in loops)
    assert loops[3].attrs["tt.num_stages"] == 3
    assert loops[3].attrs["tt.disallow_acc_multi_buffer"] is True
    assert loops[4].attrs["tt.flatten"] is True
    for loop in loops:
        assert [v.type for v in loop.operands[3:]] == [v.type for v in loop.results]
        assert [v.type for v in loop.body.args[1:]] == [v.type for v in loop.results]
        assert [v.type for v in loop.body.terminator.operands] == [v.type for v in loop.results]
    (loop,) = named(parsed, "scf.while")
    before, after = (region[0] for region in loop.regions)
    assert before.terminator.name == "scf.condition"
    assert [v.type for v in before.terminator.operands[1:]] == [v.type for v in after.args]
    assert after.terminator.name == "scf.yield"


def test_branches():
    """Early returns make blocks with successors, whose arguments count as uses."""
    parsed = function(kernel_ttir(early_return_kernel)[1])
    assert len(parsed.blocks) > 2
    last = parsed.blocks[0].terminator
    assert last.name == "cf.cond_br"
    assert len(last.operands) == 1
    assert [target for target, _ in last.successors] == [parsed.blocks[1], parsed.blocks[2]]
    (loop,) = named(function(kernel_ttir(map_kernel)[1]), "tt.map_elementwise")
    assert len(loop.regions[0]) == 4
    last = loop.regions[0][-1]
    (branch,) = [op for op in loop.regions[0][1].ops if op.successors]
    assert branch.successors[0][0] is last
    assert branch.successors[0][1][0].uses == [branch]


def test_pointers_to_pointers():
    """What a pointer to pointers loads is a pointer."""
    parsed = function(kernel_ttir(pointer_kernel)[1])
    types = [op.result.type for op in named(parsed, "tt.load")]
    assert types == [Type((64,), "ptr", "f16"), Type((), "ptr", "f16"), Type((), "f32")]


@pytest.mark.parametrize(
    ("literal", "type_", "value"),
    [
        ("5", "i32", 5),
        ("-9223372036854775808", "i64", -(2**63)),
        ("-1", "index", -1),
        ("6.28318548", "f32", struct.unpack("<f", struct.pack("<f", 2 * math.pi))[0]),
        ("1.000000e-01", "f64", 0.1),
        ("9.99999935E-39", "f32", struct.unpack("<f", struct.pack("<f", 1e-38))[0]),
        ("6.550400e+04", "f16", 65504.0),
        ("1.000000e-01", "f16", 0.0999755859375),
        ("1.000000e-01", "bf16", 0.10009765625),
        ("3.389530e+38", "bf16", 3.3895313892515355e38),
        ("0x7F800000", "f32", math.inf),
        ("0xFF80", "bf16", -math.inf),
        ("0x7C00", "f16", math.inf),
        ("0xFFF0000000000000", "f64", -math.inf),
        ("dense<0.000000e+00>", "tensor<4x4xf32>", 0.0),
        ("dense<true>", "tensor<4xi1>", 1),
        ("dense<[1, -2, 3, 4]>", "tensor<4xi32>", [1, -2, 3, 4]),
        ("dense<[true, false]>", "tensor<2xi1>", [1, 0]),
        ("dense<[[1.5, 0x7F800000], [2.0, -1.0]]>", "tensor<2x2xf32>", [1.5, math.inf, 2.0, -1.0]),
        ('dense<"0x01000000FFFFFFFF">', "tensor<2xi32>", [1, -1]),
        ('dense<"0x003C00BC">', "tensor<2xf16>", [1.0, -1.0]),
        ("dense<9.375000e-02>", "tensor<4xf8E5M2>", 0.09375),
        ("dense<1.525879e-05>", "tensor<4xf8E5M2>", 2.0**-16),
        ("dense<0x7C>", "tensor<4xf8E5M2>", math.inf),
    ],
)
def test_constants(literal, type_, value):
    """Constants are exact for their type."""
    op = body(f"%c0 = arith.constant {literal} : {type_}").blocks[0].ops[0]
    assert op.attrs == {"value": value}
    assert type(op.attrs["value"]) is type(value)
    assert op.result.type == parse_type(type_)


@pytest.mark.parametrize(
    ("literal", "type_"),
    [("0x7FC00000", "f32"), ("0xFFC00001", "f32"), ("0x7FC0", "bf16"), ("0x7E00", "f16"), ("0x7F", "f8E4M3FN")],
)
def test_nan_constants(literal, type_):
    """Bit patterns of NaN are NaN."""
    assert math.isnan(parse_number(literal, type_))


def test_signed_zero():
    """The sign of zero is kept, in decimals and in bit patterns."""
    assert math.copysign(1, parse_number("-0.000000e+00", "f32")) == -1
    assert math.copysign(1, float_from_bits(0x8000, "bf16")) == -1
    assert math.copysign(1, float_from_bits(0x8000, "f16")) == -1


def test_bools_without_type():
    """`true` and `false` print no type."""
    first, second = body("%a = arith.constant true\n%b = arith.constant false").blocks[0].ops[:2]
    assert (first.attrs["value"], second.attrs["value"]) == (1, 0)
    assert first.result.type == Type((), "i1")


def test_flags():
    """Overflow and fast-math flags become lists; several results take the types printed for them."""
    parsed = body(
        "%a = arith.addi %n, %n overflow<nsw, nuw> : i32\n"
        "%b = arith.addf %x, %x fastmath<nnan,ninf> : f32\n"
        "%d = arith.shrui %n, %n exact : i32\n"
        "%e = arith.truncf %x to_nearest_even : f32 to f16\n"
        "%sum, %overflow = arith.addui_extended %n, %n : i32, i1\n"
        "%low, %high = arith.mulsi_extended %n, %n : i32\n"
        "%i = arith.index_cast %n : i32 to index"
    )
    a, b, d, e, extended, product, index = parsed.blocks[0].ops[:-1]
    assert a.attrs == {"overflow": ["nsw", "nuw"]}
    assert b.attrs == {"fastmath": ["nnan", "ninf"]}
    assert d.attrs == {"exact": True}
    assert e.attrs == {"rounding": "to_nearest_even"}
    assert [v.type.element for v in extended.results] == ["i32", "i1"]
    assert [v.type.element for v in product.results] == ["i32", "i32"]
    assert index.result.type == Type((), "index")


def test_select_with_scalar_condition():
    """A select has the type of its values, whatever the condition is."""
    a, b = (
        body(
            "%a = arith.select %c, %t, %t : tensor<4xf32>\n"
            "%m = arith.cmpf olt, %t, %t : tensor<4xf32>\n"
            "%b = arith.select %m, %t, %t : tensor<4xi1>, tensor<4xf32>"
        )
        .blocks[0]
        .ops[0:3:2]
    )
    assert a.result.type == b.result.type == Type((4,), "f32")


def test_regions():
    """Regions that yield nothing get the terminator that is not printed, and results refer to their operation."""
    parsed = body(
        "%l:2 = scf.for %i = %n to %n step %n iter_args(%a = %x, %b = %n) -> (f32, i32)  : i32 {\n"
        "  scf.yield %a, %i : f32, i32\n"
        "} {tt.num_stages = 2 : i32}\n"
        "scf.for unsigned %i = %l#1 to %n step %n : i32 {\n"
        "}\n"
        "scf.if %c {\n"
        "} else {\n"
        '  tt.assert %c, "" : i1\n'
        "} {here}\n"
        "%w = scf.while (%a = %n, %b = %x) : (i32, f32) -> f32 {\n"
        "  scf.condition(%c) %b : f32\n"
        "} do {\n"
        "^bb0(%b: f32):\n"
        "  scf.yield %n, %b : i32, f32\n"
        "} attributes {there = 1 : i32}"
    )
    first, second, choice, loop = parsed.blocks[0].ops[:-1]
    assert first.attrs == {"unsigned": False, "tt.num_stages": 2}
    assert [v.name for v in first.results] == ["%l#0", "%l#1"]
    assert second.attrs == {"unsigned": True}
    assert second.operands[0] is first.results[1]
    assert [op.name for op in second.body.ops] == ["scf.yield"]
    assert [[op.name for op in region[0].ops] for region in choice.regions] == [
        ["scf.yield"],
        ["tt.assert", "scf.yield"],
    ]
    assert choice.attrs == {"here": True}
    assert loop.attrs == {"there": 1}
    assert [v.type.element for v in loop.regions[0][0].args] == ["i32", "f32"]
    assert loop.result.type == Type((), "f32")


def test_blocks_out_of_order():
    """A block may use a value of a block that is printed after it."""
    parsed = body(
        "cf.br ^bb2\n"
        "^bb1(%y: f32):  // pred: ^bb2\n"
        "%b = arith.addf %y, %a : f32\n"
        "tt.return\n"
        "^bb2:  // pred: ^bb0\n"
        "%a = arith.addf %x, %x : f32\n"
        "cf.cond_br %c, ^bb1(%a : f32), ^bb3\n"
        "^bb3:  // pred: ^bb2"
    )
    add = parsed.blocks[1].ops[0]
    assert add.operands[1] is parsed.blocks[2].ops[0].result
    assert add.operands[1].type == Type((), "f32")
    assert len(add.operands[1].uses) == 2


def test_argument_types():
    """Address spaces are dropped, and attributes of arguments are kept."""
    parsed = body(
        "%a = tt.load %p : !tt.ptr<f32, 3>",
        '%p: !tt.ptr<f32, 3> {tt.divisibility = 16 : i32, "odd name" = "a}b"} loc("p"("f.py":1:2)), %q: !tt.ptr<i8>',
    )
    assert parsed.arg_attrs == [{"tt.divisibility": 16, "odd name": "a}b"}, {}]
    assert parsed.args[0].type == Type((), "ptr", "f32")
    assert parsed.blocks[0].ops[0].result.type == Type((), "f32")


def test_generic_operations():
    """An operation that is not known is read where its form says everything."""
    op = body('%a = new.op %x, [%n] {k = [1, 2], s = "}"} : (f32, i32) -> tensor<4xf32>').blocks[0].ops[0]
    assert (op.name, len(op.operands), op.attrs) == ("new.op", 2, {"k": [1, 2], "s": "}"})
    assert op.result.type == Type((4,), "f32")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%a = new.op %x : f32", "result type"),
        ("%a = new.op %x word : f32 -> f32", "unexpected word"),
        ("%a = arith.cmpi %n, %n : i32", "expected the predicate"),
        ("%a = arith.addi %undefined, %n : i32", "%undefined not defined"),
        ("%a = arith.constant dense<[1, 2]> : tensor<4xi32>", "2 elements"),
        ("%a = arith.constant 1.5 : i32", "literal of type i32"),
        ("%a = arith.constant dense<1> : vector<4xi32>", "not a type: vector<4xi32>"),
        ('%a = "tt.load"(%p) : (!tt.ptr<f32>) -> f32', "generic form"),
        ("%a:2 = arith.addi %n, %n : i32 -> i32", "1 result types for 2 results"),
        ("cf.br ^nowhere", "block"),
        ("scf.execute_region {", "not understood"),
        ("scf.if %c {", "does not end"),
        ("scf.if %c {\nscf.if %c {", "expected }"),
        ("scf.for %i = %n to %n step %n : i32 {\n} {", "not understood"),
        ("cf.br ^bb1\n^bb1:\ntt.print {", "not understood"),
        ("%a = arith.addi %n, %n : i32\n^bb1:", "does not end"),
        ("?", "expected an operation"),
    ],
)
def test_errors(line, message):
    """What is not understood is an error that shows the line."""
    with pytest.raises(TtirSyntaxError, match=r"line \d+: .*") as error:
        body(line)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("location", "line"),
    [
        ("loc(#loc)", "k.py:1"),
        ("loc(unknown)", ""),
        ('loc("a \\"b\\".py":3:4)', 'a "b".py:3'),
        ('loc("x"(#loc1))', "k.py:7"),
        ("loc(callsite(#loc1 at #loc))", "k.py:7"),
        ("loc(callsite(#loc2 at #loc))", "k.py:1"),
        ('loc(fused<"m">[#loc2, "z.py":5:6])', "z.py:5"),
        ('loc("x"("k.py":1:2 to 3:4))', "k.py:1"),
        ("loc(#loc9)", ""),
        ("loc(#loc3)", ""),
    ],
)
def test_locations(location, line):
    """A location is the first place that it names."""
    text = '#loc = loc("k.py":1:2)\n#loc1 = loc("y"("k.py":7:8))\n#loc2 = loc(unknown)\n#loc3 = loc("r"(#loc3))\n'
    assert Locations(text).line(location) == line
