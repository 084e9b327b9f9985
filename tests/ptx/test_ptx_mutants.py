# SPDX-License-Identifier: Apache-2.0
"""Break passing kernels in one place: the machine must report it, or the result be wrong.

`pytest -s` prints how many mutants were caught. A mutant is run at several shapes, because a bound
is tight, or a stage refilled, only at some. Survivors that change nothing are in EXPLAINED.
"""

import numpy as np
import pytest
from ptx_helpers import assert_close, conv64
from ptx_mutants import hunt
from ptx_triton_kernels import compiled, launcher

from softgpu import ptx

# (kernel, mutation) -> how many survivors, and why none of them changes anything.
EXPLAINED = {
    ("conv sm_80", "no bar.sync"): (
        2,
        "one stands in the prologue, where no stage is reused; one at the top of the loop, after "
        "that of the prologue or of the loop's own end",
    ),
    ("conv sm_80", "no wait_group"): (
        3,
        "two waits follow one another, so that either may go; one repeats, at the top of the loop, "
        "the wait of the prologue or of the loop's own end",
    ),
    ("conv sm_90", "no bar.sync"): (
        3,
        "one stands in the prologue, where no stage is reused; one follows a wgmma.wait_group, "
        "which speaks for the whole (only) warpgroup; in the epilogue each warp overwrites only "
        "bytes that its own copies wrote",
    ),
    ("descriptors sm_90", "no bar.sync"): (
        12,
        "initialization, arrival and copy are all done by warp 0; every thread waits for the "
        "mbarrier itself; a wgmma.wait_group speaks for the whole (only) warpgroup; the last one "
        "precedes the end",
    ),
    ("descriptors sm_90", "bound off by one"): (
        1,
        "one warp more stores a box that another stores with the same bytes",
    ),
    ("softmax sm_80", "no bar.sync"): (1, "the last one precedes the end"),
    ("softmax sm_90", "no bar.sync"): (1, "the last one precedes the end"),
    ("softmax sm_80", "no wait_group"): (1, "the last one precedes the end, nothing is read"),
    ("softmax sm_90", "no wait_group"): (1, "the last one precedes the end, nothing is read"),
    ("softmax sm_80", "bound off by one"): (
        1,
        "the mask of a load: the value beyond it is masked again where it is used",
    ),
    ("cutlass sm_80", "no bar.sync"): (1, "the epilogue begins with one of its own"),
    ("cutlass sm_80", "bound off by one"): (
        2,
        "one is met only by rows that another bound cuts off; one runs the main loop once more, on "
        "stages that the iterators filled with zeros",
    ),
    ("cutlass sm_90", "no bar.sync"): (
        2,
        "the epilogue goes round four buffers, so that a warp that runs one part ahead meets none "
        "that is in use",
    ),
    ("cutlass sm_90", "no wait_group"): (
        4,
        "the same four buffers: the wait of the next part comes before the buffer's next use",
    ),
    ("cutlass sm_90", "no mbarrier wait"): (
        3,
        "the producer's last waits keep its block from leaving a cluster too early; there is one",
    ),
    ("cutlass sm_90", "no fence"): (1, "fence.mbarrier_init is for other blocks of a cluster"),
    ("cutlass sm_90", "bound off by one"): (
        1,
        "which lanes of warp 0 store the box: all of them store the same bytes",
    ),
}


def normal(shape, dtype=np.float16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class TritonConv:
    """Shapes in which each row and column group of a thread is once the one that a bound cuts."""

    sites = 16  # of one mutation
    shapes = ((5, 5, 7, 64, 80), (1, 12, 11, 96, 96), (1, 5, 5, 48, 48), (1, 7, 9, 64, 112))

    def __init__(self, arch):
        tile = {"R": 3, "S": 3, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "NUM_STAGES": 3}
        self.text, self.shared = compiled("conv", arch, "*fp16", ("c", "k"), **tile)

    def check(self, text, shape):
        n, h, w, c, k = shape
        x, weight = normal((n, h, w, c)), normal((k, 3, 3, c), seed=1)
        y = np.full((n, h, w, k), np.nan, np.float16)
        grid = (-(-n * h * w // 64), -(-k // 64), 1)
        run = launcher(text, self.shared)(grid, [x, weight, y, n, h, w, c, k, h, w, 1, 1])
        assert_close(y, np.maximum(conv64(x, weight, 1, 1), 0), 2.0**-10, 9 * c)
        return run


class TritonDescriptors:
    sites = 40  # of one mutation
    shapes = ((200, 160, 304), (128, 64, 64), (64, 128, 112))

    def __init__(self):
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
        self.text, self.shared = compiled("matmul_tma", 90, "*fp16", **tile)

    def check(self, text, shape):
        m, n, k = shape
        a, b = normal((m, k)), normal((n, k), seed=1)
        out = np.full((m, n), np.nan, np.float16)
        args = []
        for x in (a, b, out):
            args += [ptx.TensorMap(x, (128, 64), swizzle=128), *x.shape, x.strides[0] // 2, 1]
        grid = (-(-m // 128), -(-n // 128), 1)
        # Backwards, so that what a block writes outside its tile is not overwritten.
        blocks = [(i, j) for j in reversed(range(grid[1])) for i in reversed(range(grid[0]))]
        run = launcher(text, self.shared)(grid, [*args, k], blocks=blocks)
        assert_close(out, a.astype(np.float64) @ b.astype(np.float64).T, 2.0**-10, k)
        return run


class TritonSoftmax:
    sites = 16  # of one mutation
    shapes = tuple((5, c) for c in (781, 782, 783, 784, 301, 302, 303, 304)) + ((1, 512), (2, 7))

    def __init__(self, arch):
        self.text, self.shared = compiled("softmax", arch, "*fp32", ("row_stride",), BLOCK=1024)

    def check(self, text, shape):
        rows, columns = shape
        x = normal((rows, 1024), np.float32)
        out = np.full_like(x, np.nan)
        run = launcher(text, self.shared)(2, [x, out, 1024, rows, columns])
        power = np.exp(x[:, :columns].astype(np.float64))
        assert_close(out[:, :columns], power / power.sum(1, keepdims=True), 2.0**-22, columns)
        assert np.isnan(out[:, columns:]).all()
        return run


class Cutlass:
    sites = 8  # of one mutation
    shapes = ((1, 12, 11, 64, 96, 3, 3, 1, 1), (2, 9, 13, 40, 40, 3, 3, 1, 2))

    def __init__(self, conv):
        self.conv, self.text = conv, conv.text

    def check(self, text, shape):
        y, reference, run, _ = self.conv.run(shape, text)
        assert_close(y, np.maximum(reference, 0), 2.0**-10, shape[3] * 9)
        return run


class CutlassSm90(Cutlass):
    """Two tiles, nine steps through three stages."""

    shapes = ((1, 12, 11, 64, 128, 3, 3, 1, 1),)

    def check(self, text, shape):
        y, reference, run, _ = self.conv.run(shape, text)
        assert_close(y, reference, 2.0**-10, shape[3] * 9)
        return run


CASES = {
    "conv sm_80": lambda: TritonConv(80),
    "conv sm_90": lambda: TritonConv(90),
    "descriptors sm_90": TritonDescriptors,
    "softmax sm_80": lambda: TritonSoftmax(80),
    "softmax sm_90": lambda: TritonSoftmax(90),
    "cutlass sm_80": Cutlass,
    "cutlass sm_90": CutlassSm90,
}


@pytest.mark.parametrize("name", CASES)
def test_mutants_are_caught(name, request):
    fixture = {"cutlass sm_80": "cutlass_conv", "cutlass sm_90": "cutlass_conv_sm90"}.get(name)
    case = CASES[name](*([request.getfixturevalue(fixture)] if fixture else []))
    tally = hunt(case)
    print(f"\n{name}: {tally}")
    assert not tally.unexplained(
        {m: why for (kernel, m), why in EXPLAINED.items() if kernel == name}
    )
