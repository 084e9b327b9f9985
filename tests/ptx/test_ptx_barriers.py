# SPDX-License-Identifier: Apache-2.0
"""Faults at barriers and collectives, seeded one by one; and who does not have to come to them."""

import numpy as np
import pytest
from ptx_helpers import fails, kernel, run

from softgpu import ptx


@pytest.mark.parametrize(
    ("match", "body"),
    [
        ("wait at a barrier that the others do not reach",
         "setp.lt.u32 %p1, %r0, 32; @%p1 bra end; bar.sync 0; end: bar.sync 1;"),
        ("32 wait at a barrier.*32 have exited",
         "setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0, 64;"),
        ("bar.sync.*by a partial warp: 16 lanes",
         "setp.lt.u32 %p1, %r0, 16; @%p1 bra skip; bar.sync 0; skip: bar.sync 1;"),
        ("0 wait at a barrier.*64 wait for an mbarrier",
         "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [tile], 2; bar.sync 0;"
         "@%p1 mbarrier.arrive.shared.b64 _, [tile];"
         "again: mbarrier.try_wait.parity.shared.b64 %p2, [tile], 0; @!%p2 bra again;"),
        ("this mbarrier was not initialized", "mbarrier.arrive.shared.b64 _, [tile];"),
        ("arrivals at an mbarrier that awaits",
         "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [tile], 1; bar.sync 0;"
         "mbarrier.arrive.shared.b64 _, [tile], 2;"),
        ("shfl.sync.*partial warp",
         "setp.eq.u32 %p1, %r0, 3; @%p1 bra skip;"
         "shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xffffffff; skip: bar.sync 0;"),
        ("vote.sync.*1 lanes wait for others",
         "setp.lt.u32 %p1, %r0, 2; @!%p1 bra skip; setp.eq.u32 %p2, %r0, 0;"
         "selp.b32 %r2, 3, 2, %p2; vote.sync.any.pred %p3, 1, %r2; skip: bar.sync 0;"),
        ("shfl.sync.*reads a lane that takes no part",
         "and.b32 %r2, %r0, 16; mov.u32 %r3, 0xffff; shl.b32 %r3, %r3, %r2;"
         "shfl.sync.bfly.b32 %r1, %r0, 16, 31, %r3;"),
        ("its own member mask leaves out", "vote.sync.any.pred %p1, 1, 0xffff;"),
        ("reads a lane that takes no part",
         "setp.ge.u32 %p1, %r0, 16; @%p1 bra skip;"
         "shfl.sync.idx.b32 %r1, %r0, 20, 31, 0xffff; skip:"),
        ("ldmatrix.*partial warp",
         "and.b32 %r9, %r0, 31; setp.eq.u32 %p1, %r9, 3;"
         "@!%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [tile];"),
        ("wgmma.fence|partial warp", "setp.eq.u32 %p1, %r0, 3; @!%p1 wgmma.fence.sync.aligned;"),
        ("not a multiple of a warp", "bar.sync 1, 48;"),
        ("64 wait at a barrier", "shr.u32 %r1, %r0, 5; bar.sync %r1;"),
        ("is used for 64 and 32 threads at once|for 32",
         "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 32;"),
        ("the kernel trapped", "trap;"),
        ("no end after", "again: bra again;"),
    ],
    ids=lambda x: x[:30],
)  # fmt: skip
def test_barriers_and_collectives(match, body):
    if "no end" in match:
        with pytest.raises(ptx.PtxError, match=r"no end after \d+ instructions \(max_steps\)"):
            kernel(body).launch(3, 1024, [np.zeros(1, np.uint32)], max_steps=300_000)
        return
    fails(match, body)


EXITS = """
setp.ge.u32 %p1, %r0, 40; setp.lt.u32 %p2, %r0, 88; and.pred %p1, %p1, %p2; FIRST
mov.u32 %r2, tile; mad.lo.u32 %r2, %r0, 4, %r2; st.shared.u32 [%r2], %r0; BARRIER
xor.b32 %r3, %r0, 127; mov.u32 %r2, tile; mad.lo.u32 %r2, %r3, 4, %r2; ld.shared.u32 %r4, [%r2];
mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r4; end:
"""


@pytest.mark.parametrize("leave", ["@!%p1 ret;", "@!%p1 bra end;"], ids=["early", "late"])
def test_a_barrier_does_not_wait_for_those_who_exited(leave):
    """Threads 40 to 87 exchange, two warps of them in part; the others exit before these come, or
    while they wait."""
    text = EXITS.replace("FIRST", leave)
    out = np.zeros(128, np.uint32)
    run(text.replace("BARRIER", "bar.sync 0;"), out, threads=128)
    inside = (np.arange(128) >= 40) & (np.arange(128) < 88)
    np.testing.assert_array_equal(out, np.where(inside, 127 - np.arange(128), 0))
    vote = "bar.red.popc.u32 %r5, 0, %p1; bar.red.and.pred %p3, 0, %p1; @!%p3 trap;"
    vote += "setp.eq.u32 %p3, %r5, 48; @!%p3 trap;"
    run(text.replace("BARRIER", vote), out, threads=128)


def test_who_exits_orders_nothing():
    """Warp 0 stores and exits without a barrier; that the others pass theirs tells them nothing."""
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.u32 [tile], 5; @%p1 ret; bar.sync 0;"
    fails("race: shared load of bytes that warp 0 wrote", body + "ld.shared.u32 %r1, [tile];")
