# SPDX-License-Identifier: Apache-2.0
"""Break the convolution kernel in one place: the machine must report it, or the result be wrong.

`pytest -s` prints how many mutants were caught. Each is run at several shapes, because a bound is
tight only at some. Survivors that change nothing are in EXPLAINED.
"""

from __future__ import annotations

import pytest

from tests.kernels.mutants import Conv
from tests.ptx.ptx_mutants import Tally, hunt
from tests.support import compiled

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


def hunt_triton(arch: int) -> Tally:
    """Runs in a process that compiles."""
    return hunt(Conv(compiled.conv_kernels, arch))


@pytest.mark.parametrize("arch", compiled.MACHINE_ARCHS, ids="sm_{}".format)
def test_mutants_are_caught(compile_pool, arch):
    tally = compile_pool.submit(hunt_triton, arch).result()
    print(f"\nconv_bn_act sm_{arch}: {tally}")
    assert not tally.unexplained({m: why for (a, m), why in EXPLAINED.items() if a == arch})
