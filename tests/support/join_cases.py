# SPDX-License-Identifier: Apache-2.0
"""The projection blocks' ends that tests run, the tensors to run them on, and the compiled kernel.

As `cases.py` and `compiled.py` for one convolution, but for the two of a join.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from resnet_fast.kernels import conv_bn_join as kernel
from resnet_fast.spec import ConvSpec, JoinSpec, TileConfig
from tests.support.cases import ConvTensors, conv_tensors
from tests.support.compiled import CompiledKernel, recorder


def join(n, p, q, c, d, k, *, r=1, s=1, stride=(1, 1), norm=True, odd=(0, 0), **options):
    """The join of h [N, P, Q, C] and x [N, H, W, D].

    H and W are the largest that give P and Q, less `odd`, which may be anything below the stride.
    """
    main = ConvSpec(n, p, q, c, k, r, s, (1, 1), (r // 2, s // 2), norm=norm, **options)
    h, w = p * stride[0] - odd[0], q * stride[1] - odd[1]
    projection = ConvSpec(
        n, h, w, d, k, 1, 1, stride, norm=norm, **{**options, "activation": "none"}
    )
    return JoinSpec(main, projection)


def resnet_joins(depth: int, n: int = 1, size: int = 224, **options) -> dict[str, JoinSpec]:
    """The ends of the projection blocks of torchvision's ResNet of `depth`, by stage."""
    bottleneck = depth >= 50
    joins, d, p = {}, 64, size // 4
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        stride = 1 if stage == 1 else 2
        k = width * 4 if bottleneck else width
        if stride == 2 or d != k:
            p = -(-p // stride)
            r = 1 if bottleneck else 3
            joins[f"layer{stage}"] = join(
                n, p, p, width, d, k, r=r, s=r, stride=(stride, stride), **options
            )
        d = k
    return joins


ODD = {
    "height-is-not-width": join(2, 5, 9, 64, 32, 48, stride=(2, 2)),
    "odd-map": join(2, 7, 5, 32, 64, 64, stride=(2, 2), odd=(1, 1)),
    "no-stride": join(2, 6, 7, 64, 64, 32),
    "stride-of-axes": join(1, 6, 5, 32, 32, 32, stride=(1, 3), odd=(0, 2)),
    "3x3": join(2, 7, 5, 32, 40, 24, r=3, s=3, stride=(2, 2)),
    "1x5": join(1, 5, 9, 24, 16, 24, s=5),
    "three-channels-3x3": join(1, 9, 7, 3, 5, 16, r=3, s=3, stride=(2, 2), odd=(1, 0)),
    "k-1": join(1, 5, 5, 16, 16, 1),
    "c-100-d-20": join(1, 6, 6, 100, 20, 36, stride=(2, 2)),
    "map-1x1": join(3, 1, 1, 128, 64, 64, stride=(2, 2), odd=(1, 1)),
    "batch-prime": join(13, 3, 3, 32, 48, 40, stride=(2, 2)),
    "affine": join(2, 5, 5, 32, 32, 32, norm=False, stride=(2, 2)),
}

# Each breaks a kernel that divides one factor by the other, or rounds in between.
FACTORS = {
    "main-zero": (0.0, 1.0),
    "projection-zero": (1.0, 0.0),
    "both-zero": (0.0, 0.0),
    "main-tiny": (1e-30, 1.0),
    "projection-tiny": (1.0, 1e-30),
    "far-apart": (1e-20, 1e3),
    "negative": (-1.0, 1.0),
    "cancelling": (1e4, -1e4),
}


@dataclass
class JoinTensors:
    """The operands of one join, in torch's shapes with NHWC memory, each surrounded by NaN.

    Args:
        main, projection: those of each convolution; what both would write apart is left alone.
        out: [N, K, P, Q], NaN; it is main's.
    """

    spec: JoinSpec
    main: ConvTensors
    projection: ConvTensors

    @property
    def out(self) -> torch.Tensor:
        return self.main.out

    @property
    def k_gemm(self) -> int:
        """Products per output element."""
        return self.spec.main.k_gemm + self.spec.projection.k_gemm

    def arguments(self) -> tuple:
        """Of the launch and, but for `out`, of the op."""
        m, p = self.main, self.projection
        return (
            m.x, m.weight, m.scale, m.shift, m.mean, m.var, m.eps,
            p.x, p.weight, p.scale, p.shift, p.mean, p.var, p.eps, self.out,
        )  # fmt: skip

    def operands(self) -> kernel.Operands:
        """What the launch is built from."""
        m, p = self.main, self.projection
        tensors = [t for t in self.arguments() if isinstance(t, torch.Tensor)]
        params = [
            tuple(None if v is None else v.dtype for v in (t.scale, t.shift, t.mean, t.var))
            for t in (m, p)
        ]
        strides = [(t.stride(0), t.stride(2), t.stride(3)) for t in (m.x, p.x)]
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
        return kernel.Operands(*strides, *params, aligned)

    def eager(self) -> torch.Tensor:
        """What eager torch computes at this dtype, one op after another."""
        return F.relu(self.main.eager() + self.projection.eager())

    def reference(self) -> torch.Tensor:
        """The same in fp64."""
        return F.relu(self.main.reference() + self.projection.reference())


def join_tensors(spec: JoinSpec, *, factors=(1.0, 1.0), seed: int = 0, **options) -> JoinTensors:
    """Random operands of `spec` on the CPU; `factors` multiply the two scales.

    `options` are those of `cases.conv_tensors`, for both convolutions.
    """
    main = conv_tensors(replace(spec.main, activation="none"), seed=seed, **options)
    projection = conv_tensors(spec.projection, seed=seed + 1, **options)
    for tensors, factor in zip((main, projection), factors, strict=True):
        tensors.scale.mul_(factor)
    return JoinTensors(spec, main, projection)


def join_kernels(tensors: JoinTensors, tile: TileConfig, arch: int) -> list[CompiledKernel]:
    """What the op launches on `tensors`: one kernel."""
    kernels: list[CompiledKernel] = []
    launch = kernel.build(tensors.spec, tile, tensors.operands(), arch=arch, bind=recorder(kernels))
    launch(*tensors.arguments())
    return kernels
