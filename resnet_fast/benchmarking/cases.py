# SPDX-License-Identifier: Apache-2.0
"""What is measured: the ops at the shapes that ResNets have, and the ResNets themselves.

Shapes are read off the models, layer by layer, never written down. The residual additions, the
projection blocks' joins and the stems follow from the same lists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from resnet_fast import models, ops
from resnet_fast.measuring.peers import FULL, QUICK, USUAL
from resnet_fast.profiling.layers import Layer, layers_of, touched_pixels
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec

SUITES = ("models", "ops")  # in this order: where time runs out, models say most
DTYPES = ("float32", "tf32", "float16", "bfloat16")
BATCHES = (1, 8, 32, 128, 256)
SHAPES_FROM = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
IMAGE = 224


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured by default.

    Args:
        models: by name; empty for all.
        batches, op_batches: of models and of ops.
        dtypes: by device type.
        convolutions: how many of the heaviest; None for all.
    """

    models: Sequence[str]
    batches: Sequence[int]
    op_batches: Sequence[int]
    dtypes: dict[str, Sequence[str]]
    convolutions: int | None


FIRST_MODELS = ("resnet18", "resnet50")  # that people meet
EXTENTS = {
    # Under three minutes on two cores.
    QUICK: Extent(
        FIRST_MODELS,
        batches=(1, 8),
        op_batches=(1,),
        dtypes=dict.fromkeys(("cpu", "cuda"), ("float32", "bfloat16")),
        convolutions=4,
    ),
    # Half an hour on a GPU.
    USUAL: Extent(
        FIRST_MODELS,
        batches=(1, 8, 32),
        op_batches=(1, 32),
        dtypes={"cpu": ("float32", "bfloat16"), "cuda": ("tf32", "float16")},
        convolutions=8,
    ),
    # Days on a GPU: each model is autotuned at each batch.
    FULL: Extent(
        (),
        batches=BATCHES,
        op_batches=BATCHES,
        dtypes=dict.fromkeys(("cpu", "cuda"), DTYPES),
        convolutions=None,
    ),
}


@dataclass(frozen=True, slots=True)
class OpCase:
    """One op at one shape.

    Args:
        op: of `ops.OPS`.
        spec: the convolution; for add_relu, the one that made the first summand.
        where: the layers that have it, of all models.
        projection: of a join, the shortcut's convolution.
        dtype: of `DTYPES`.
        layers: how many layers those are.
    """

    op: str
    spec: ConvSpec
    where: str
    dtype: str
    projection: ConvSpec | None = None
    layers: int = 1

    def __str__(self) -> str:
        return label("ops", self.op, self.shape, self.dtype, self.batch)

    @property
    def batch(self) -> int:
        return self.spec.n

    @property
    def convolutions(self) -> tuple[ConvSpec, ...]:
        """Those that the op computes: add_relu adds to the output of one, and computes none."""
        if self.op == "add_relu":
            return ()
        return (self.spec, self.projection) if self.projection else (self.spec,)

    @property
    def shape(self) -> str:
        s = self.spec
        return " and ".join(map(str, self.convolutions)) or f"{s.n}x{s.p}x{s.q}x{s.k}, {s.dtype}"

    @property
    def flops(self) -> int:
        return sum(spec.flops for spec in self.convolutions)

    @property
    def k_gemm(self) -> int:
        return sum(spec.k_gemm for spec in self.convolutions) or 1

    @property
    def bytes(self) -> int:
        """Each tensor once; a join's shortcut and a stem's full map never reach memory."""
        s, size = self.spec, ELEMENT_SIZE[self.spec.dtype]
        maps = {"add_relu": 3, "stem_pool": 0}.get(self.op, 1 + s.residual)
        pooled = s.n * ((s.p + 1) // 2) * ((s.q + 1) // 2) * s.k if self.op == "stem_pool" else 0
        read = (touched_bytes(replace(spec, residual=False)) for spec in self.convolutions)
        written = sum(spec.m * spec.k for spec in self.convolutions)
        return sum(read) + (maps * s.m * s.k + pooled - written) * size


def touched_bytes(spec: ConvSpec) -> int:
    """`spec.bytes_minimum` without the pixels that a stride steps over."""
    skipped = (spec.n * spec.h * spec.w - touched_pixels(spec)) * spec.c
    return spec.bytes_minimum - skipped * ELEMENT_SIZE[spec.dtype]


@dataclass(frozen=True, slots=True)
class ModelCase:
    """One model at one batch and dtype."""

    model: str
    batch: int
    dtype: str

    @property
    def shape(self) -> str:
        return f"{self.batch}x3x{IMAGE}x{IMAGE}"

    def __str__(self) -> str:
        return label("models", self.model, self.shape, self.dtype, self.batch)


def label(suite: str, subject: str, shape: str, dtype: str, batch: int) -> str:
    """A case in a few words."""
    if suite == "models":
        return f"{subject}, {dtype}, batch {batch}"
    return f"{subject} {shape}" + (" (tf32)" if dtype == "tf32" else "")


def torch_dtype(dtype: str) -> torch.dtype:
    """The tensors' dtype: "tf32" is a way to multiply float32."""
    return getattr(torch, dtype.replace("tf32", "float32"))


def model_names() -> list[str]:
    """The builders that torchvision has too: there is something to compare them with."""
    from_resnet = f"{models.__name__}.resnet"
    return [
        name
        for name in models.list_models()
        if models.get_model_builder(name).__module__ == from_resnet
    ]


def model_cases(
    names: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], device: str
) -> list[ModelCase]:
    """By model, dtype and batch; TF32 is a GPU's."""
    return [
        ModelCase(model, batch, dtype)
        for model in names
        for dtype in runnable(dtypes, device)
        for batch in batches
    ]


def runnable(dtypes: Sequence[str], device: str) -> list[str]:
    """The dtypes that mean something on a device type."""
    return [dtype for dtype in dtypes if dtype != "tf32" or device == "cuda"]


def op_cases(
    names: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    device: str,
    heaviest: int | None = None,
) -> list[OpCase]:
    """Every distinct op of the models.

    Args:
        names: of models; `SHAPES_FROM` for all.
        batches, dtypes: as of `BATCHES` and `DTYPES`.
        device: "cpu" or "cuda".
        heaviest: take so many convolutions, those that need most FLOPs in all layers that have
            them, and one of each of the other ops.
    """
    shapes = distinct_ops(tuple(names))
    kept = []
    for op in ops.OPS:
        of_op = [case for case in shapes if case.op == op]
        if heaviest is not None:
            of_op.sort(key=lambda c: (c.layers * c.flops, c.layers * c.bytes), reverse=True)
            of_op = of_op[: heaviest if op == "conv_bn_act" else 1]
        kept += of_op
    return [at(case, batch, dtype) for case in kept for dtype in runnable(dtypes, device)
            for batch in batches]  # fmt: skip


def at(case: OpCase, batch: int, dtype: str) -> OpCase:
    """The case with another batch and dtype."""

    def moved(spec: ConvSpec | None) -> ConvSpec | None:
        precision = "tf32" if dtype == "tf32" else "ieee"
        element = dtype.replace("tf32", "float32")
        return spec and replace(spec, n=batch, dtype=element, precision=precision)

    return replace(case, spec=moved(case.spec), projection=moved(case.projection), dtype=dtype)


@functools.cache
def distinct_ops(names: tuple[str, ...]) -> tuple[OpCase, ...]:
    """The ops of the models at batch 1 in float32, each once, with all layers that have it."""
    found: dict[tuple, list[str]] = {}
    for name in names:
        for op, spec, projection, layer in _ops_of(name):
            key = (op, spec, projection)
            if op == "add_relu":  # of which only the output counts
                key = next((k for k in found if k[0] == op and _adds(k[1]) == _adds(spec)), key)
            found.setdefault(key, []).append(f"{name}.{layer}")
    return tuple(
        OpCase(op, spec, _named(where), "float32", projection, len(where))
        for (op, spec, projection), where in found.items()
    )


def _adds(spec: ConvSpec) -> tuple[int, ...]:
    return (spec.n, spec.p, spec.q, spec.k)


def _named(layers: list[str]) -> str:
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return layers[0] + more


def _ops_of(name: str) -> Iterable[tuple[str, ConvSpec, ConvSpec | None, str]]:
    """(op, convolution, projection, layer) of a model, from its unfused layers."""
    listed = [layer for layer in layers_of(name, fused=False) if layer.spec]
    blocks: dict[str, list[Layer]] = {}
    for layer in listed:
        blocks.setdefault(_block(layer.name), []).append(layer)
    for block, parts in blocks.items():
        projection = next((_spec(p, "none", False) for p in parts if "downsample" in p.name), None)
        main = [p for p in parts if "downsample" not in p.name]
        for layer in main[:-1]:
            yield "conv_bn_act", _spec(layer, "relu", False), None, layer.name
        last = main[-1]
        if not block:
            yield "conv_bn_act", _spec(last, "relu", False), None, last.name
            yield "stem_pool", _spec(last, "relu", False), None, last.name
            continue
        yield "conv_bn_act", _spec(last, "relu", True), None, last.name
        yield "add_relu", _spec(last, "none", False), None, block
        if projection is not None:
            yield "conv_bn_act", projection, None, f"{block}.downsample"
            yield ops.CONV_BN_JOIN.name, _spec(last, "relu", False), projection, block


def _block(layer: str) -> str:
    """The block a layer belongs to: "layer1.0" of "layer1.0.downsample.0"; "" for the stem."""
    return ".".join(layer.split(".")[:2]) if "." in layer else ""


def _spec(layer: Layer, activation: str, residual: bool) -> ConvSpec:
    return replace(layer.spec, activation=activation, residual=residual, norm=True)
