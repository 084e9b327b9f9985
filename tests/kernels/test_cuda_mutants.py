# SPDX-License-Identifier: Apache-2.0
"""Break the CUDA convolution or join in one place: the machine must report it, or the result be
wrong.

`pytest -s` prints how many mutants were caught. Survivors that change nothing are in EXPLAINED.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from resnet_fast.dispatch import tiles
from resnet_fast.spec import ConvSpec, JoinSpec
from tests.kernels.mutants import Conv
from tests.ptx.ptx_mutants import Tally, hunt
from tests.support import cuda_kernels, join_cases, nvcc
from tests.support.tolerance import assert_within

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


class Join:
    """Steps that are not full, tiles that are cut, and 15 rows, as above."""

    sites = 12  # of one mutation
    tile = replace(tiles.CUDA_TILES[JoinSpec][-1], BLOCK_K=32, NUM_STAGES=3)
    shapes = tuple(
        join_cases.join(n, p, q, c, d, k, r=15, s=s, stride=(2, 2), odd=(1, 0))
        for n, p, q, c, d, k, s in ((3, 5, 6, 24, 72, 80, 3), (1, 9, 4, 8, 8, 48, 1))
    )

    def __init__(self) -> None:
        self.runs = {}
        for spec in self.shapes:
            tensors = join_cases.join_tensors(spec)
            (kernel,) = cuda_kernels.join_kernels(tensors, self.tile, 80)
            self.runs[spec] = kernel, tensors, tensors.eager(), tensors.reference()
        (self.text,) = {kernel.ptx for kernel, *_ in self.runs.values()}

    def check(self, text: str, spec: JoinSpec):
        kernel, tensors, eager, reference = self.runs[spec]
        tensors.out.fill_(float("nan"))
        run = kernel.run(text=text)
        assert_within(tensors.out, eager, reference, tensors.k_gemm)
        assert all(guard.isnan().all() for guard in tensors.main.out_guard)
        return run


def hunt_join() -> Tally:
    """Runs in a process that compiles."""
    return hunt(Join())


def test_mutants_of_the_join_are_caught(compile_pool):
    tally = compile_pool.submit(hunt_join).result()
    print(f"\nCUDA joins sm_80: {tally}")
    assert not tally.unexplained({})
