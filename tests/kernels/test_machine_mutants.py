# SPDX-License-Identifier: Apache-2.0
"""Break the convolution kernel in one place: the machine must report it, or the result be wrong.

`pytest -s` prints how many mutants were caught. Each is run at several shapes, because a bound is
tight only at some. Survivors that change nothing are in EXPLAINED.
"""

from __future__ import annotations

import pytest

from resnet_fast.spec import ConvSpec, TileConfig
from resnet_fast.testing import compiled
from resnet_fast.testing.cases import conv_tensors
from tests.kernels import machine
from tests.ptx.ptx_mutants import Tally, hunt

# (architecture, mutation) -> how many survivors, and why none of them changes anything.
EXPLAINED = {
    (80, "no bar.sync"): (
        2,
        "one stands in the prologue, where no stage is reused; one at the top of the loop, after "
        "that of the prologue or of the loop's own end",
    ),
    (80, "no wait_group"): (
        3,
        "two waits follow one another, so that either may go; one repeats, at the top of the loop, "
        "the wait of the prologue or of the loop's own end",
    ),
    (90, "no bar.sync"): (
        2,
        "one stands in the prologue, where no stage is reused; one follows a wgmma.wait_group, "
        "which speaks for the whole (only) warpgroup",
    ),
}


class Conv:
    """Steps that are not full, tiles that are cut; one kernel for all shapes."""

    sites = 16  # of one mutation
    tile = TileConfig(64, 64, 32, 3, 4, GROUP_M=1)
    shapes = tuple(
        ConvSpec(n, h, w, 72, k, 3, 3, (1, 1), (1, 1), residual=True, norm=True)
        for n, h, w, k in ((5, 5, 6, 80), (1, 11, 10, 96), (1, 5, 4, 48), (1, 7, 8, 112))
    )

    def __init__(self, arch: int):
        self.runs = {}
        for spec in self.shapes:
            tensors = conv_tensors(spec)
            (kernel,) = compiled.conv_kernels(tensors, self.tile, arch)
            self.runs[spec] = kernel, tensors
        (self.text,) = {kernel.ptx for kernel, _ in self.runs.values()}

    def check(self, text: str, spec: ConvSpec):
        kernel, tensors = self.runs[spec]
        tensors.out.fill_(float("nan"))
        run = kernel.run(text=text)
        machine.check(tensors)
        return run


def hunt_conv(arch: int) -> Tally:
    """Runs in a process that compiles."""
    return hunt(Conv(arch))


@pytest.mark.parametrize("arch", compiled.MACHINE_ARCHS, ids="sm_{}".format)
def test_mutants_are_caught(compile_pool, arch):
    tally = compile_pool.submit(hunt_conv, arch).result()
    print(f"\nconv_bn_act sm_{arch}: {tally}")
    assert not tally.unexplained({m: why for (a, m), why in EXPLAINED.items() if a == arch})
