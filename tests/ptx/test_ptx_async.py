# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies, mbarriers, bulk and tensor copies, named barriers: what must arrive."""

import numpy as np
import pytest
from ptx_helpers import kernel

from softgpu import ptx

TILE = ".shared .align 1024 .b8 tile[16384]; .shared .align 8 .b64 bar[4];"
COPY_OUT = """
shl.b32 %r50, %r0, 2; mov.u32 %r51, tile; add.u32 %r50, %r50, %r51;
mad.wide.u32 %rd50, %r0, 4, %rd0;
out: ld.shared.u32 %r52, [%r50]; st.global.u32 [%rd50], %r52;
add.u32 %r50, %r50, STEP; add.u64 %rd50, %rd50, STEP;
add.u32 %r53, %r51, BYTES; setp.lt.u32 %p9, %r50, %r53; @%p9 bra out;
"""
WAIT = "w{0}: mbarrier.try_wait.parity.shared::cta.b64 %p8, [{1}], {2}; @!%p8 bra w{0};"


def copy_out(size, threads):
    return COPY_OUT.replace("STEP", str(4 * threads)).replace("BYTES", str(size))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(size):
    x = np.arange(1, 32 * 16 + 1, dtype=np.uint8)
    out = np.zeros(32 * size, np.uint8)
    body = f"""
    mov.u32 %r1, tile; mad.lo.u32 %r1, %r0, {size}, %r1; mad.wide.u32 %rd2, %r0, {size}, %rd1;
    rem.u32 %r2, %r0, {size + 1};
    cp.async.ca.shared.global [%r1], [%rd2], {size}, %r2;
    cp.async.wait_all; bar.sync 0;
    """
    kernel(body + copy_out(32 * size, 32), ("out", "x"), TILE).launch(1, 32, [out, x])
    keep = np.arange(size) < (np.arange(32) % (size + 1))[:, None]
    np.testing.assert_array_equal(out.reshape(32, size), x[: 32 * size].reshape(32, size) * keep)


def test_cp_async_with_a_zero_source_touches_no_memory():
    out = np.ones(32, np.uint32)
    body = """
    mov.u32 %r1, tile; mad.lo.u32 %r1, %r0, 4, %r1; setp.ge.u32 %p1, %r0, 0;
    cp.async.ca.shared.global [%r1], [%rd0+1000000], 4, 0;
    cp.async.ca.shared.global [%r1+128], [%rd0+1000000], 4, %p1;
    cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    """
    kernel(body + copy_out(128, 32), ("out",), TILE).launch(1, 32, [out])
    assert (out == 0).all()


def test_mbarrier_counts_arrivals_and_cp_async():
    """The consumer warp waits for 32 producers, whose arrivals follow their copies."""
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = f"""
    setp.eq.u32 %p1, %r0, 0; mov.u32 %r2, bar; mov.u32 %r1, tile; and.b32 %r3, %r0, 31;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 32;
    bar.sync 0;
    mad.lo.u32 %r1, %r3, 4, %r1; mad.wide.u32 %rd2, %r3, 4, %rd1;
    setp.ge.u32 %p2, %r0, 32; @%p2 bra consume;
    cp.async.ca.shared.global [%r1], [%rd2], 4;
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r2];
    bra end;
    consume: {WAIT.format(0, "%r2", 0)}
    xor.b32 %r4, %r1, 64; ld.shared.u32 %r5, [%r4];
    mad.wide.u32 %rd3, %r3, 4, %rd0; st.global.u32 [%rd3], %r5;
    end:
    """
    kernel(body, ("out", "x"), TILE).launch(1, 64, [out, x])
    np.testing.assert_array_equal(out, x ^ 16)


def test_mbarrier_tokens_and_phases():
    out = np.zeros(32, np.uint32)
    body = """
    setp.eq.u32 %p1, %r0, 0; mov.u32 %r2, bar; mov.u32 %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r2], 32; bar.sync 0;
    mbarrier.arrive.shared.b64 %rd2, [%r2];
    t: mbarrier.test_wait.shared.b64 %p2, [%r2], %rd2; @!%p2 bra t;
    mbarrier.test_wait.parity.shared.b64 %p3, [%r2], 0; @%p3 add.u32 %r1, %r1, 1;
    mbarrier.test_wait.parity.shared.b64 %p4, [%r2], 1; @!%p4 add.u32 %r1, %r1, 2;
    bar.sync 0; @%p1 mbarrier.arrive.shared.b64 _, [%r2], 32; bar.sync 0;
    mbarrier.test_wait.parity.shared.b64 %p5, [%r2], 1; @%p5 add.u32 %r1, %r1, 4;
    mad.wide.u32 %rd3, %r0, 4, %rd0; st.global.u32 [%rd3], %r1;
    """  # after phase 0: parity 0 is over, parity 1 (the one before, and the current) not
    with pytest.raises(AssertionError):
        kernel(body, ("out",), TILE).launch(1, 32, [out])
        assert set(out) == {0}
    assert set(out) == {1 | 2 | 4}


RING = """
setp.eq.u32 %p1, %r0, 0; mov.u32 %r1, tile; mov.u32 %r2, bar; add.u32 %r3, %r2, 16;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; @%p1 mbarrier.init.shared::cta.b64 [%r2+8], 1;
@%p1 mbarrier.init.shared::cta.b64 [%r3], 4; @%p1 mbarrier.init.shared::cta.b64 [%r3+8], 4;
bar.sync 0;
mov.u32 %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u64 %rd5, %rd1;
setp.ge.u32 %p2, %r0, 128; @!%p2 bra consumer;
setmaxnreg.dec.sync.aligned.u32 40;
setp.eq.u32 %p3, %r0, 128;
produce:
mad.lo.u32 %r13, %r11, 8, %r2; mad.lo.u32 %r14, %r11, 8, %r3; xor.b32 %r15, %r12, 1;
EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r14], %r15; @!%p8 bra EMPTY;
mad.lo.u32 %r16, %r11, 512, %r1;
@%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r13], 512;
@%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r16], [%rd5], 512, [%r13];
add.u64 %rd5, %rd5, 512; add.u32 %r10, %r10, 1; add.u32 %r11, %r11, 1;
setp.eq.u32 %p4, %r11, 2; @%p4 xor.b32 %r12, %r12, 1; @%p4 mov.u32 %r11, 0;
setp.lt.u32 %p5, %r10, 7; @%p5 bra produce;
bra done;
consumer:
setmaxnreg.inc.sync.aligned.u32 232;
mov.u32 %r20, 0; shl.b32 %r21, %r0, 2; and.b32 %r22, %r0, 31; setp.eq.u32 %p6, %r22, 0;
consume:
mad.lo.u32 %r13, %r11, 8, %r2; mad.lo.u32 %r14, %r11, 8, %r3;
FULL: mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r13], %r12; @!%p8 bra FULL;
mad.lo.u32 %r16, %r11, 512, %r1; add.u32 %r16, %r16, %r21; ld.shared.u32 %r17, [%r16];
add.u32 %r20, %r20, %r17;
@%p6 mbarrier.arrive.release.cta.shared::cta.b64 _, [%r14];
add.u32 %r10, %r10, 1; add.u32 %r11, %r11, 1;
setp.eq.u32 %p4, %r11, 2; @%p4 xor.b32 %r12, %r12, 1; @%p4 mov.u32 %r11, 0;
setp.lt.u32 %p5, %r10, 7; @%p5 bra consume;
mad.wide.u32 %rd6, %r0, 4, %rd0; st.global.u32 [%rd6], %r20;
bar.sync 1, 128;
done:
"""


def test_warp_specialized_ring_of_bulk_copies():
    x = np.arange(7 * 128, dtype=np.uint32).reshape(7, 128)
    out = np.zeros(128, np.uint32)
    kernel(RING, ("out", "x"), TILE).launch(1, 256, [out, x])
    np.testing.assert_array_equal(out, x.sum(axis=0))


@pytest.mark.parametrize(
    ("match", "old", "new"),
    [
        ("may still read|arrivals at an mbarrier", "@!%p8 bra EMPTY;", ""),
        ("its wait is missing|nothing wrote", "@!%p8 bra FULL;", ""),
        ("deadlock", "@%p6 mbarrier.arrive.release", "@%p9 mbarrier.arrive.release"),
        ("deadlock", "_, [%r13], 512;", "_, [%r13], 1024;"),
        ("may still read|partial|deadlock|arrivals", "[%r14], %r15;", "[%r14], %r12;"),
    ],
    ids=["no empty wait", "no full wait", "no release", "too many bytes", "wrong parity"],
)
def test_broken_rings_are_reported(match, old, new):
    text = RING.replace(old, new).replace(
        "mov.u32 %r20, 0;", "mov.u32 %r20, 0; setp.ne.u32 %p9, 0, 0;"
    )
    x, out = np.zeros((7, 128), np.uint32), np.zeros(128, np.uint32)
    with pytest.raises(ptx.PtxError, match=match):
        kernel(text, ("out", "x"), TILE).launch(1, 256, [out, x])


# --- tensor copies ----------------------------------------------------------------------------

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"


def tensor_load(map_, coordinates, size, offsets=None):
    """The bytes that one tensor copy puts into shared memory."""
    rank = len(coordinates)
    mode = "im2col." if offsets else ""
    extra = f", {{{', '.join(map(str, offsets))}}}" if offsets else ""
    where = ", ".join(f"%r{20 + i}" for i in range(rank))
    moves = "".join(f"mov.s32 %r{20 + i}, {c};" for i, c in enumerate(coordinates))
    text = f"""{HEAD}{TILE}
    .visible .entry k(.param .align 64 .b8 map[128], .param .u64 out) {{
    .reg .b32 %r<64>; .reg .b64 %rd<64>; .reg .pred %p<16>;
    mov.b64 %rd1, map; cvta.param.u64 %rd1, %rd1; ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x; mov.u32 %r1, tile; mov.u32 %r2, bar; setp.eq.u32 %p1, %r0, 0; {moves}
    @%p1 prefetch.tensormap [%rd1];
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {size};
    @%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.{mode}mbarrier::complete_tx::bytes
        [%r1], [%rd1, {{{where}}}], [%r2]{extra};
    {WAIT.format(0, "%r2", 0)}
    {copy_out(size, 32)} ret; }}"""
    out = np.zeros(size, np.uint8)
    run = ptx.Module(text).kernel("k").launch(1, 32, [map_, out])
    return out, run


def unswizzle(raw, swizzle):
    if not swizzle:
        return raw
    at = np.arange(0, len(raw), 16)
    moved = at ^ ((at >> 3) & (swizzle - 16))
    return raw.reshape(-1, 16)[moved // 16].reshape(-1)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tiled_load(swizzle):
    x = np.arange(1, 5 * 20 * 72 + 1, dtype=np.uint16).reshape(5, 20, 72)
    inner = max(swizzle, 16) // 2
    box = (2, 8, inner)
    for start in ((0, 0, 0), (4, 15, 64), (-1, -3, -8), (2, 3, 8)):
        map_ = ptx.TensorMap(x, box, swizzle=swizzle)
        raw, run = tensor_load(map_, start[::-1], map_.bytes)
        got = unswizzle(raw, swizzle).view(np.uint16).reshape(box)
        want = np.zeros(box, np.uint16)
        for index in np.ndindex(box):
            at = np.add(start, index)
            if (at >= 0).all() and (at < x.shape).all():
                want[index] = x[tuple(at)]
        np.testing.assert_array_equal(got, want)
        assert run.counters.global_bytes["load"] == 2 * np.count_nonzero(want)


@pytest.mark.parametrize("stride", [1, 2])
def test_im2col_load(stride):
    """Pixels of a 3x3 convolution with padding 1, for one tap and 32 channels."""
    n, h, w, c, pixels = 3, 5, 7, 64, 32
    x = np.arange(1, n * h * w * c + 1, dtype=np.float32).astype(np.float16).reshape(n, h, w, c)
    p, q = (h + 2 - 3) // stride + 1, (w + 2 - 3) // stride + 1
    map_ = ptx.TensorMap(
        x, (pixels, 32), swizzle=64, lower=(-1, -1), upper=(-1, -1), stride=(stride, stride)
    )
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for first, (r, s) in ((0, (0, 0)), (32, (2, 1)), (p * q * n - 8, (1, 2))):
        image, rest = divmod(first, p * q)
        row, column = divmod(rest, q)
        start = (32, column * stride - 1, row * stride - 1, image)
        raw, _ = tensor_load(map_, start, map_.bytes, offsets=(s, r))
        got = unswizzle(raw, 64).view(np.float16).reshape(pixels, 32)
        for i in range(pixels):
            image, rest = divmod(first + i, p * q)
            want = np.zeros(32)
            if image < n:
                want = padded[image, rest // q * stride + r, rest % q * stride + s, 32:]
            np.testing.assert_array_equal(got[i], want)


@pytest.mark.parametrize("operation", ["", "add"])
def test_tensor_store(operation):
    out = np.full((10, 24), 5, np.float32)
    name = (
        f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}.tile.bulk_group"
        if (operation)
        else "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group"
    )
    text = f"""{HEAD}{TILE}
    .visible .entry k(.param .align 64 .b8 map[128]) {{
    .reg .b32 %r<64>; .reg .b64 %rd<64>; .reg .pred %p<16>; .reg .f32 %f<4>;
    mov.b64 %rd1, map; cvta.param.u64 %rd1, %rd1;
    mov.u32 %r0, %tid.x; mov.u32 %r1, tile; setp.eq.u32 %p1, %r0, 0;
    cvt.rn.f32.u32 %f0, %r0; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.f32 [%r2], %f0;
    fence.proxy.async.shared::cta; bar.sync 0; mov.s32 %r3, 16; mov.s32 %r4, 8;
    @%p1 {name} [%rd1, {{%r3, %r4}}], [%r1];
    @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0; ret; }}"""
    run = ptx.Module(text).kernel("k").launch(1, 32, [ptx.TensorMap(out, (4, 8))])
    want = np.full((10, 24), 5, np.float32)
    corner = np.arange(32).reshape(4, 8)[:2]  # the rest of the box lies outside
    want[8:, 16:] = corner + 5 if operation else corner
    np.testing.assert_array_equal(out, want)
    assert run.counters.global_sectors["store"] == 2


def test_tensor_maps_refuse_what_the_hardware_refuses():
    x = np.zeros((8, 64), np.float16)
    for match, make in {
        "not a multiple of 16": lambda: ptx.TensorMap(x[:, 1:33], (8, 32)),
        "exceeds the swizzle": lambda: ptx.TensorMap(x, (8, 64), swizzle=64),
        "another rank": lambda: ptx.TensorMap(x, (8,)),
        "contiguous": lambda: ptx.TensorMap(x.T, (64, 8)),
        "too large": lambda: ptx.TensorMap(x, (512, 64)),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()


def test_cluster_barriers_and_grid_dependency():
    out = np.zeros(64, np.uint32)
    body = """
    griddepcontrol.wait; shl.b32 %r1, %r0, 2; mov.u32 %r2, tile; add.u32 %r1, %r1, %r2;
    mov.u32 %r4, %cluster_ctarank; mapa.shared::cluster.u32 %r5, %r1, %r4;
    st.shared::cluster.u32 [%r5], %r0;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    xor.b32 %r1, %r1, 128; ld.shared.u32 %r3, [%r1];
    griddepcontrol.launch_dependents;
    mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r3;
    """
    kernel(body, ("out",), TILE).launch(1, 64, [out])
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)
    with pytest.raises(ptx.PtxError, match="race"):
        split = body.replace("barrier.cluster.wait.acquire.aligned;", "")
        kernel(split, ("out",), TILE).launch(1, 64, [out])


def test_barrier_reductions():
    out = np.zeros((64, 3), np.uint32)
    body = """
    setp.lt.u32 %p1, %r0, 40;
    bar.red.popc.u32 %r1, 0, %p1; bar.red.and.pred %p2, 1, 64, %p1; bar.red.or.pred %p3, 0, !%p1;
    selp.u32 %r2, 1, 0, %p2; selp.u32 %r3, 1, 0, %p3;
    mad.wide.u32 %rd1, %r0, 12, %rd0;
    st.global.u32 [%rd1], %r1; st.global.u32 [%rd1+4], %r2; st.global.u32 [%rd1+8], %r3;
    """
    kernel(body).launch(1, 64, [out])
    assert (out == [40, 0, 1]).all()
