# SPDX-License-Identifier: Apache-2.0
"""mma, ldmatrix, stmatrix, wgmma against the fragment layouts of the PTX ISA.

The layouts are written here as the ISA's tables give them, case by case, not as the machine does.
"""

import numpy as np
import pytest
from ptx_helpers import kernel

from softgpu.ptx.values import bf16_to_f32, f32_to_bf16, f32_to_tf32

pytestmark = pytest.mark.usefixtures("place")

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4  # groupID, threadID_in_group
RNG = np.random.default_rng(0)


def a_layout(shape, size, i):
    """(row, column) of element i of the A fragment, for every lane."""
    m, k = shape
    if size == 2:  # .f16 and .bf16
        row = np.where((i % 4 < 2) | (k == 8 and i < 2), G, G + 8)
        return row, T * 2 + (i & 1) + (8 if i >= 4 else 0)
    if size == 4:  # .tf32
        return np.where(i % 2 == 0, G, G + 8), T + (4 if i >= 2 else 0)
    if m == 8:  # .s8, m8n8k16
        return G, T * 4 + i
    if k == 16:
        return np.where(i < 4, G, G + 8), T * 4 + (i & 3)
    return np.where(i % 8 < 4, G, G + 8), T * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_layout(size, i):
    if size == 2:
        return T * 2 + (i & 1) + (8 if i >= 2 else 0), G
    if size == 4:
        return T + 4 * i, G
    return T * 4 + (i & 3) + (16 if i >= 4 else 0), G


def c_layout(i):
    return np.where(i < 2, G, G + 8), T * 2 + (i & 1)


def random(kind, shape):
    """(storage, values)."""
    if kind in ("s8", "u8"):
        info = np.iinfo(np.int8 if kind == "s8" else np.uint8)
        x = RNG.integers(info.min, info.max, shape, info.dtype, endpoint=True)
        return x, x.astype(np.float64)
    x = RNG.standard_normal(shape).astype(np.float32)
    if kind == "f16":
        return x.astype(np.float16), x.astype(np.float16).astype(np.float64)
    if kind == "bf16":
        bits = f32_to_bf16(x)
        return bits, bf16_to_f32(bits).astype(np.float64)
    return x, f32_to_tf32(x, "rz").astype(np.float64)


def fragments(matrix, layout, count):
    """[32, registers] of 32 bits: what each lane holds."""
    elements = np.stack([matrix[layout(i)] for i in range(count)], axis=1)
    return np.ascontiguousarray(elements).view(np.uint32)


MMA = [
    *[(16, k, "f32", t, "f32") for k in (8, 16) for t in ("f16", "bf16")],
    (16, 16, "f16", "f16", "f16"),
    (16, 4, "f32", "tf32", "f32"),
    (16, 8, "f32", "tf32", "f32"),
    (8, 16, "s32", "s8", "s32"),
    (16, 16, "s32", "u8", "s32"),
    (16, 32, "s32", "s8", "s32"),
]


@pytest.mark.parametrize("case", MMA, ids=lambda c: f"m{c[0]}n8k{c[1]}-{c[3]}-{c[4]}")
def test_mma(case):
    m, k, d_type, kind, c_type = case
    size = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}[kind]
    (a, a_values), (b, b_values) = random(kind, (m, k)), random(kind, (k, 8))
    c_dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[d_type]
    c = (RNG.standard_normal((m, 8)) * 4).astype(c_dtype)
    fa = fragments(a, lambda i: a_layout((m, k), size, i), m * k // 32)
    fb = fragments(b, lambda i: b_layout(size, i), k * 8 // 32)
    fc = fragments(c, c_layout, m * 8 // 32)
    out = np.zeros_like(fc)
    na, nb, nc = fa.shape[1], fb.shape[1], fc.shape[1]

    def registers(first, n):
        return [f"%r{first + i}" for i in range(n)]

    load = ""
    for pointer, first, n in ((1, 10, na), (2, 20, nb), (3, 30, nc)):
        load += f"mad.wide.u32 %rd10, %r0, {4 * n}, %rd{pointer};"
        for i, r in enumerate(registers(first, n)):
            load += f"ld.global.b32 {r}, [%rd10+{4 * i}];"
    store = f"mad.wide.u32 %rd10, %r0, {4 * nc}, %rd0;"
    store += "".join(
        f"st.global.b32 [%rd10+{4 * i}], {r};" for i, r in enumerate(registers(30, nc))
    )
    d, ra, rb = (", ".join(registers(f, n)) for f, n in ((30, nc), (10, na), (20, nb)))
    opcode = f"mma.sync.aligned.m{m}n8k{k}.row.col.{d_type}.{kind}.{kind}.{c_type}"
    text = f"{load} {opcode} {{{d}}}, {{{ra}}}, {{{rb}}}, {{{d}}}; {store}"
    kernel(text, ("out", "a", "b", "c")).launch(1, 32, [out, fa, fb, fc])
    got = np.zeros((m, 8), c_dtype)
    elements = out.view(c_dtype)
    for i in range(m * 8 // 32):
        got[c_layout(i)] = elements[:, i]
    want = a_values @ b_values + c.astype(np.float64)
    tolerance = {"f32": 1e-5, "f16": 2e-2, "s32": 0}[d_type]
    np.testing.assert_allclose(got, want, atol=tolerance)


def test_integer_mma_saturates():
    text = """
    mov.b32 %r1, 0x7f7f7f7f; mov.b32 %r2, 0x7fffffff;
    mma.sync.aligned.m8n8k16.row.col.SAT.s32.s8.s8.s32 {%r3, %r4}, {%r1}, {%r1}, {%r2, %r2};
    mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.u32 [%rd10], %r3;
    """
    out = np.zeros(32, np.int32)
    kernel(text.replace("SAT", "satfinite")).launch(1, 32, [out])
    assert (out == (1 << 31) - 1).all()
    kernel(text.replace(".SAT", "")).launch(1, 32, [out])
    assert (out == np.int64((1 << 31) - 1 + 16 * 127 * 127 - (1 << 32))).all()


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transpose):
    x = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    out, back = np.zeros((32, count), np.uint32), np.zeros_like(x)
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    trans = ".trans" if transpose else ""
    text = f"""
    mov.u32 %r1, tile; shl.b32 %r2, %r0, 4; add.u32 %r3, %r1, %r2;
    setp.lt.u32 %p1, %r0, {8 * count};
    mad.wide.u32 %rd10, %r0, 16, %rd1;
    @%p1 ld.global.v2.u64 {{%rd11, %rd12}}, [%rd10];
    @%p1 st.shared.v2.u64 [%r3], {{%rd11, %rd12}};
    bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r3];
    mad.wide.u32 %rd10, %r0, {4 * count}, %rd0;
    """
    text += "".join(f"st.global.u32 [%rd10+{4 * i}], %r{10 + i};" for i in range(count))
    text += f"""
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r3+512], {{{registers}}};
    bar.warp.sync 0xffffffff;
    mad.wide.u32 %rd10, %r0, 16, %rd2;
    @%p1 ld.shared.v2.u64 {{%rd11, %rd12}}, [%r3+512];
    @%p1 st.global.v2.u64 [%rd10], {{%rd11, %rd12}};
    """
    body = kernel(text, ("out", "x", "back"), ".shared .align 16 .b8 tile[1024];")
    run = body.launch(1, 32, [out, x, back])
    for i in range(count):
        rows = x[i].T if transpose else x[i]
        pair = np.stack([rows[G, 2 * T], rows[G, 2 * T + 1]], axis=1)
        np.testing.assert_array_equal(np.ascontiguousarray(out[:, i]).view(np.uint16), pair.ravel())
    np.testing.assert_array_equal(back, x)
    if run is not None:
        assert run.counters.shared_wavefronts == {"load": 2 * count, "store": 2 * count}


def test_movmatrix_transposes():
    out = np.zeros(32, np.uint32)
    kernel(
        "shl.b32 %r1, %r0, 17; shl.b32 %r2, %r0, 1; add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, 65536;"
        "movmatrix.sync.aligned.m8n8.trans.b16 %r3, %r1;"
        "mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.u32 [%rd10], %r3;"
    ).launch(1, 32, [out])
    matrix = np.arange(64).reshape(8, 8)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), matrix.T)


# --- wgmma ------------------------------------------------------------------------------------


def place_operand(matrix, swizzle: int, mn_major: bool):
    """(bytes, leading and stride byte offsets): the operand [extent, k] in canonical order.

    K-major: rows of `swizzle` bytes (16 without), 8 rows an atom. MN-major: likewise for columns.
    """
    extent, k = matrix.shape
    size = matrix.itemsize
    width = max(swizzle, 16) // size  # elements in a row of an atom
    image = np.zeros(16384, np.uint8)
    if mn_major:
        atoms = -(-extent // width)
        lead, stride = (8 * width * size, 8 * width * size * atoms)
        if swizzle == 0:
            lead, stride = stride, lead
        for e in range(extent):
            for j in range(k):
                block, inner = divmod(e, width)
                at = (j % 8 * width + inner) * size + (
                    block * stride + j // 8 * lead
                    if swizzle == 0
                    else block * lead + j // 8 * stride
                )
                put(image, at, matrix[e, j], swizzle)
        return image, lead, stride
    stride = 8 * max(swizzle, 16)
    lead = stride * (extent // 8) if swizzle == 0 else 0
    for e in range(extent):
        for j in range(k):
            column, inner = divmod(j, width)
            at = e // 8 * stride + e % 8 * width * size + inner * size + column * lead
            put(image, at, matrix[e, j], swizzle)
    return image, lead, stride


def put(image, at, value, swizzle):
    """16-byte pieces are permuted within rows of the swizzle's width, by the row in the atom."""
    if swizzle:
        row = at // 128 % 8
        at ^= (row & (swizzle // 16 - 1)) << 4
    raw = np.frombuffer(value.tobytes(), np.uint8)
    image[at : at + len(raw)] = raw


WGMMA = [
    *[("f16", s, a, b) for s in (0, 32, 64, 128) for a in (0, 1) for b in (0, 1)],
    ("bf16", 128, 0, 1),
    ("f16 into f16", 128, 0, 0),
    ("tf32", 128, 0, 0),
    ("tf32", 0, 0, 0),
    ("s8", 64, 0, 0),
    ("u8", 32, 0, 0),
]


@pytest.mark.parametrize(
    "case", WGMMA, ids=lambda c: f"{c[0]}-swizzle{c[1]}-{'km'[c[2]]}{'km'[c[3]]}"
)
@pytest.mark.parametrize("n", [64, 24])
def test_wgmma(case, n):
    kind, swizzle, a_major, b_major = case
    kind, _, narrow = kind.partition(" into ")
    if b_major and swizzle and n * 2 % swizzle:
        pytest.skip("an MN-major operand is made of whole atoms")
    size = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}[kind]
    k = 32 // size
    (a, a_values), (b, b_values) = random(kind, (64, k)), random(kind, (n, k))
    image_a, lead_a, stride_a = place_operand(a, swizzle, a_major)
    image_b, lead_b, stride_b = place_operand(b, swizzle, b_major)
    integer = kind in ("s8", "u8")
    d_type = narrow or ("s32" if integer else "f32")
    registers = n // 4 if narrow else n // 2
    out = np.zeros((128, n // 2), {"s32": np.int32, "f32": np.float32, "f16": np.float16}[d_type])
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]

    def descriptor(register, offset, lead, stride):
        constant = mode << 62 | (stride >> 4) << 32 | (lead >> 4) << 16
        return (
            f"add.u32 %r4, %r1, {offset}; shr.u32 %r4, %r4, 4; cvt.u64.u32 {register}, %r4;"
            f"or.b64 {register}, {register}, 0x{constant:x};"
        )

    d = ", ".join(f"%r{32 + i}" for i in range(registers))
    options = "1" if integer else "1, 1, 1" + (f", {a_major}, {b_major}" if size == 2 else "")
    product = (
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d_type}.{kind}.{kind} {{{d}}}, %rd20, %rd21,"
        f"{options};"
    )
    text = f"""
    mov.u32 %r1, tile; mov.u32 %r2, 0;
    copy: mad.lo.u32 %r3, %r2, 128, %r0; shl.b32 %r3, %r3, 4; add.u32 %r4, %r1, %r3;
    cvt.u64.u32 %rd10, %r3; add.u64 %rd11, %rd1, %rd10;
    ld.global.v2.u64 {{%rd12, %rd13}}, [%rd11]; st.shared.v2.u64 [%r4], {{%rd12, %rd13}};
    add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 16; @%p1 bra copy;
    fence.proxy.async.shared::cta; bar.sync 0;
    {descriptor("%rd20", 0, lead_a, stride_a)} {descriptor("%rd21", 16384, lead_b, stride_b)}
    {"".join(f"mov.b32 %r{32 + i}, 0;" for i in range(registers))}
    wgmma.fence.sync.aligned;
    {product} {product}
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %rd10, %r0, {4 * registers}, %rd0;
    {"".join(f"st.global.b32 [%rd10+{4 * i}], %r{32 + i};" for i in range(registers))}
    """
    body = kernel(text, ("out", "x"), ".shared .align 1024 .b8 tile[32768];")
    body.launch(1, 128, [out, np.concatenate([image_a, image_b])])
    got = np.zeros((64, n), out.dtype)
    thread = np.arange(128)
    for i in range(n // 2):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
        got[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2] = out[:, i]
    want = 2 * (a_values @ b_values.T)
    np.testing.assert_allclose(got, want, atol=0 if integer else 3e-2 if narrow else 2e-5)


def test_wgmma_with_a_in_registers():
    a, b = RNG.standard_normal((64, 16)).astype(np.float16), np.zeros((8, 16), np.float16)
    b[:, :8] = np.eye(8)
    b[:, 8:] = -2 * np.eye(8)
    image, lead, stride = place_operand(b, 0, False)
    warps = [
        fragments(a[16 * w : 16 * w + 16], lambda i: a_layout((16, 16), 2, i), 8) for w in range(4)
    ]
    out = np.zeros((128, 4), np.float32)
    text = f"""
    mov.u32 %r1, tile; shl.b32 %r2, %r0, 4; add.u32 %r3, %r1, %r2;
    setp.lt.u32 %p1, %r0, 16; mad.wide.u32 %rd10, %r0, 16, %rd2;
    @%p1 ld.global.v2.u64 {{%rd12, %rd13}}, [%rd10]; @%p1 st.shared.v2.u64 [%r3], {{%rd12, %rd13}};
    fence.proxy.async; bar.sync 0;
    mad.wide.u32 %rd10, %r0, 16, %rd1; ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd10];
    shr.u32 %r4, %r1, 4; cvt.u64.u32 %rd20, %r4;
    or.b64 %rd20, %rd20, 0x{(stride >> 4) << 32 | (lead >> 4) << 16:x};
    setp.ne.u32 %p2, 0, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f0, %f1, %f2, %f3}},
        {{%r10, %r11, %r12, %r13}}, %rd20, %p2, -1, 1, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %rd10, %r0, 16, %rd0; st.global.v4.f32 [%rd10], {{%f0, %f1, %f2, %f3}};
    """
    body = kernel(text, ("out", "a", "b"), ".shared .align 1024 .b8 tile[1024];")
    body.launch(1, 128, [out, np.concatenate(warps), image])
    got = np.zeros((64, 8), np.float32)
    thread = np.arange(128)
    for i in range(4):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2)
        got[row, 2 * (thread % 4) + i % 2] = out[:, i]
    wide = a.astype(np.float64)
    np.testing.assert_allclose(got, -(wide[:, :8] - 2 * wide[:, 8:]), atol=1e-6)
