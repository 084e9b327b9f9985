# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of every layer below the ops: what a convolution is, and how it is tiled.

    x [N, H, W, C] * weight [K, R, S, C] -> y [N, P, Q, K]           (memory order)
    GEMM view: M = N*P*Q rows, N_gemm = K columns, K_gemm = R*S*C products each

A `ConvSpec` holds no tensor and no pointer: it is hashable, printable and picklable, so the same
value names a problem to the heuristics, a backend, a test, a benchmark row and a tuning file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ACTIVATIONS = ("none", "relu")
ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """One fused convolution: act(norm(conv(x, weight)) * scale + shift + residual).

    Args:
        n, h, w, c: batch, height, width and channels of x, which is [N, H, W, C] in memory.
        k, r, s: output channels and filter height and width; weight is [K, R, S, C / groups].
        stride, padding, dilation: (height, width).
        groups: channel groups; C and K are divisible by it.
        dtype: "float16", "bfloat16", "float32" or "float64"; the dtype of x, weight and y.
        activation: "none" or "relu".
        residual: whether a tensor of y's shape is added before the activation.
        norm: whether a mean and a variance are given beside scale and shift.
        precision: "tf32" or "ieee"; it only matters where dtype is "float32".
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "float16"
    activation: str = "relu"
    residual: bool = False
    norm: bool = False
    precision: str = "tf32"

    @property
    def p(self) -> int:
        """Output height."""
        return conv_output_size(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def q(self) -> int:
        """Output width."""
        return conv_output_size(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def m(self) -> int:
        """Rows of the GEMM: output pixels."""
        return self.n * self.p * self.q

    @property
    def k_gemm(self) -> int:
        """Products per output element."""
        return self.r * self.s * self.c // self.groups

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution without padding: a plain GEMM over (strided) pixels."""
        return self.r == self.s == 1 and self.padding == (0, 0)

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolution itself, a multiply-add counted as two."""
        return 2 * self.m * self.k * self.k_gemm

    @property
    def bytes_minimum(self) -> int:
        """Bytes that any kernel must move: each tensor once."""
        x = self.n * self.h * self.w * self.c
        y = self.m * self.k * (2 if self.residual else 1)
        return (x + self.k * self.k_gemm + y) * ELEMENT_SIZE[self.dtype] + 8 * self.k

    def __str__(self) -> str:
        extras = [f"/{self.stride[0]}" if self.stride[0] == self.stride[1] else f"/{self.stride}"]
        if self.dilation != (1, 1):
            extras.append(f"d{self.dilation[0]}")
        if self.groups > 1:
            extras.append(f"g{self.groups}")
        if self.residual:
            extras.append("+res")
        if self.activation != "none":
            extras.append(f"+{self.activation}")
        return (
            f"{self.n}x{self.h}x{self.w}x{self.c} -> {self.k}, "
            f"{self.r}x{self.s}{' '.join(extras)}, {self.dtype}"
        )


@dataclass(frozen=True, slots=True)
class JoinSpec:
    """The end of a projection block: relu(norm(conv(h)) + norm'(conv1x1(x))), two products.

    Args:
        main: of h, [N, P, Q, C] in memory: a convolution that keeps the map's size.
        projection: of x, [N, H, W, D] in memory: pointwise, perhaps strided; it has main's output.
    """

    main: ConvSpec
    projection: ConvSpec

    @property
    def flops(self) -> int:
        """Floating-point operations of both products, a multiply-add counted as two."""
        return self.main.flops + self.projection.flops

    @property
    def bytes_minimum(self) -> int:
        """Bytes that any kernel must move: each tensor once, and of x the pixels it samples."""
        vectors = 4 if self.main.norm else 2, 4 if self.projection.norm else 2
        return self.as_one_product.bytes_minimum + 4 * self.main.k * (sum(vectors) - 2)

    @property
    def as_one_product(self) -> ConvSpec:
        """The pointwise convolution of as many products and bytes: what a tile's time depends on.

        h and the sampled pixels of x side by side, [N, P, Q, C + D], where the main convolution is
        pointwise itself; a larger filter counts its products, not its input, R*S times.
        """
        products = self.main.k_gemm + self.projection.k_gemm
        return replace(self.main, c=products, r=1, s=1, padding=(0, 0))

    @property
    def dtype(self) -> str:
        """The dtype of every map and weight."""
        return self.main.dtype

    @property
    def k_gemm(self) -> int:
        """Products per output element."""
        return self.main.k_gemm + self.projection.k_gemm

    def __str__(self) -> str:
        return f"{self.main} joined by {self.projection}"


@dataclass(frozen=True, slots=True)
class StemSpec:
    """A ResNet's stem: the 3x3/2 max-pool of a 7x7/2 convolution with BatchNorm and ReLU.

    Args:
        conv: the convolution before the pool.
    """

    conv: ConvSpec

    @property
    def pooled(self) -> tuple[int, int]:
        """Height and width of y."""
        return conv_output_size(self.conv.p, 3, 2, 1, 1), conv_output_size(self.conv.q, 3, 2, 1, 1)

    @property
    def dtype(self) -> str:
        """The dtype of weight and y."""
        return self.conv.dtype

    @property
    def k_gemm(self) -> int:
        """Products per element of the map before the pool."""
        return self.conv.k_gemm

    def __str__(self) -> str:
        return f"the stem {self.conv}"


@dataclass(frozen=True, slots=True)
class SumSpec:
    """An element-by-element op of two tensors of one shape.

    Args:
        numel: elements of each tensor.
        dtype: of all of them.
    """

    numel: int
    dtype: str
    k_gemm = 1

    def __str__(self) -> str:
        return f"a sum of {self.numel} elements, {self.dtype}"


Spec = ConvSpec | JoinSpec | StemSpec | SumSpec


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How one kernel cuts a `ConvSpec`'s GEMM: the output tile, the pipeline and the split of K.

    Args:
        BLOCK_M, BLOCK_N: output tile of one program, in pixels and output channels.
        BLOCK_K: products per step of the pipelined loop.
        NUM_STAGES: steps in flight.
        NUM_WARPS: warps per program.
        SPLIT_K: programs that share one output tile's sum; more than one adds a reduction pass.
        GROUP_M: row tiles that are walked together, so that weights stay in the L2 cache.
        reason: why the tile is in its table.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    NUM_STAGES: int
    NUM_WARPS: int
    SPLIT_K: int = 1
    GROUP_M: int = 8
    reason: str = ""

    def __str__(self) -> str:
        extras = f" split {self.SPLIT_K}" if self.SPLIT_K > 1 else ""
        extras += f" groups of {self.GROUP_M}" if self.GROUP_M != 8 else ""
        return (
            f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} "
            f"stages {self.NUM_STAGES} warps {self.NUM_WARPS}{extras}"
        )


@dataclass(frozen=True, slots=True)
class StemTile:
    """How the CUDA kernel of a stem cuts its work: a block's pixels of y, and its warps.

    Args:
        BLOCK_P, BLOCK_Q: pixels of y, after the pool.
        NUM_WARPS: warps per block.
        reason: why the tile is in its table.
    """

    BLOCK_P: int
    BLOCK_Q: int
    NUM_WARPS: int
    reason: str = ""

    def channels(self, dtype: str) -> int:
        """Channels of a block: 128 bytes of y, 64 of half precision, 32 of float32."""
        return 128 // ELEMENT_SIZE[dtype]

    def blocks(self, spec: StemSpec) -> int:
        """Tiles of one group of channels."""
        p, q = spec.pooled
        return spec.conv.n * -(-p // self.BLOCK_P) * -(-q // self.BLOCK_Q)

    def __str__(self) -> str:
        return f"{self.BLOCK_P}x{self.BLOCK_Q} pooled pixels warps {self.NUM_WARPS}"


Tile = TileConfig | StemTile


def conv_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output height or width of a convolution; zero or less where nothing fits."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
