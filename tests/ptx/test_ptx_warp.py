# SPDX-License-Identifier: Apache-2.0
"""Exchange within a warp, atomics, memory spaces, control: values from the ISA's definitions."""

import numpy as np
import pytest
from ptx_helpers import kernel

from softgpu import ptx

pytestmark = pytest.mark.usefixtures("place")

STORE = "mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.u32 [%rd10], %r1;"
LANE = np.arange(32)


def run(body, threads=32, shared="", out=None):
    out = np.zeros(threads, np.uint32) if out is None else out
    kernel(body, shared=shared).launch(1, threads, [out])
    return out


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("amount", [1, 3, 17])
def test_shuffles(amount, width):
    segment = LANE // width * width
    clamp = (32 - width) << 8 | 31
    moved = {
        "up": (LANE - amount, LANE - amount >= segment, (32 - width) << 8),
        "down": (LANE + amount, LANE + amount < segment + width, clamp),
        "bfly": (LANE ^ amount, (LANE ^ amount) < segment + width, clamp),
        "idx": (segment + amount % width, LANE >= 0, clamp),
    }
    for mode, (source, inside, c) in moved.items():
        text = (
            f"mul.lo.u32 %r2, %r0, 3; shfl.sync.{mode}.b32 %r1|%p1, %r2, {amount}, {c}, 0xffffffff;"
        )
        values = run(text + STORE)
        np.testing.assert_array_equal(values, 3 * np.where(inside, source, LANE), mode)
        flags = run(text + "selp.u32 %r1, 1, 0, %p1;" + STORE)
        np.testing.assert_array_equal(flags, inside, mode)


def test_votes():
    test = "and.b32 %r2, %r0, 5; setp.eq.u32 %p1, %r2, 1;"
    truth = (LANE & 5) == 1
    ballot = run(test + "vote.sync.ballot.b32 %r1, %p1, 0xffffffff;" + STORE)
    assert set(ballot) == {sum(1 << int(i) for i in LANE[truth])}
    for mode, want in {"any": 1, "all": 0, "uni": 0}.items():
        text = f"vote.sync.{mode}.pred %p2, %p1, 0xffffffff; selp.u32 %r1, 1, 0, %p2;"
        assert set(run(test + text + STORE)) == {want}
    half = "setp.ge.u32 %p3, %r0, 16; mov.u32 %r1, 9; @%p3 bra end;"
    text = "vote.sync.ballot.b32 %r1, %p1, 0xffff; end:"
    want = np.where(LANE < 16, sum(1 << int(i) for i in LANE[truth] if i < 16), 9)
    np.testing.assert_array_equal(run(test + half + text + STORE), want)


def test_match_redux_elect_activemask():
    same = "shr.u32 %r2, %r0, 3; match.any.sync.b32 %r1, %r2, 0xffffffff;"
    np.testing.assert_array_equal(run(same + STORE), 0xFF << LANE // 8 * 8)
    text = "match.all.sync.b32 %r3|%p1, %r2, 0xffffffff; selp.u32 %r1, 1, %r3, %p1;"
    assert set(run("mov.u32 %r2, 7;" + text + STORE)) == {1}
    assert set(run("mov.u32 %r2, %r0;" + text + STORE)) == {0}
    for text, want in {
        "add.u32": 496,
        "max.u32": 31,
        "and.b32": 0,
        "or.b32": 31,
        "xor.b32": 0,
    }.items():
        assert set(run(f"redux.sync.{text} %r1, %r0, 0xffffffff;" + STORE)) == {want}
    elected = run("elect.sync %r2|%p1, 0xffffffff; selp.u32 %r1, 1, 0, %p1;" + STORE)
    assert elected.sum() == 1  # which lane it is, the ISA leaves open
    text = "setp.lt.u32 %p1, %r0, 5; mov.u32 %r1, 0; @%p1 activemask.b32 %r1;"
    np.testing.assert_array_equal(run(text + STORE), np.where(LANE < 5, 31, 0))


HALF = "and.b32 %r4, %r0, 16; mov.u32 %r5, 0xffff; shl.b32 %r5, %r5, %r4;"  # own half's mask
TOGETHER = HALF + "{0}"
APART = HALF + "setp.ge.u32 %p4, %r0, 16; @%p4 bra upper; {0} bra both; upper: {0} both:"


@pytest.mark.parametrize("flow", [TOGETHER, APART], ids=["together", "apart"])
@pytest.mark.parametrize(
    ("text", "want"),
    {
        "vote.sync.ballot.b32 %r1, %p1, %r5;": np.where(LANE < 16, 1 << 3, 0),
        "vote.sync.any.pred %p2, %p1, %r5; selp.u32 %r1, 1, 0, %p2;": LANE < 16,
        "vote.sync.all.pred %p2, %p3, %r5; selp.u32 %r1, 1, 0, %p2;": LANE >= 16,
        "vote.sync.uni.pred %p2, %p1, %r5; selp.u32 %r1, 1, 0, %p2;": LANE >= 16,
        "match.any.sync.b32 %r1, %r2, %r5;": 0x1111 << (LANE & 3) << (LANE & 16),
        "match.all.sync.b32 %r1|%p2, %r4, %r5;": 0xFFFF << (LANE & 16),
        "redux.sync.add.u32 %r1, %r0, %r5;": np.where(LANE < 16, 120, 376),
        "redux.sync.max.u32 %r1, %r0, %r5;": LANE | 15,
        "elect.sync %r1|%p2, %r5; selp.u32 %r1, 1, 0, %p2;": LANE % 16 == 0,
        "shfl.sync.bfly.b32 %r1, %r0, 15, 31, %r5;": LANE ^ 15,
    }.items(),
)
def test_each_half_warp_by_its_own_mask(text, want, flow):
    """Lanes that name different masks do not mix, whether they execute at once or in turn."""
    start = "setp.eq.u32 %p1, %r0, 3; setp.ge.u32 %p3, %r0, 16; and.b32 %r2, %r0, 3;"
    out = run(start + flow.format(text) + STORE)
    if "elect" in text:  # which lane it is, the ISA leaves open
        out, want = out.reshape(2, 16).sum(axis=1), [1, 1]
    np.testing.assert_array_equal(out, want)


def test_a_lane_that_exits_is_not_waited_for():
    """Lanes 8 to 15 wait for the others of their mask, which exit late, or have exited early."""
    vote = "vote.sync.ballot.b32 %r1, 1, 0xffff;" + STORE
    late = "setp.ge.u32 %p1, %r0, 8; setp.lt.u32 %p2, %r0, 16; @!%p1 bra end; @!%p2 bra end;"
    want = np.where((LANE >= 8) & (LANE < 16), 0xFF00, 0)
    np.testing.assert_array_equal(run(late + vote + "end:"), want)
    early = "setp.ge.u32 %p1, %r0, 8; @!%p1 ret; setp.ge.u32 %p2, %r0, 16; @%p2 ret;"
    np.testing.assert_array_equal(run(early + vote), want)


def test_a_leader_alone_has_a_value():
    """As where one lane of those that are together adds for all of them, and tells the others."""
    body = """
    setp.eq.u32 %p1, %r0, 5; setp.ge.u32 %p2, %r0, 5; @!%p2 ret; activemask.b32 %r5;
    @%p1 mov.u32 %r2, 40;
    shfl.sync.idx.b32 %r1, %r2, LEADER, 31, %r5;
    """
    np.testing.assert_array_equal(run(body.replace("LEADER", "5") + STORE), 40 * (LANE >= 5))
    with pytest.raises(ptx.PtxError, match="register %r2 is read but nothing wrote it") as error:
        run(body.replace("LEADER", "6") + STORE)
    assert error.value.thread == (6, 0, 0)


ATOMICS = {  # operation, operand -> result of 32 threads on 100
    "add.u32": (lambda old, t: old + t, "%r0"),
    "max.u32": (max, "%r0"),
    "min.s32": (min, "%r0"),
    "and.b32": (lambda old, t: old & t, "%r0"),
    "or.b32": (lambda old, t: old | t, "%r0"),
    "xor.b32": (lambda old, t: old ^ t, "%r0"),
    "inc.u32": (lambda old, t: 0 if old >= 110 else old + 1, "110"),
    "dec.u32": (lambda old, t: 110 if old == 0 or old > 110 else old - 1, "110"),
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name, space):
    function, operand = ATOMICS[name]
    place = "%rd0+128" if space == "global" else "tile"
    body = f"""
    setp.eq.u32 %p1, %r0, 0; mov.u32 %r2, 100;
    @%p1 st.{space}.u32 [{place}], %r2;
    bar.sync 0;
    atom.{space}.{name} %r1, [{place}], {operand};
    {STORE} bar.sync 0;
    ld.{space}.u32 %r3, [{place}]; @%p1 st.global.u32 [%rd0+128], %r3;
    """
    out = run(body, shared=".shared .b32 tile;", out=np.zeros(33, np.uint32))
    olds = [100]
    for thread in range(32):
        olds.append(function(olds[-1], thread))
    assert out[32] == olds[-1] and 100 in out[:32]
    if operand == "110":  # every thread does the same: the old values are one sequence
        assert sorted(out[:32].tolist()) == sorted(olds[:-1])


def test_exchange_compare_and_floating_atomics():
    text = "atom.global.cas.b32 %r1, [%rd0+128], 7, 9;"
    out = np.full(33, 7, np.uint32)
    run(text + STORE, out=out)
    assert out[32] == 9 and sorted(out[:32]) == [7] + [9] * 31
    out = np.zeros(4, np.float32)
    run("red.global.add.f32 [%rd0], 0f3F000000; red.global.add.f32 [%rd0+4], 0f3F800000;", out=out)
    assert out.tolist() == [16, 32, 0, 0]
    run("mov.f32 %f0, 0f3F800000; red.global.add.v2.f32 [%rd0+8], {%f0, %f0};", out=out)
    assert out.tolist() == [16, 32, 32, 32]
    half = np.zeros(2, np.float16)
    run("mov.b32 %r1, 0x40003c00; red.global.add.noftz.f16x2 [%rd0], %r1;", out=half)
    assert half.tolist() == [32, 64]


def test_generic_addresses_reach_every_space():
    body = """
    .local .align 8 .b8 own[16];
    mov.u32 %r2, tile; cvt.u64.u32 %rd1, %r2; cvta.shared.u64 %rd1, %rd1;
    mov.u64 %rd2, own; cvta.local.u64 %rd2, %rd2;
    cvta.to.global.u64 %rd3, %rd0;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.u32 [%rd1], 40; bar.sync 0;
    st.u32 [%rd2+4], %r0;
    ld.u32 %r3, [%rd1]; ld.u32 %r4, [%rd2+4];
    add.u32 %r1, %r3, %r4;
    isspacep.shared %p2, %rd1; @!%p2 mov.u32 %r1, 0;
    isspacep.local %p2, %rd2; @!%p2 mov.u32 %r1, 0;
    isspacep.global %p2, %rd0; @!%p2 mov.u32 %r1, 0;
    mad.wide.u32 %rd10, %r0, 4, %rd3; st.u32 [%rd10], %r1;
    """
    np.testing.assert_array_equal(run(body, shared=".shared .b32 tile;"), 40 + LANE)


def test_module_variables_and_narrow_memory():
    table = ".const .align 4 .b32 table[4] = {10, 20, 30, 40};"
    table += ".global .align 4 .b8 text[4] = {1, 2, 255, 4};"
    body = (
        """
    and.b32 %r2, %r0, 3; mul.wide.u32 %rd1, %r2, 4; mov.u64 %rd2, table; add.u64 %rd1, %rd1, %rd2;
    ld.const.u32 %r1, [%rd1];
    mov.u64 %rd3, text; cvt.u64.u32 %rd4, %r2; add.u64 %rd3, %rd3, %rd4;
    ld.global.s8 %r3, [%rd3]; add.s32 %r1, %r1, %r3;
    """
        + STORE
    )
    want = np.array([10, 20, 30, 40])[LANE & 3] + np.array([1, 2, -1, 4])[LANE & 3]
    np.testing.assert_array_equal(run(body, shared=table), want)


def test_divergent_loops_reconverge():
    """Each lane loops lane + 1 times; the collective after the loop has the whole warp."""
    body = """
    mov.u32 %r1, 0; mov.u32 %r2, 0;
    loop: add.u32 %r1, %r1, 2; add.u32 %r2, %r2, 1; setp.le.u32 %p1, %r2, %r0; @%p1 bra loop;
    redux.sync.add.u32 %r3, %r1, 0xffffffff; add.u32 %r1, %r1, %r3;
    """
    np.testing.assert_array_equal(run(body + STORE), 2 * (LANE + 1) + 2 * 528)


def test_special_registers():
    out = np.zeros((2, 3, 24, 4), np.uint32)
    body = """
    mov.u32 %r1, %tid.y; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0;
    mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.y; mov.u32 %r6, %nctaid.x;
    mad.lo.u32 %r7, %r5, %r6, %r4; mad.lo.u32 %r7, %r7, 24, %r3;
    mov.u32 %r8, %laneid; mov.u32 %r9, %lanemask_lt;
    mad.wide.u32 %rd1, %r7, 16, %rd0; st.global.v4.u32 [%rd1], {%r4, %r5, %r8, %r9};
    """
    kernel(body).launch((3, 2, 1), (8, 3, 1), [out])
    y, x, thread = np.ogrid[:2, :3, :24]
    assert (out[..., 0] == x).all() and (out[..., 1] == y).all() and (out[..., 2] == thread).all()
    assert (out[..., 3] == (1 << thread) - 1).all()


def test_chosen_blocks_and_bad_arguments():
    out = np.zeros(8, np.uint32)
    body = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd1, %r1, 4, %rd0; st.global.u32 [%rd1], 1;"
    k = kernel(body)
    k.launch(8, 1, [out])
    assert out.tolist() == [1] * 8


def test_a_spinning_thread_does_not_starve_the_one_it_waits_for():
    body = """
    setp.ge.u32 %p1, %r0, 32; @%p1 bra other;
    spin: ld.volatile.global.u32 %r1, [%rd0+256]; setp.eq.u32 %p2, %r1, 0; @%p2 bra spin;
    bra end;
    other: mov.u32 %r1, 5; st.volatile.global.u32 [%rd0+256], 5;
    end:
    """
    out = run(body + STORE, threads=64, out=np.zeros(65, np.uint32))
    assert (out == 5).all()


@pytest.mark.parametrize("waits_for", [1, -1], ids=["a later block", "an earlier block"])
def test_blocks_wait_for_each_other(waits_for):
    """Blocks of 1024 threads, each of which waits for its neighbour's number and adds to it."""
    first = 0 if waits_for < 0 else 2
    body = f"""
    mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd1, %r1, 4, %rd0; mov.u32 %r2, 1;
    setp.ne.u32 %p1, %r0, 0; @%p1 ret; setp.eq.u32 %p1, %r1, {first}; @%p1 bra tell;
    spin: ld.volatile.global.u32 %r2, [%rd1+{4 * waits_for}];
    setp.eq.u32 %p2, %r2, 0; @%p2 bra spin;
    add.u32 %r2, %r2, %r2;
    tell: st.volatile.global.u32 [%rd1], %r2;
    """
    out = np.zeros(3, np.uint32)
    kernel(body).launch(3, 1024, [out])
    assert out.tolist() == [1, 2, 4][::-waits_for]
