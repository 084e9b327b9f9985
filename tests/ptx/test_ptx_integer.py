# SPDX-License-Identifier: Apache-2.0
"""Integer instructions against the PTX ISA's definitions, written out for Python integers."""

import numpy as np
import pytest
from ptx_helpers import elementwise

pytestmark = pytest.mark.usefixtures("place")

U32, S32, U64, S64, U16 = np.uint32, np.int32, np.uint64, np.int64, np.uint16
RNG = np.random.default_rng(0)


def numbers(dtype, seed=0):
    """64 values of a type: corners, then random bits."""
    info = np.iinfo(dtype)
    corners = [
        0,
        1,
        2,
        31,
        32,
        33,
        0x7F,
        0x80,
        0xFF,
        info.max,
        info.max - 1,
        info.min,
        info.min + 1,
    ]
    random = np.random.default_rng(seed).integers(info.min, info.max, 64, dtype, endpoint=True)
    return np.array([*corners, *random[: 64 - len(corners)]], dtype)


def small(limit, seed=0):
    return np.random.default_rng(seed).integers(0, limit, 64).astype(U32)


def check(text, inputs, out_dtype, kinds, out_kind, expected):
    got = elementwise(text, inputs, out_dtype, kinds, out_kind)
    bits = 8 * np.dtype(out_dtype).itemsize
    want = [
        expected(*(int(v) for v in row)) & ((1 << bits) - 1) for row in zip(*inputs, strict=True)
    ]
    assert [int(x) & ((1 << bits) - 1) for x in got] == want


def signed(x, bits):
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


A, B = numbers(U32), numbers(U32, 1)[::-1].copy()
SA, SB = numbers(S32), numbers(S32, 1)[::-1].copy()
LA, LB = numbers(U64), numbers(U64, 1)[::-1].copy()
SLA, SLB = numbers(S64), numbers(S64, 1)[::-1].copy()

BINARY = {
    "add.u32": (A, B, lambda a, b: a + b),
    "add.sat.s32": (SA, SB, lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a + b))),
    "sub.sat.s32": (SA, SB, lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a - b))),
    "sub.s64": (SLA, SLB, lambda a, b: a - b),
    "mul.lo.s32": (SA, SB, lambda a, b: a * b),
    "mul.hi.u32": (A, B, lambda a, b: a * b >> 32),
    "mul.hi.s32": (SA, SB, lambda a, b: a * b >> 32),
    "mul.hi.u64": (LA, LB, lambda a, b: a * b >> 64),
    "mul.hi.s64": (SLA, SLB, lambda a, b: a * b >> 64),
    "mul24.lo.s32": (SA, SB, lambda a, b: signed(a, 24) * signed(b, 24)),
    "mul24.hi.u32": (A, B, lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16),
    "div.s32": (SA, np.where(SB == 0, 7, SB).astype(S32), quotient),
    "div.u32": (A, np.where(B == 0, 7, B).astype(U32), lambda a, b: a // b),
    "rem.s32": (SA, np.where(SB == 0, 7, SB).astype(S32), lambda a, b: a - b * quotient(a, b)),
    "rem.u32": (A, np.where(B == 0, 7, B).astype(U32), lambda a, b: a % b),
    "min.s32": (SA, SB, min),
    "max.u32": (A, B, max),
    "max.relu.s32": (SA, SB, lambda a, b: max(a, b, 0)),
    "and.b32": (A, B, lambda a, b: a & b),
    "or.b32": (A, B, lambda a, b: a | b),
    "xor.b64": (LA, LB, lambda a, b: a ^ b),
    "shl.b32": (A, small(40), lambda a, n: a << n if n < 32 else 0),
    "shr.u32": (A, small(40), lambda a, n: a >> n if n < 32 else 0),
    "shr.s32": (SA, small(40), lambda a, n: a >> min(n, 31)),
    "shr.s64": (SLA, small(80), lambda a, n: a >> min(n, 63)),
}


@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name):
    a, b, expected = BINARY[name]
    kinds = [f"b{8 * x.itemsize}" for x in (a, b)]
    check(f"{name} %d, %a, %b;", [a, b], a.dtype, kinds, kinds[0], expected)


def test_sixteen_bits_and_wide_products():
    a, b = numbers(U16), numbers(U16, 1)[::-1].copy()
    check("add.u16 %d, %a, %b;", [a, b], U16, ["b16", "b16"], "b16", lambda a, b: a + b)
    check("mul.wide.u16 %d, %a, %b;", [a, b], U32, ["b16", "b16"], "b32", lambda a, b: a * b)
    check("mul.wide.s32 %d, %a, %b;", [SA, SB], U64, ["b32", "b32"], "b64", lambda a, b: a * b)
    check("mul.wide.u32 %d, %a, %b;", [A, B], U64, ["b32", "b32"], "b64", lambda a, b: a * b)


def test_mad():
    three = ["b32"] * 3
    c = numbers(S32, 2)
    check("mad.lo.s32 %d, %a, %b, %c;", [SA, SB, c], S32, three, "b32", lambda a, b, c: a * b + c)
    check(
        "mad.hi.u32 %d, %a, %b, %c;",
        [A, B, A],
        U32,
        three,
        "b32",
        lambda a, b, c: (a * b >> 32) + c,
    )
    kinds = ["b32", "b32", "b64"]
    check(
        "mad.wide.s32 %d, %a, %b, %c;", [SA, SB, SLA], S64, kinds, "b64", lambda a, b, c: a * b + c
    )
    check("sad.s32 %d, %a, %b, %c;", [SA, SB, c], S32, three, "b32", lambda a, b, c: abs(a - b) + c)


def test_carry_chains():
    text = """
    .reg .b32 %al, %ah, %bl, %bh, %dl, %dh;
    mov.b64 {%al, %ah}, %a; mov.b64 {%bl, %bh}, %b;
    OP.cc.u32 %dl, %al, %bl; OPc.u32 %dh, %ah, %bh;
    mov.b64 %d, {%dl, %dh};
    """
    kinds = ["b64", "b64"]
    check(text.replace("OP", "add"), [LA, LB], U64, kinds, "b64", lambda a, b: a + b)
    check(text.replace("OP", "sub"), [LA, LB], U64, kinds, "b64", lambda a, b: a - b)


def bits_of(dtype):
    return 8 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", [U32, S32, U64, S64], ids=lambda d: d.__name__)
def test_bfe(dtype):
    bits = bits_of(dtype)
    msb = bits - 1
    sign = np.issubdtype(dtype, np.signedinteger)

    def expected(a, b, c):
        pos, length = b & 0xFF, c & 0xFF
        a &= (1 << bits) - 1
        top = a >> min(pos + length - 1, msb) & 1 if sign and length else 0
        d = 0
        for i in range(bits):
            inside = i < length and pos + i <= msb
            d |= (a >> (pos + i) & 1 if inside else top) << i
        return d

    kind = f"{'s' if sign else 'u'}{bits}"
    inputs = [numbers(dtype), small(bits + 8), small(bits + 8, 1)]
    check(
        f"bfe.{kind} %d, %a, %b, %c;",
        inputs,
        dtype,
        [f"b{bits}", "b32", "b32"],
        f"b{bits}",
        expected,
    )


def test_bfi():
    def expected(a, b, pos):
        length = 9
        for i in range(length):
            if pos + i < 32:
                b = b & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i)
        return b

    check("bfi.b32 %d, %a, %b, %c, 9;", [A, B, small(40)], U32, ["b32"] * 3, "b32", expected)
    check(
        "bfi.b32 %d, %a, %b, 8, %c;", [A, B, small(1)], U32, ["b32"] * 3, "b32", lambda a, b, n: b
    )
    check("bfi.b32 %d, %a, %b, 0, 32;", [A, B], U32, ["b32"] * 2, "b32", lambda a, b: a)


def bytes_of(a, b):
    return [a >> 8 * i & 0xFF for i in range(4)] + [b >> 8 * i & 0xFF for i in range(4)]


def join(parts):
    return sum(p << 8 * i for i, p in enumerate(parts))


def test_prmt():
    def default(a, b, c):
        pool = bytes_of(a, b)
        picks = [c >> 4 * i & 0xF for i in range(4)]
        return join([(0xFF if pool[p & 7] & 0x80 else 0) if p & 8 else pool[p & 7] for p in picks])

    check("prmt.b32 %d, %a, %b, %c;", [A, B, numbers(U32, 3)], U32, ["b32"] * 3, "b32", default)
    tables = {  # the ISA's tables, byte 3 first
        "f4e": ["3210", "4321", "5432", "6543"],
        "b4e": ["5670", "6701", "7012", "0123"],
        "rc8": ["0000", "1111", "2222", "3333"],
        "ecl": ["3210", "3211", "3222", "3333"],
        "ecr": ["0000", "1110", "2210", "3210"],
        "rc16": ["1010", "3232", "1010", "3232"],
    }
    for mode, table in tables.items():

        def expected(a, b, c, table=table):
            return join([bytes_of(a, b)[int(d)] for d in reversed(table[c & 3])])

        inputs = [A, B, small(4, 5)]
        check(f"prmt.b32.{mode} %d, %a, %b, %c;", inputs, U32, ["b32"] * 3, "b32", expected)


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0xFE, 0x96, 0xCA, 0x1B, 0xE8])
def test_lop3(table):
    def expected(a, b, c):
        return sum(
            (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
            for i in range(32)
        )

    inputs = [A, B, numbers(U32, 4)]
    check(f"lop3.b32 %d, %a, %b, %c, {table};", inputs, U32, ["b32"] * 3, "b32", expected)


def test_funnel_shift():
    inputs, kinds = [A, B, small(48)], ["b32"] * 3

    def left(a, b, n):
        return (b << 32 | a) << n >> 32

    def right(a, b, n):
        return (b << 32 | a) >> n

    for mode, amount in (("clamp", lambda n: min(n, 32)), ("wrap", lambda n: n & 31)):
        for side, shift in (("l", left), ("r", right)):

            def expected(a, b, c, shift=shift, amount=amount):
                return shift(a, b, amount(c))

            check(f"shf.{side}.{mode}.b32 %d, %a, %b, %c;", inputs, U32, kinds, "b32", expected)


def test_counting():
    one, two = ["b32"], ["b64"]
    check("popc.b32 %d, %a;", [A], U32, one, "b32", lambda a: a.bit_count())
    check("popc.b64 %d, %a;", [LA], U32, two, "b32", lambda a: a.bit_count())
    check("clz.b32 %d, %a;", [A], U32, one, "b32", lambda a: 32 - a.bit_length())
    check("clz.b64 %d, %a;", [LA], U32, two, "b32", lambda a: 64 - a.bit_length())
    check("brev.b32 %d, %a;", [A], U32, one, "b32", lambda a: int(f"{a:032b}"[::-1], 2))
    check("bfind.u32 %d, %a;", [A], U32, one, "b32", lambda a: a.bit_length() - 1)
    check(
        "bfind.s32 %d, %a;", [SA], U32, one, "b32", lambda a: (~a if a < 0 else a).bit_length() - 1
    )
    check(
        *("bfind.shiftamt.u32 %d, %a;", [A], U32, one, "b32"),
        lambda a: 32 - a.bit_length() if a else -1,
    )
    check("abs.s32 %d, %a;", [SA], S32, one, "b32", abs)
    check("neg.s32 %d, %a;", [SA], S32, one, "b32", lambda a: -a)
    check("not.b32 %d, %a;", [A], U32, one, "b32", lambda a: ~a)
    check("cnot.b32 %d, %a;", [A], U32, one, "b32", lambda a: int(a == 0))


def test_masks_and_extension():
    inputs, kinds = [small(48), small(48, 1)], ["b32", "b32"]
    ones = (1 << 32) - 1
    check("bmsk.clamp.b32 %d, %a, %b;", inputs, U32, kinds, "b32",
          lambda a, b: ((1 << min(b, 32)) - 1) << min(a, 32) & ones)  # fmt: skip
    check("bmsk.wrap.b32 %d, %a, %b;", inputs, U32, kinds, "b32",
          lambda a, b: ((1 << (b & 31)) - 1) << (a & 31) & ones)  # fmt: skip
    check("szext.clamp.s32 %d, %a, %b;", [A, small(40)], U32, kinds, "b32",
          lambda a, n: signed(a, min(n, 32)) if n else 0)  # fmt: skip
    check("szext.wrap.u32 %d, %a, %b;", [A, small(40)], U32, kinds, "b32",
          lambda a, n: a & ((1 << (n & 31)) - 1))  # fmt: skip


def test_dot_products():
    def parts(x, width, sign):
        pieces = [x >> width * i & ((1 << width) - 1) for i in range(32 // width)]
        return [signed(p, width) for p in pieces] if sign else pieces

    def dp4a(a, b, c):
        return c + sum(x * y for x, y in zip(parts(a, 8, True), parts(b, 8, False), strict=True))

    def dp2a(a, b, c):
        return c + sum(
            x * y for x, y in zip(parts(a, 16, False), parts(b, 8, True)[2:], strict=True)
        )

    inputs = [A, B, numbers(U32, 6)]
    check("dp4a.s32.u32 %d, %a, %b, %c;", inputs, U32, ["b32"] * 3, "b32", dp4a)
    check("dp2a.hi.u32.s32 %d, %a, %b, %c;", inputs, U32, ["b32"] * 3, "b32", dp2a)


def test_division_by_zero_is_all_ones():
    zero = np.zeros(64, U32)
    check("div.u32 %d, %a, %b;", [A, zero], U32, ["b32"] * 2, "b32", lambda a, b: -1)


def test_comparison_and_selection():
    text = "setp.{}.{} %p1, %a, %b; selp.b32 %d, 1, 0, %p1;"
    for name, compare in {"lt": lambda a, b: a < b, "ge": lambda a, b: a >= b}.items():
        check(text.format(name, "s32"), [SA, SB], U32, ["b32"] * 2, "b32", compare)
        check(text.format(name, "u32"), [A, B], U32, ["b32"] * 2, "b32", compare)
    check(text.format("hi", "u32"), [A, B], U32, ["b32"] * 2, "b32", lambda a, b: a > b)
    both = "setp.lt.s32 %p3, %b, 0; setp.gt.and.s32 %p1|%p2, %a, 5, !%p3; selp.b32 %d, 2, 0, %p1;"
    both += "@%p2 add.u32 %d, %d, 1;"
    check(both, [SA, SB], U32, ["b32"] * 2, "b32",
          lambda a, b: 2 * (a > 5 and b >= 0) + (a <= 5 and b >= 0))  # fmt: skip
    check("slct.b32.s32 %d, %a, %b, %c;", [A, B, SA], U32, ["b32"] * 3, "b32",
          lambda a, b, c: a if c >= 0 else b)  # fmt: skip
