# SPDX-License-Identifier: Apache-2.0
"""Break the CUDA convolution in one place: the machine must report it, or the result be wrong.

`pytest -s` prints how many mutants were caught. Survivors that change nothing are in EXPLAINED.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from resnet_fast.spec import ConvSpec
from resnet_fast.testing import cuda_kernels, nvcc
from tests.kernels.mutants import Conv
from tests.ptx.ptx_mutants import Tally, hunt

pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))

# mutation -> how many survivors, and why none of them changes anything.
EXPLAINED = {}


class Filters(Conv):
    """15 rows and three images, so that every row of a thread meets each bound of an image; 34
    steps, so that the last stage is 0."""

    tall = ConvSpec(3, 5, 2, 24, 48, 15, 3, (1, 1), (14, 1), residual=True, norm=True)
    shapes = (Conv.shapes[0], tall, Conv.shapes[1])


class Pointwise(Conv):
    """4 steps, so that the last stage is 0, or a step that is not full; 36 rows, so that the first
    vectors of a warp's rows meet the last one."""

    few = replace(Conv.shapes[0], n=1, h=6, w=6)
    shapes = tuple(
        replace(s, r=1, s=1, padding=(0, 0), c=c) for s in (*Conv.shapes, few) for c in (72, 128)
    )


def hunt_cuda(form: type[Conv]) -> Tally:
    """Runs in a process that compiles."""
    return hunt(form(cuda_kernels.conv_kernels, 80))


@pytest.mark.parametrize("form", [Filters, Pointwise])
def test_mutants_are_caught(compile_pool, form):
    tally = compile_pool.submit(hunt_cuda, form).result()
    print(f"\nCUDA conv_bn_act sm_80, {form.__name__}: {tally}")
    assert not tally.unexplained(EXPLAINED)
