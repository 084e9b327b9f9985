# SPDX-License-Identifier: Apache-2.0
"""Faults that the machine stops at, seeded one by one, each beside the program without it: memory
and asynchronous work."""

import numpy as np
import pytest
from ptx_helpers import HEAD, SHARED, fails, kernel, run

from softgpu import ptx

# --- addresses and values ---------------------------------------------------------------------


def test_global_bounds():
    error = fails(
        "out-of-bounds global load of 4 bytes at 0x.*, 0 bytes past the end",
        "mad.wide.u32 %rd1, %r0, 4, %rd0; ld.global.u32 %r1, [%rd1];",
        np.zeros(62, np.uint32),
    )
    assert error.thread == (62, 0, 0) and error.block == (0, 0, 0)
    fails("out-of-bounds global store.*1 bytes before", "st.global.u8 [%rd0+-1], %r0;")
    fails("read-only", "st.global.u8 [%rd0], %r0;", np.frombuffer(b"abcd", np.uint8))


CONSTANT = """
mad.wide.u32 %rd2, %r0, 4, %rd0; mad.wide.u32 %rd3, %r0, 4, %rd1;
ld.global.nc.u32 %r1, [%rd3]; st.global.u32 [%rd2], %r1; bar.sync 0;
ld.global.nc.u32 %r2, [%rd3]; add.u32 %r2, %r2, %r1; ATOMIC st.global.u32 [%rd2], %r2;
"""


def test_what_nc_loads_read_stays_constant():
    """The same kernel with its input as output, as a residual that is the output would be."""
    x, out, text = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32), CONSTANT
    run(text.replace("ATOMIC", ""), out, x)
    np.testing.assert_array_equal(out, 2 * np.arange(64))
    fails("global store over bytes that this launch has read by ld.global.nc",
          text.replace("ATOMIC", ""), x, x)  # fmt: skip
    fails("global atomic over bytes that this launch has read by ld.global.nc",
          text.replace("ATOMIC", "red.global.add.u32 [%rd3], 1;"), out, x)  # fmt: skip
    run(text.replace("ATOMIC", "").replace(".nc", ""), x, x)
    stored = "st.global.u32 [%rd2], %r0; ld.global.nc.u8 %r1, [%rd2+3];"
    fails("ld.global.nc of bytes that this launch has stored", text[: text.index("ld")] + stored,
          out, x)  # fmt: skip
    # blocks that run one after the other, each storing what the next one reads
    later = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd2, %r1, 4, %rd0;"
    later += "ld.global.nc.u32 %r2, [%rd2]; st.global.u32 [%rd2+4], %r2;"
    with pytest.raises(ptx.PtxError, match="has stored"):
        kernel(later).launch(64, 1024, [np.zeros(65, np.uint32)])


def test_atomics_need_a_writable_array():
    readable = np.frombuffer(bytes(4), np.uint32)
    fails("global atomic into a read-only array", "red.global.add.u32 [%rd0], 1;", readable)
    fails("global atomic into a read-only array", "atom.global.add.u32 %r1, [%rd0], 1;", readable)


def test_a_slice_is_bounded_by_itself():
    whole = np.arange(100, dtype=np.uint32)
    run("ld.global.u32 %r1, [%rd0+196];", whole[10:60])
    fails("out-of-bounds", "ld.global.u32 %r1, [%rd0+200];", whole[10:60])
    fails("out-of-bounds", "ld.global.u32 %r1, [%rd0+-4];", whole[10:60])


@pytest.mark.parametrize(
    ("match", "body"),
    [
        ("misaligned global load of 8", "ld.global.u64 %rd1, [%rd0+4];"),
        ("misaligned global load of 16", "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0+8];"),
        ("misaligned shared store of 4", "st.shared.u32 [tile+2], %r0;"),
        ("out-of-bounds shared store of 4", "st.shared.u32 [tile+8192], %r0;"),
        ("out-of-bounds shared load of 4", "mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];"),
        ("out-of-bounds local store", ".local .b8 own[8]; st.local.u32 [own+8], %r0;"),
        ("misaligned local store", ".local .b8 own[8]; st.local.u32 [own+1], %r0;"),
        ("local load of bytes that nothing", ".local .b8 own[8]; ld.local.u32 %r1, [own];"),
        ("shared bytes that nothing wrote", "ld.shared.u32 %r1, [tile];"),
        ("shared bytes that nothing wrote", "st.shared.u8 [tile], %r0; ld.shared.u16 %r1, [tile];"),
        ("register %r7 is read but nothing wrote", "add.u32 %r1, %r7, 1;"),
        ("register %r7 is read", "setp.eq.u32 %p1, %r0, 0; @%p1 mov.u32 %r7, 1; mov.u32 %r1, %r7;"),
        ("register %p3 is read", "@%p3 mov.u32 %r1, 1;"),
    ],
    ids=lambda x: x[:40],
)
def test_addresses_and_unwritten_values(match, body):
    fails(match, body, threads=1 if "st.shared.u8" in body else 64)


def test_a_guard_protects_what_it_skips():
    run("setp.eq.u32 %p1, %r0, 99; mov.u32 %r1, 0; @%p1 ld.shared.u32 %r1, [tile];")


# --- races ------------------------------------------------------------------------------------

MINE = "shl.b32 %r1, %r0, 2; mov.u32 %r2, tile; add.u32 %r1, %r1, %r2; xor.b32 %r3, %r1, 128;"


@pytest.mark.parametrize(
    ("match", "body"),
    [
        ("race: shared load of bytes that warp 1 wrote",
         "st.shared.u32 [%r1], %r0; BARRIER ld.shared.u32 %r4, [%r3];"),
        ("race: shared store over bytes that warp . may still read",
         "st.shared.u32 [%r1], %r0; bar.sync 0; ld.shared.u32 %r4, [%r3]; BARRIER "
         "st.shared.u32 [%r1], %r4;"),
        ("race: shared store over bytes that warp 1 wrote",
         "st.shared.u32 [%r1], %r0; BARRIER st.shared.u32 [%r3], %r0;"),
        ("race: shared load of bytes that warp . changes atomically",
         "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [tile], %r0; bar.sync 0;"
         "atom.shared.add.u32 %r4, [tile], 1; BARRIER ld.shared.u32 %r5, [tile];"),
    ],
    ids=["read after write", "write after read", "write after write", "atomic"],
)  # fmt: skip
def test_races(match, body):
    run(MINE + body.replace("BARRIER", "bar.sync 0;"))
    fails(match, MINE + body.replace("BARRIER", ""))


def test_one_word_is_written_at_once():
    """The same value may be: by two warps, and by lanes of a warp."""
    fails("two warps write different values to the same shared bytes at once",
          "st.shared.u32 [tile], %r0;")  # fmt: skip
    fails("lanes of a warp write different values to the same shared bytes at once",
          "st.shared.u32 [tile], %r0;", threads=32)  # fmt: skip
    run("st.shared.u32 [tile], 7; bar.sync 0; ld.shared.u32 %r1, [tile];")
    fails("race: shared store over bytes that warp 1 wrote",
          "st.shared.u32 [tile], 7; st.shared.u32 [tile], %r0;")  # fmt: skip


TURNS = """
setp.lt.u32 %p1, %r0, 32; @!%p1 bra later;
st.shared.u32 [tile], 7; bra both;
later: st.shared.u32 [tile], 7; LATER both: bar.sync 0; ld.shared.u32 %r1, [tile];
"""


def test_one_value_is_written_in_turns():
    """Nobody sees which warp wrote it; but another value must not meet the first one's store."""
    run(TURNS.replace("LATER", ""))
    other = TURNS.replace(
        "later: st.shared.u32 [tile], 7; LATER", "later: st.shared.u32 [tile], 8;"
    )
    fails("race: shared store over bytes that warp . wrote", other)
    fails("race: shared store over bytes that warp . may still read",
          TURNS.replace("LATER", "st.shared.u32 [tile], 8;"))  # fmt: skip
    fails(
        "race: shared load of bytes that warp . wrote",
        TURNS.replace("LATER", "").replace("bar.sync 0;", ""),
    )


def test_halves_of_a_word_do_not_race():
    run(
        "shr.u32 %r1, %r0, 5; shl.b32 %r1, %r1, 1; mov.u32 %r2, tile; add.u32 %r1, %r1, %r2;"
        "cvt.u16.u32 %h0, %r1; st.shared.u16 [%r1], %h0;"
    )


def test_named_barriers_order_only_who_takes_part():
    body = (
        MINE
        + """
    shr.u32 %r5, %r0, 5; setp.eq.u32 %p1, %r5, 0; setp.eq.u32 %p2, %r5, 1; setp.ge.u32 %p3, %r5, 1;
    @%p1 st.shared.u32 [%r1], %r0;
    @%p1 bar.arrive 1, 64; @%p2 bar.sync 1, 64;
    """
    )  # warp 0 gives to warp 1 alone
    read = "and.b32 %r6, %r1, -129; {} ld.shared.u32 %r4, [%r6];"
    run(body + read.format("@%p2"), threads=96)
    fails("race: shared load", body + "sub.u32 %r1, %r1, 128;" + read.format("@%p3"), threads=96)


# --- asynchronous copies ----------------------------------------------------------------------

COPY = (
    MINE
    + """
mad.wide.u32 %rd1, %r0, 4, %rd0;
cp.async.ca.shared.global [%r1], [%rd1], 4;
cp.async.commit_group;
"""
)


@pytest.mark.parametrize(
    ("match", "body"),
    [
        ("asynchronous copy is still writing: its wait is missing",
         "FAULT{cp.async.wait_group 0;} ld.shared.u32 %r4, [%r1];"),
        ("race: shared load of bytes that warp . wrote",
         "cp.async.wait_all; FAULT{bar.sync 0;} ld.shared.u32 %r4, [%r3];"),
        ("asynchronous copy is still writing",
         "cp.async.ca.shared.global [%r1+256], [%rd1], 4; cp.async.commit_group;"
         "cp.async.wait_group 1;"
         "FAULT{cp.async.wait_group 0;} ld.shared.u32 %r4, [%r1+256];"),
        ("cp.async write over bytes that warp . may still read",
         "cp.async.wait_all; bar.sync 0; ld.shared.u32 %r4, [%r3]; FAULT{bar.sync 0;}"
         "cp.async.ca.shared.global [%r1], [%rd1], 4;"),
        ("over bytes that an asynchronous copy is still writing",
         "FAULT{cp.async.wait_all;} st.shared.u32 [%r1], %r0;"),
    ],
    ids=["no wait", "no barrier", "wait for the wrong group", "refilled early", "overwritten"],
)  # fmt: skip
def test_cp_async(match, body):
    fault = body[body.index("FAULT{") : body.index("}") + 1]
    run(COPY + body.replace(fault, fault[6:-1]))
    fails(match, COPY + body.replace(fault, ""))


def test_the_source_of_an_asynchronous_copy_is_overwritten():
    """By anyone, before the wait; what lies beside it may be written."""
    store, wait = "xor.b32 %r5, %r0, 32; mad.wide.u32 %rd2, %r5, 4, %rd0;", "cp.async.wait_all;"
    store += "st.global.u32 [%rd2], %r0;"
    match = "over bytes that an asynchronous copy still reads: its wait is missing"
    run(COPY + wait + "bar.sync 0;" + store)
    fails("global store " + match, COPY + store + wait)
    run(COPY + store.replace("[%rd2]", "[%rd2+256]") + wait)
    atomic = "red.global.add.u32 [%rd1], 1;"
    run(COPY + wait + atomic)
    fails("global atomic " + match, COPY + atomic + wait)
    nothing = COPY.replace("[%rd1], 4;", "[%rd1], 4, 0;")  # bytes of the source
    run(nothing + store + wait)
    x, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    fails("global store " + match, bulk(WAIT="@%p1 st.global.u32 [%rd0+252], %r0;" + WAIT), x, out)
    run(bulk(AGAIN="@%p1 st.global.u32 [%rd0+252], %r0;"), x, out)


BULK = """
setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 32; mov.u32 %r1, tile; add.u32 %r2, %r1, 4096;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
INIT
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;
@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r2];
WAIT
shl.b32 %r3, %r0, 2; add.u32 %r4, %r1, %r3; ld.shared.u32 %r5, [%r4];
AGAIN
mad.wide.u32 %rd1, %r0, 4, %rd1; st.global.u32 [%rd1], %r5;
"""
WAIT = """again: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2], 0; @!%p3 bra again;"""


def bulk(**parts):
    parts = {"INIT": "bar.sync 0;", "WAIT": WAIT, "AGAIN": ""} | parts
    body = BULK
    for name, text in parts.items():
        body = body.replace(name, text)
    return body


def test_bulk_copies():
    x, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    run(bulk(), x, out)
    np.testing.assert_array_equal(out, x)
    fails("its wait is missing", bulk(WAIT=""), x, out)
    fails("mbarrier used before a barrier", bulk(INIT=""), x, out)
    only_one_warp = "@!%p2 bra done;" + WAIT + "done:"
    fails(
        "race: shared load of bytes that an asynchronous copy wrote|its wait is missing",
        bulk(WAIT=only_one_warp),
        x,
        out,
    )
    refill = "FENCE @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;" + (
        "@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes"
        " [%r1], [%rd0], 256, [%r2];" + WAIT.replace(", 0;", ", 1;").replace("again", "more")
    )
    run(bulk(AGAIN=refill.replace("FENCE", "bar.sync 0;")), x, out)
    fails(
        "bulk copy over bytes that warp 1 may still read",
        bulk(AGAIN=refill.replace("FENCE", "")),
        x,
        out,
    )


def test_bulk_store():
    body = """
    setp.eq.u32 %p1, %r0, 0; mov.u32 %r1, tile; shl.b32 %r3, %r0, 2; add.u32 %r4, %r1, %r3;
    st.shared.u32 [%r4], %r0;
    FENCE bar.sync 0;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r1], 256;
    @%p1 cp.async.bulk.commit_group;
    READ
    """
    wait, fence = "@%p1 cp.async.bulk.wait_group.read 0;", "fence.proxy.async.shared::cta;"
    out = np.zeros(64, np.uint32)
    run(body.replace("FENCE", fence).replace("READ", wait), out)
    np.testing.assert_array_equal(out, np.arange(64))
    fails("without a fence.proxy.async", body.replace("FENCE", "").replace("READ", wait), out)
    fails("exit while a bulk copy", body.replace("FENCE", fence).replace("READ", ""), out)
    early = "@%p1 st.shared.u32 [%r4], %r0;" + wait
    fails(
        "still reads: its wait is missing", body.replace("FENCE", fence).replace("READ", early), out
    )


# --- wgmma ------------------------------------------------------------------------------------

# 64x8 += 64x16 * 16x8 without swizzle: A at 0 (rows of core matrices 128 bytes apart), B at 4096.
WGMMA = """
mov.u32 %r1, tile; shl.b32 %r2, %r0, 4; add.u32 %r3, %r1, %r2; mov.u32 %r4, 0x3c003c00;
st.shared.v4.u32 [%r3], {%r4, %r4, %r4, %r4};
setp.lt.u32 %p1, %r0, 16;
@%p1 st.shared.v4.u32 [%r3+4096], {%r4, %r4, %r4, %r4};
PROXY bar.sync 0;
cvt.u64.u32 %rd2, %r1; shr.u64 %rd2, %rd2, 4; or.b64 %rd3, %rd2, 0x0000001000080000;
add.u64 %rd4, %rd3, 256;
mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
ORDER
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd3, %rd4, 1, 1, 1, 0, 0;
EARLY
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mad.wide.u32 %rd1, %r0, 16, %rd0;
st.global.v4.f32 [%rd1], {%f0, %f1, %f2, %f3};
"""


@pytest.mark.parametrize(
    ("match", "parts"),
    [
        ("without a fence.proxy.async", {"PROXY": ""}),
        ("race: wgmma read of bytes that warp", {"bar.sync 0;": ""}),
        ("written after the last wgmma.fence",
         {"ORDER": "wgmma.fence.sync.aligned; mov.f32 %f2, %f0;"}),
        ("no wgmma.fence before the first|written after the last", {"ORDER": ""}),
        ("still reads: its wait is missing", {"EARLY": "st.shared.u32 [%r3], %r4;"}),
        ("%f1 belongs to a wgmma that was not waited", {"EARLY": "add.f32 %f4, %f1, %f1;"}),
        ("%f1 belongs to a wgmma that was not waited", {"EARLY": "mov.f32 %f1, 0f00000000;"}),
        ("belongs to a wgmma", {"wgmma.wait_group.sync.aligned 0;": ""}),
        ("belongs to a wgmma", {"wgmma.commit_group.sync.aligned;": ""}),
    ],
    ids=["no proxy fence", "no barrier", "late register write", "no wgmma.fence", "operand changed",
         "accumulator read", "accumulator written", "no wait", "no commit"],
)  # fmt: skip
def test_wgmma(match, parts):
    defaults = {"PROXY": "fence.proxy.async;", "ORDER": "wgmma.fence.sync.aligned;", "EARLY": ""}
    good, bad = WGMMA, WGMMA
    for name, text in parts.items():
        bad = bad.replace(name, text)
    for name, text in defaults.items():
        good, bad = good.replace(name, text), bad.replace(name, text)
    out = np.zeros((128, 4), np.float32)
    run(good, out, threads=128)
    assert (out == 17).all()
    fails(match, bad, out, threads=128)


def test_wgmma_with_a_in_registers():
    """The A registers belong to the product as long as the shared operand does."""
    text = WGMMA.replace("%rd3, %rd4, 1, 1, 1, 0, 0", "{%r4, %r4, %r4, %r4}, %rd4, 1, 1, 1, 0")
    text = text.replace("PROXY", "fence.proxy.async;").replace("ORDER", "wgmma.fence.sync.aligned;")
    out = np.zeros((128, 4), np.float32)
    run(text.replace("EARLY", "mov.b32 %r5, %r4;"), out, threads=128)
    assert (out == 17).all()
    match = "register %r4 belongs to a wgmma that was not waited"
    fails(match, text.replace("EARLY", "mov.b32 %r4, 0;"), out, threads=128)


def test_a_warpgroup_beside_another_warp_in_several_blocks():
    """160 threads: warpgroups do not begin at multiples of 128 in later blocks."""
    text = WGMMA.replace("PROXY", "fence.proxy.async;").replace("EARLY", "")
    text = text.replace("ORDER", "setp.ge.u32 %p5, %r0, 128; @%p5 ret; wgmma.fence.sync.aligned;")
    out = np.zeros((128, 4), np.float32)
    kernel(text, ("out",), SHARED).launch(3, 160, [out])
    assert (out == 17).all()
    with pytest.raises(ptx.PtxError, match="partial"):
        kernel(text.replace("%r0, 128;", "%r0, 96;"), ("out",), SHARED).launch(3, 160, [out])


def test_unknown_text_is_named_with_its_line():
    with pytest.raises(
        ptx.PtxError, match=r"line \d+: unknown instruction frobnicate\.u32"
    ) as first:
        kernel("frobnicate.u32 %r1, %r0;")
    loose = ptx.Module(f"{HEAD}.entry k() {{ .reg .b32 %r; frob.u32 %r; }}", strict=False)
    with pytest.raises(ptx.PtxError, match=r"line \d+: unknown instruction frob\.u32"):
        loose.kernel("k").launch(1, 1, [])
    with pytest.raises(ptx.PtxError, match=r"unknown modifier \.wrong") as second:
        kernel("\n\nadd.wrong.u32 %r1, %r0, %r0;")
    assert second.value.line == first.value.line + 2
    with pytest.raises(ptx.PtxError, match=r"line 5: unknown directive \.frob"):
        kernel("", shared="\n.frob 3;")
    with pytest.raises(ptx.PtxError, match="unknown label nowhere"):
        kernel("bra nowhere;")
