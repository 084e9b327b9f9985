# SPDX-License-Identifier: Apache-2.0
"""`conv_bn_join`: who runs the two convolutions at the end of a projection block, and how.

    name    device     what it runs
    cuda    cuda       csrc: one kernel for both products, their BatchNorms, sum and ReLU
    triton  cuda       kernels/conv_bn_join.py: the same
    cpu     cpu        two convolutions of that backend: the second adds what the first has made
    aten    any        the same two, by torch's own functions; refuses nothing

The rows, and how one is chosen, are those of `backends.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resnet_fast import _env, _hardware, _names
from resnet_fast.dispatch import backends, cuda, heuristics
from resnet_fast.dispatch.backends import AUTO
from resnet_fast.dispatch.preferences import preference
from resnet_fast.dispatch.problem import (
    INTERPRETED_ARCH,
    Backend,
    Problem,
    new_output,
    on_device_of,
    triton_interprets,
)
from resnet_fast.dispatch.trial import on_trial
from resnet_fast.kernels.filter_walk import filter_walk
from resnet_fast.spec import ELEMENT_SIZE, JoinSpec, TileConfig

SUMS = 2  # of a thread for each output element: one of each product
FUSED = ("cuda", "triton")  # the backends for which the shortcut never exists

# Two sums for each output element: half the tile that one convolution can keep in registers. At
# 128x128 one block would fill an SM, and nothing would run while its pipeline drains between the
# products.
LARGE = TileConfig(128, 64, 64, 3, 4, reason="large batch: 4 warps, so that two blocks fit an SM")
LARGE_8 = TileConfig(128, 64, 64, 3, 8, reason="large batch: with 4 warps the sums spill")
MIDDLE = TileConfig(64, 64, 64, 3, 4, reason="14x14 and 7x7 maps: three blocks an SM")
MIDDLE_8 = TileConfig(64, 64, 64, 3, 8, reason="14x14 and 7x7 maps: with 4 warps the sums spill")
REST = (
    TileConfig(32, 64, 64, 4, 4, reason="batch 1: more blocks, still whole rows of 64 filters"),
    TileConfig(32, 32, 64, 4, 4, reason="batch 1 on 7x7 maps: most blocks"),
    TileConfig(64, 64, 32, 3, 8, reason="TF32, and products of at most 32 channels"),
    TileConfig(32, 64, 32, 4, 4, reason="TF32 at batch 1"),
    TileConfig(128, 16, 16, 3, 4, reason="16 channels"),
    TileConfig(64, 32, 16, 3, 4, reason="IEEE fp32"),
)
TILES: dict[int, tuple[TileConfig, ...]] = {
    80: (LARGE, MIDDLE, *REST),
    86: (LARGE_8, MIDDLE, *REST),
    89: (LARGE_8, MIDDLE, *REST),
    90: (LARGE, MIDDLE, *REST),
    100: (LARGE_8, MIDDLE_8, *REST),
    120: (LARGE_8, MIDDLE, *REST),
}
# The table of csrc/cuda/conv_bn_join.cu, in its order. BLOCK_K counts 16-bit elements: in float32
# it is half as many.
CUDA_TILES = (
    TileConfig(128, 128, 64, 3, 8, reason="large batch: 8 warps hold two sums of 64x32 each"),
    TileConfig(128, 64, 64, 3, 4, reason="large batch: two sums of 64 registers a thread"),
    TileConfig(64, 64, 64, 3, 4, reason="14x14 and 7x7 maps: more blocks"),
)


@dataclass(frozen=True, slots=True)
class JoinProblem:
    """Two convolutions whose results are added, as a backend sees them.

    Args:
        main: the convolution of h, without a residual.
        projection: the one of x.
    """

    main: Problem
    projection: Problem

    @property
    def spec(self) -> JoinSpec:
        return JoinSpec(self.main.spec, self.projection.spec)

    @property
    def device(self) -> str:
        return self.main.device

    @property
    def arch(self) -> int:
        return self.main.arch

    @property
    def target(self) -> _hardware.Gpu | int:
        return self.main.target

    @property
    def parts(self) -> dict[str, tuple[Problem, str]]:
        """By the name of its map: each convolution, and what its weight is called."""
        return {"h": (self.main, "weight"), "x": (self.projection, "proj_weight")}


class JoinLaunch:
    """A join bound to a layer's tensors, which are read at each call: always fresh."""

    __slots__ = ("function", "tensors")
    growth = None

    def __init__(self, function: Callable[..., Tensor], *tensors) -> None:
        self.function, self.tensors = function, tensors

    def __call__(self, h: Tensor, x: Tensor, inplace: bool = False, finite: bool = False) -> Tensor:
        return self.function(h, x, *self.tensors)

    def fresh(self, weight: Tensor) -> bool:
        return True


# (weight, scale, shift, mean, var, eps, proj_weight, ..., proj_eps) -> a function of (h, x)
Bind = Callable[..., JoinLaunch]


@dataclass(slots=True)
class JoinPlan:
    """A problem, the backend that was chosen for it, and why the others were not.

    `tile` is how its one kernel cuts the work; None where two convolutions run, each by its own.
    `failed` is a backend that was chosen before and could not launch, and why.
    """

    problem: JoinProblem
    backend: str
    refusals: dict[str, str]
    bind: Bind
    calls: int = 0
    why: str = ""
    tile: TileConfig | None = None
    failed: str = ""

    @property
    def is_one_kernel(self) -> bool:
        """Whether the shortcut never exists."""
        return self.backend in FUSED

    def why_fallback(self) -> str:
        """Why no fused kernel of this device took the problem, or the one that was to failed."""
        if self.backend != "aten":
            return self.failed
        devices = {row.name: row.device for row in JOIN_BACKENDS}
        why = [r for name, r in self.refusals.items() if devices[name] == self.problem.device]
        return "; ".join(why) or f"no fused kernel for {self.problem.device}"


def plan(problem: JoinProblem, backend: str = AUTO) -> JoinPlan:
    """Choose a backend for `problem` and let it prepare; see `backends.plan`.

    Raises:
        ValueError: a backend asked for by argument refuses or has no join, or
            RESNET_FAST_BACKEND is unknown.
    """
    if backend not in names():
        raise ValueError(f"resnet_fast: {_names.unknown('backend', backend, names())}")
    wanted = backend if backend != AUTO else _env.backend() or AUTO
    backends.check_name(wanted)  # one that has no join is a preference that cannot be met
    return on_trial(functools.partial(_choose, problem, backend, wanted), backend)


def _choose(problem: JoinProblem, backend: str, wanted: str, known: dict[str, str]) -> JoinPlan:
    refusals: dict[str, str] = {}
    for row in sorted(_preferred(problem), key=lambda row: row.name != wanted):
        reason = known.get(row.name) or _refusal(row, problem)
        if reason is None:
            tile = row.choose(problem)
            return JoinPlan(problem, row.name, refusals, row.build(problem, tile), tile=tile)
        if row.name == backend:
            text = f"backend {backend!r} cannot take {problem.spec}: {reason}"
            raise ValueError(f"resnet_fast: {text}")
        refusals[row.name] = reason
    raise AssertionError("aten refuses nothing")


def explain(problem: JoinProblem) -> tuple[str, dict[str, str]]:
    """The first backend that takes `problem`, and for each other why it does not run."""
    reasons = {row.name: _refusal(row, problem) for row in _preferred(problem)}
    chosen = next(name for name, reason in reasons.items() if reason is None)
    others = {name: reason for name, reason in reasons.items() if name != chosen}
    return chosen, {name: why or f"{chosen} comes first" for name, why in others.items()}


def _preferred(problem: JoinProblem) -> list[Backend]:
    """The rows in the order of `preferences.py`, asked for both products as one."""
    row = problem.device == "cuda" and preference(problem.spec.as_one_product, problem.target)
    order = row.order if row else ()
    place = {name: i for i, name in enumerate(order)}
    return sorted(JOIN_BACKENDS, key=lambda row: place.get(row.name, len(order)))


def names() -> list[str]:
    """What the `backend` argument may be."""
    return [AUTO, *(row.name for row in JOIN_BACKENDS)]


def may_be_one_kernel(device: str, backend: str) -> bool:
    """Whether a backend that joins in one kernel could run where this device and name are asked."""
    if device != "cuda" and not triton_interprets():
        return False
    wanted = backend if backend != AUTO else _env.backend() or AUTO
    return wanted in (AUTO, *FUSED)


def _refusal(row: Backend, problem: JoinProblem) -> str | None:
    interpreted = row.name == "triton" and triton_interprets()
    if row.device not in (None, problem.device) and not interpreted:
        return f"runs on {row.device} tensors, not {problem.device}"
    return row.missing() or row.refusal(problem)


def _layout_refusal(problem: JoinProblem) -> str | None:
    """What both GPU kernels ask of the tensors."""
    for name, (part, weight) in problem.parts.items():
        if part.x not in ("channels_last", "channels_inner"):
            return f"{name} is {part.x}, not channels_last"
        if part.weight != "channels_last":
            return f"{weight} is {part.weight}, not channels_last"
        if not part.vectors:
            return f"a vector of {weight}'s BatchNorm is not contiguous"
    return None


# ---- cuda


def cuda_refusal(problem: JoinProblem) -> str | None:
    """Why csrc's kernel cannot take `problem`, or None: it must take both convolutions."""
    for name, part in (("main", problem.main), ("projection", problem.projection)):
        reason = cuda.kernel_refusal(part)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def choose_cuda_tile(spec: JoinSpec, target: heuristics.Target) -> int:
    """The index in CUDA_TILES of the tile with the least estimated time."""
    gpu = _hardware.described(target)
    tiles = cuda_tiles(spec.main.dtype)

    def microseconds(index: int) -> float:
        return _score(spec, tiles[index], gpu, heuristics.CUDA)

    return min(range(len(tiles)), key=microseconds)


def _score(
    spec: JoinSpec, tile: TileConfig, gpu: _hardware.Gpu, family: heuristics.Family
) -> float:
    """Estimated microseconds; a thread keeps the sums of both products."""
    whole = spec.as_one_product
    return heuristics.score(whole, tile, gpu, family, sums=SUMS).microseconds


def cuda_tiles(dtype: str) -> tuple[TileConfig, ...]:
    """CUDA_TILES in the elements of a dtype."""
    size = ELEMENT_SIZE[dtype]
    return tuple(replace(tile, BLOCK_K=tile.BLOCK_K * 2 // size) for tile in CUDA_TILES)


def _cuda_choose(problem: JoinProblem) -> TileConfig:
    spec = problem.spec
    return cuda_tiles(spec.main.dtype)[choose_cuda_tile(spec, problem.target)]


def _cuda_build(problem: JoinProblem, tile: TileConfig | None = None) -> Bind:
    from resnet_fast.kernels import cuda as kernel

    spec = problem.spec
    index = cuda_tiles(spec.main.dtype).index(tile or _cuda_choose(problem))
    stride = list(spec.projection.stride)
    kernel.module()  # registers the op's implementation
    run = torch.ops.resnet_fast._conv_bn_join_cuda.default

    def launch(
        h, x, weight, scale, shift, mean, var, eps,
        proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps,
    ) -> Tensor:  # fmt: skip
        y = new_output(h, spec.main)
        with on_device_of(h):
            run(
                h, weight.to(h.dtype), scale, shift, mean, var, eps,
                x, proj_weight.to(x.dtype), proj_scale, proj_shift, proj_mean, proj_var, proj_eps,
                stride, index, y,
            )  # fmt: skip
        return y

    return lambda *tensors: JoinLaunch(launch, *tensors)


# ---- triton


def _triton_missing() -> str | None:
    return _convolution("triton").missing()


def _triton_refusal(problem: JoinProblem) -> str | None:
    if not triton_interprets() and _hardware.nearest_architecture(problem.arch) is None:
        return f"compute capability {problem.arch / 10} is below 8.0"
    reason = _layout_refusal(problem)
    if reason is not None:
        return reason
    from resnet_fast.kernels import conv_bn_join as kernel

    reason = kernel.refusal(problem.spec)
    if reason is not None:
        return reason
    try:
        choose_tile(problem.spec, problem.target or INTERPRETED_ARCH)
    except ValueError as error:
        return str(error)
    return None


def choose_tile(spec: JoinSpec, target: heuristics.Target) -> TileConfig:
    """The Triton tile with the least estimated time on a GPU, or on a compute capability.

    Raises:
        ValueError: no tile of the table is legal.
    """
    gpu = _hardware.described(target)
    tiles = TILES[_hardware.nearest_architecture(gpu.capability)]
    refusals = {tile: tile_refusal(spec, tile, gpu) for tile in tiles}
    legal = [tile for tile, reason in refusals.items() if reason is None]
    if not legal:
        tile, reason = next(iter(refusals.items()))
        raise ValueError(f"no Triton tile for {spec} on sm_{gpu.capability}: {tile}: {reason}")
    return min(legal, key=lambda tile: _score(spec, tile, gpu, heuristics.TRITON))


def tile_refusal(spec: JoinSpec, tile: TileConfig, gpu: _hardware.Gpu) -> str | None:
    """Why `tile` cannot or should not cut `spec`; the longer product decides its row length."""
    parts = (spec.main, spec.projection)
    size = ELEMENT_SIZE[spec.main.dtype]
    gathered = max(tile.BLOCK_M, tile.BLOCK_N) * tile.BLOCK_K // (32 * tile.NUM_WARPS)
    if any(part.c * size % 16 for part in parts) and gathered > heuristics.GATHERED:
        return f"odd channels: {gathered} addresses a thread, {heuristics.GATHERED} at most"
    longer = max(parts, key=lambda part: filter_walk(part).products)
    return heuristics.refusal(longer, tile, gpu)


def _triton_choose(problem: JoinProblem) -> TileConfig:
    return choose_tile(problem.spec, problem.target or INTERPRETED_ARCH)


def _triton_build(problem: JoinProblem, tile: TileConfig | None = None) -> Bind:
    from resnet_fast.kernels import conv_bn_join as kernel

    main, projection, spec = problem.main, problem.projection, problem.spec
    arch = problem.arch or INTERPRETED_ARCH
    operands = kernel.Operands(
        main.x_strides, projection.x_strides, main.vector_dtypes, projection.vector_dtypes,
        main.aligned and projection.aligned,
    )  # fmt: skip
    run = kernel.build(spec, tile or _triton_choose(problem), operands, arch=arch)

    def launch(h, x, weight, scale, shift, mean, var, eps, proj_weight, *proj_vectors) -> Tensor:
        y = new_output(h, spec.main)
        with on_device_of(h):
            run(
                h, weight.to(h.dtype), scale, shift, mean, var, eps,
                x, proj_weight.to(x.dtype), *proj_vectors, y,
            )  # fmt: skip
        return y

    return lambda *tensors: JoinLaunch(launch, *tensors)


# ---- cpu and aten: two convolutions


def _convolution(name: str) -> Backend:
    return next(row for row in backends.BACKENDS if row.name == name)


def _adding(problem: Problem) -> Problem:
    """The main convolution, to which the shortcut is added."""
    return replace(problem, spec=replace(problem.spec, residual=True), residual="channels_last")


def _two_refusal(name: str) -> Callable[[JoinProblem], str | None]:
    def refusal(problem: JoinProblem) -> str | None:
        row = _convolution(name)
        return row.refusal(_adding(problem.main)) or row.refusal(problem.projection)

    return refusal


def _two_build(name: str) -> Callable[[JoinProblem], Bind]:
    def build(problem: JoinProblem, tile: None = None) -> Bind:
        row = _convolution(name)
        main, projection = row.build(_adding(problem.main)), row.build(problem.projection)

        def launch(h, x, *tensors) -> Tensor:
            shortcut = projection(*tensors[6:])(x, None)
            return main(*tensors[:6])(h, shortcut, True)

        return lambda *tensors: JoinLaunch(launch, *tensors)

    return build


def _nothing(*_) -> None:
    return None


JOIN_BACKENDS = (
    Backend("cuda", "cuda", cuda.missing, cuda_refusal, _cuda_build, choose=_cuda_choose),
    Backend("triton", "cuda", _triton_missing, _triton_refusal, _triton_build,
            choose=_triton_choose),
    Backend("cpu", "cpu", _nothing, _two_refusal("cpu"), _two_build("cpu")),
    Backend("aten", None, _nothing, _nothing, _two_build("aten")),
)  # fmt: skip
