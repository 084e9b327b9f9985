# SPDX-License-Identifier: Apache-2.0
"""Counters against values worked out by hand."""

import numpy as np
import pytest
from ptx_helpers import kernel

TILE = ".shared .align 128 .b8 tile[16384];"


def count(body, threads=32, arrays=None, grid=1):
    arrays = arrays or [np.zeros(1 << 16, np.uint32)]
    names = ("out", "x", "y")[: len(arrays)]
    return kernel(body, names, TILE).launch(grid, threads, arrays).counters


@pytest.mark.parametrize(
    ("step", "size", "sectors", "unique"),
    [
        (4, 4, 4, 4),  # 128 consecutive bytes
        (8, 4, 8, 8),
        (32, 4, 32, 32),  # each lane its own sector
        (0, 4, 1, 1),  # all lanes one word
        (16, 16, 16, 16),  # 512 consecutive bytes
        (64, 16, 32, 32),
        (2, 2, 2, 2),
        (128, 4, 32, 32),
    ],
)
@pytest.mark.parametrize("kind", ["load", "store"])
def test_global_sectors(kind, step, size, sectors, unique):
    wide = {2: ("u16", "%h1"), 4: ("u32", "%r1"), 16: ("v4.u32", "{%r1, %r2, %r3, %r4}")}[size]
    access = f"ld.global.{wide[0]} {wide[1]}, [%rd1];"
    if kind == "store":
        access = f"st.global.{wide[0]} [%rd1], {wide[1]};"
    zero = "mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0; mov.u16 %h1, 0;"
    c = count(f"{zero} mad.wide.u32 %rd1, %r0, {step}, %rd0; {access} {access}", threads=32)
    assert c.global_requests[kind] == 2
    assert c.global_bytes[kind] == 2 * 32 * size
    assert c.global_sectors[kind] == 2 * sectors
    assert c.unique_sectors[kind] == unique


def test_sectors_of_an_unaligned_slice_and_of_masked_lanes():
    whole = np.zeros(4096, np.uint32)
    body = "mad.wide.u32 %rd1, %r0, 4, %rd0; {} ld.global.u32 %r1, [%rd1];"
    assert count(body.format(""), arrays=[whole[1:]]).global_sectors["load"] == 5
    few = body.format("setp.lt.u32 %p1, %r0, 9; @%p1")
    c = count(few, arrays=[whole], threads=64)
    assert (c.global_sectors["load"], c.global_requests["load"]) == (2, 1)
    assert c.global_bytes["load"] == 36


def test_unique_sectors_over_blocks_and_arrays():
    """Four blocks read the same 128 bytes of x, and each its own 128 bytes of y, into one word."""
    x, y, out = (np.zeros(256, np.uint32) for _ in range(3))
    body = """
    mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 32, %r0;
    mad.wide.u32 %rd3, %r0, 4, %rd1; mad.wide.u32 %rd4, %r2, 4, %rd2;
    ld.global.u32 %r3, [%rd3]; ld.global.u32 %r4, [%rd4]; st.global.u32 [%rd0], %r3;
    """
    c = count(body, arrays=[out, x, y], grid=4)
    assert c.global_sectors == {"load": 4 * 8, "store": 4}
    assert c.unique_sectors == {"load": 4 + 16, "store": 1}


def shared(step, size, offset="0"):
    wide = {
        2: ("u16", "%h1"),
        4: ("u32", "%r9"),
        8: ("u64", "%rd9"),
        16: ("v2.u64", "{%rd9, %rd9}"),
    }[size]
    return (
        "mov.u32 %r9, 0; mov.u64 %rd9, 0; mov.u16 %h1, 0; mov.u32 %r1, tile;"
        f"mad.lo.u32 %r2, %r0, {step}, %r1;"
        f"add.u32 %r2, %r2, {offset}; st.shared.{wide[0]} [%r2], {wide[1]};"
    )


@pytest.mark.parametrize(
    ("step", "size", "wavefronts", "minimum"),
    [
        (4, 4, 1, 1),  # a word in each bank
        (8, 4, 2, 1),  # every second bank twice
        (128, 4, 32, 1),  # all in one bank
        (132, 4, 1, 1),  # padded rows
        (2, 2, 1, 1),  # two lanes share each word
        (8, 8, 2, 2),  # half a warp at a time
        (16, 8, 4, 2),
        (16, 16, 4, 4),  # a quarter of a warp at a time
        (32, 16, 8, 4),
        (128, 16, 32, 4),
        (144, 16, 4, 4),
    ],
)
def test_shared_wavefronts(step, size, wavefronts, minimum):
    c = count(shared(step, size))
    assert c.shared_wavefronts["store"] == wavefronts
    assert c.shared_wavefronts_minimum["store"] == minimum
    assert c.bank_conflicts == wavefronts - minimum


def test_a_broadcast_is_one_wavefront():
    body = shared(4, 4) + "bar.warp.sync 0xffffffff; ld.shared.u32 %r3, [tile];"
    c = count(body)
    assert c.shared_wavefronts["load"] == c.shared_wavefronts_minimum["load"] == 1


@pytest.mark.parametrize(("step", "wavefronts"), [(16, 1), (32, 2), (128, 8), (144, 1)])
def test_ldmatrix_wavefronts(step, wavefronts):
    """One 8x8 matrix: eight rows of 16 bytes, `step` apart."""
    body = (
        shared(16, 16)
        + shared(16, 16, "512")
        + shared(16, 16, "1024")
        + f"""
    bar.warp.sync 0xffffffff; and.b32 %r3, %r0, 7; mad.lo.u32 %r3, %r3, {step}, %r1;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r4}}, [%r3];
    """
    )
    assert count(body).shared_wavefronts["load"] == wavefronts


def test_instruction_classes_count_warps():
    body = """
    add.u32 %r1, %r0, 1; mul.f32 %f1, 0f3F800000, 0f3F800000; setp.lt.u32 %p1, %r0, 40;
    @%p1 add.u32 %r1, %r1, 1;
    @!%p1 bra end; mov.u32 %r3, 5; end: bar.sync 0;
    """
    c = count(body, threads=96, grid=2)
    # Three warps in two blocks; warps 0 and 1 fall through the branch.
    assert c.instructions["integer"] == 12 and c.instructions["float"] == 6
    assert c.instructions["compare"] == 6 and c.instructions["barrier"] == 6
    assert c.instructions["branch"] == 12  # bra and ret
    assert c.instructions["move"] == 6 + 4
    assert c.instructions["load param"] == 6
    assert c.barriers == 2


def test_tensor_macs_and_local_bytes():
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, " + (
        "{%r1, %r1, %r1, %r1}, {%r1, %r1}, {%f0, %f1, %f2, %f3};"
    )
    zero = "mov.b32 %r1, 0;" + "".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(4))
    local = ".local .align 8 .b8 own[16]; st.local.u64 [own], %rd0; ld.local.u32 %r2, [own+4];"
    c = count(zero + mma + mma + local, threads=64)
    assert c.tensor_macs == 2 * 2 * 16 * 8 * 16
    assert c.local_bytes == 64 * 12
