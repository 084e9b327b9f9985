# SPDX-License-Identifier: Apache-2.0
"""The convolution whose kernel is broken in one place, for `tests/ptx/ptx_mutants.hunt`."""

from __future__ import annotations

from collections.abc import Callable

from resnet_fast.spec import ConvSpec, TileConfig
from tests.kernels import machine
from tests.support.cases import conv_tensors
from tests.support.compiled import CompiledKernel


class Conv:
    """Steps that are not full, tiles that are cut; one kernel for all shapes.

    Args:
        source: makes the kernels, Triton's or ours.
    """

    sites = 16  # of one mutation
    tile = TileConfig(64, 64, 32, 3, 4, GROUP_M=1)
    shapes = tuple(
        ConvSpec(n, h, w, 72, k, 3, 3, (1, 1), (1, 1), residual=True, norm=True)
        for n, h, w, k in ((5, 5, 6, 80), (1, 11, 10, 96), (1, 5, 4, 48), (1, 7, 8, 112))
    )

    def __init__(self, source: Callable[..., list[CompiledKernel]], arch: int):
        self.runs = {}
        for spec in self.shapes:
            tensors = conv_tensors(spec)
            (kernel,) = source(tensors, self.tile, arch)
            self.runs[spec] = kernel, tensors
        (self.text,) = {kernel.ptx for kernel, _ in self.runs.values()}

    def check(self, text: str, spec: ConvSpec):
        kernel, tensors = self.runs[spec]
        tensors.out.fill_(float("nan"))
        run = kernel.run(text=text)
        machine.check(tensors)
        return run
