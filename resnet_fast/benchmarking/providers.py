# SPDX-License-Identifier: Apache-2.0
"""Who is measured: a row each, in the strongest honest form, for whole models and for single ops.

A provider builds a `Candidate` for a case, or raises to say why it cannot. What conversion it needs
(memory order, another array type) is done to the inputs before the clock runs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import ops
from resnet_fast.benchmarking import cases, cudnn, formulas
from resnet_fast.benchmarking.cases import ModelCase, OpCase
from resnet_fast.benchmarking.protocol import Candidate, Inputs, LeftOut, Missing
from resnet_fast.comparison import providers as peers

# What `--quick` has the time to compile: (model, batch).
QUICK_COMPILED = (("resnet18", 1),)
EAGER = {"models": "torchvision-channels_last", "ops": "aten"}
OURS = "resnet_fast"


@dataclass(frozen=True, slots=True)
class ModelWork:
    """A model case's material.

    Args:
        case: the model, batch and dtype.
        theirs, ours: torchvision's model and ours, float32, eval, on the CPU, of the same weights.
        x: [N, 3, 224, 224] of the case's dtype on its device, channels_last.
        quick: whether what takes long to build should leave itself out.
    """

    case: ModelCase
    theirs: nn.Module
    ours: nn.Module
    x: Tensor
    quick: bool = False

    def placed(self, model: nn.Module) -> nn.Module:
        """A copy on the case's device, in its dtype, channels_last."""
        model = copy.deepcopy(model).to(self.x.device, self.x.dtype)
        return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class OpWork:
    """An op case's material: the case, and the op as a module on its device."""

    case: OpCase
    module: nn.Module
    device: torch.device


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to compute a case.

    Args:
        name: what `--providers` calls it.
        about: one line for the report.
        build: makes it ready for a ModelWork or an OpWork.
        device: "cuda" or "cpu" where it exists on one only.
        extent: the least of `cases.EXTENTS` by which it is asked.
        seconds: that it takes to get ready, about, by suite.
        ops: that it takes; of models, all.
    """

    name: str
    about: str
    build: Callable[[object], Candidate]
    device: str | None = None
    extent: str = cases.QUICK
    seconds: dict[str, float] = field(default_factory=lambda: {"models": 0.5, "ops": 0.02})
    ops: tuple[str, ...] = cases.OPS


def contiguous(inputs: Inputs) -> Inputs:
    return tuple(t.contiguous() for t in inputs)


# ---- whole models


def _eager(work: ModelWork, benchmark: bool = False, nhwc: bool = True) -> Candidate:
    model = work.placed(work.theirs)
    if not nhwc:
        model = model.to(memory_format=torch.contiguous_format)
    how = {**_cudnn(benchmark, work.x.device), "backend": "torch"}
    if nhwc:
        return Candidate(model, **how)
    return Candidate(model, contiguous, layout="contiguous", **how)


def _cudnn(benchmark: bool, device: torch.device) -> dict[str, object]:
    """How a candidate is called whose convolutions are cuDNN's, which searches or does not.

    A case's main thread has what was searched for (`suite.measure_case`).
    """
    apart = device.type == "cuda" and not benchmark
    return {"around": partial(_cudnn_flags, benchmark), "own_thread": apart}


@contextlib.contextmanager
def _cudnn_flags(benchmark: bool):
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def _cudnn_fused(work: ModelWork) -> Candidate:
    cudnn.check_available(work.x.device)
    model = work.placed(cudnn.CudnnFused(work.theirs))
    return Candidate(model, backend="cuDNN, fused calls", **_cudnn(True, work.x.device))


def _compile(work: ModelWork, mode: str | None = None, graphable: bool = True) -> Candidate:
    if work.quick and (work.case.model, work.case.batch) not in QUICK_COMPILED:
        raise LeftOut("compiling takes longer than --quick may take; run without it")
    call = peers.compiled(work.placed(work.theirs), mode)
    graphable = graphable or not work.x.is_cuda  # its graphs are a GPU's
    return Candidate(call, around=torch.no_grad, backend="Inductor, freezing", graphable=graphable)


def _openvino(work: ModelWork) -> Candidate:
    try:
        call = peers.openvino_call(copy.deepcopy(work.theirs), work.x.dtype, work.x.device)
    except ValueError as error:
        raise Missing(str(error)) from None
    return Candidate(call, _float_contiguous, layout="contiguous", backend="OpenVINO")


def _onnxruntime(work: ModelWork) -> Candidate:
    try:
        call = peers.onnxruntime_call(copy.deepcopy(work.theirs), work.x)
    except ValueError as error:
        raise Missing(str(error)) from None
    return Candidate(call, contiguous, layout="contiguous", backend="ONNX Runtime")


def _float_contiguous(inputs: Inputs) -> Inputs:
    return tuple(t.float().contiguous() for t in inputs)


def _tensorrt(work: ModelWork) -> Candidate:
    try:
        call = peers.torch_tensorrt_call(work.placed(work.theirs), work.x)
    except ValueError as error:
        raise Missing(str(error)) from None
    return Candidate(call, around=torch.no_grad, backend="TensorRT")


def _ours(work: ModelWork) -> Candidate:
    model = work.placed(work.ours)
    return Candidate(model, backend=partial(_backends_of, model))


def _ours_by(work: ModelWork, backend: str) -> Candidate:
    model = resnet_fast.optimize(work.placed(work.theirs), backend=backend, strict=True)
    return Candidate(model, backend=partial(_backends_of, model))


def _backends_of(model: nn.Module) -> str:
    """The backends that ran a model's blocks, as its report says."""
    report = resnet_fast.report(model)
    used = sorted({name for row in report for name in row.backend.split(", ") if name})
    return f"{', '.join(used)}: {report.fused} of {len(report)} blocks fused"


def _ours_graph(work: ModelWork) -> Candidate:
    capture = getattr(resnet_fast, "cuda_graph", None)
    if capture is None:
        raise Missing("this resnet_fast has no cuda_graph")
    if not work.x.is_cuda:
        raise Missing(f"CUDA graphs run on a GPU, not on the {work.x.device.type}")
    # Recorded in the first call, which is made under inference_mode; it is no graph to capture.
    graph = capture(work.placed(work.ours), clone=False)
    return Candidate(graph, backend="CUDA graph", graphable=False)


COMPILING, AUTOTUNING = {"models": 25.0, "ops": 3.0}, {"models": 600.0}
MODEL_PROVIDERS = (
    Provider("torchvision-contiguous", "torchvision, NCHW", partial(_eager, nhwc=False)),
    Provider(EAGER["models"], "torchvision, channels_last", _eager),
    Provider("torchvision-cudnn-benchmark", "torchvision, channels_last, cudnn.benchmark",
             partial(_eager, benchmark=True), "cuda"),
    Provider("cudnn-fused", "cudnn_convolution_(add_)relu, BatchNorm folded", _cudnn_fused, "cuda"),
    Provider("compile", "torch.compile, freezing; on a GPU cudnn.benchmark, as below", _compile,
             seconds=COMPILING),
    Provider("compile-reduce-overhead", "torch.compile with CUDA graphs, freezing",
             partial(_compile, mode="reduce-overhead", graphable=False), "cuda",
             cases.USUAL, COMPILING),
    Provider("compile-max-autotune", "torch.compile, max-autotune, freezing",
             partial(_compile, mode="max-autotune", graphable=False), None, cases.FULL, AUTOTUNING),
    Provider("torch-tensorrt", "TensorRT", _tensorrt, "cuda", cases.USUAL, COMPILING),
    Provider("openvino", "OpenVINO", _openvino, "cpu", seconds={"models": 3.0}),
    Provider("onnxruntime", "ONNX Runtime", _onnxruntime, "cpu", cases.USUAL, COMPILING),
    Provider(OURS, "ours, the backend it chooses", _ours),
    Provider("resnet_fast-cuda-graph", "ours in a CUDA graph", _ours_graph, "cuda"),
)  # fmt: skip


# ---- single ops


def _aten(work: OpWork, benchmark: bool = False) -> Candidate:
    return Candidate(work.module, backend="torch", **_cudnn(benchmark, work.device))


def _aten_folded(work: OpWork) -> Candidate:
    how = _cudnn(True, work.device)
    return Candidate(formulas.folded(work.module), backend="torch", **how)


def _op_cudnn(work: OpWork) -> Candidate:
    cudnn.check_available(work.device)
    if work.case.spec.activation != "relu":
        raise LeftOut("cuDNN's fused calls end with a ReLU")
    conv = formulas.folded(work.module).conv
    call = cudnn.conv_add_relu if work.case.spec.residual else cudnn.conv_relu
    return Candidate(partial(call, conv), backend="cuDNN, fused call", **_cudnn(True, work.device))


def _op_compile(work: OpWork) -> Candidate:
    call = peers.compiled(work.module)
    return Candidate(call, around=torch.no_grad, backend="Inductor, freezing")


def _op_ours(work: OpWork, backend: str = "auto") -> Candidate:
    call = formulas.ours(work.case, work.module, backend)
    return Candidate(call, backend=partial(_backend_of, work), tile=partial(_tile_of, work))


LAST_PLAN = {
    "conv_bn_act": ops.last_plan,
    "conv_bn_join": ops.last_join_plan,
    "stem_pool": ops.last_stem_plan,
}


def _backend_of(work: OpWork) -> str:
    """The backend that ran the last call; add_relu has no plan but one backend per dtype."""
    case = work.case
    if case.op in LAST_PLAN:
        return LAST_PLAN[case.op]().backend
    return ops.explain_add_relu(str(work.device), case.spec.dtype)[0]


def _tile_of(work: OpWork) -> str:
    """The tile of the last call's kernel; "" where there is none."""
    plan = LAST_PLAN[work.case.op]() if work.case.op in LAST_PLAN else None
    return str(plan.tile) if plan and plan.tile else ""


WITH_NORM = ("conv_bn_act", "conv_bn_join", "stem_pool")  # add_relu takes no backend either
OP_PROVIDERS = (
    Provider("aten", "torch, unfused", _aten),
    Provider("aten-cudnn-benchmark", "torch, unfused, cudnn.benchmark",
             partial(_aten, benchmark=True), "cuda", ops=WITH_NORM),
    Provider("aten-folded", "torch, BatchNorm folded; on a GPU cudnn.benchmark", _aten_folded,
             ops=WITH_NORM),
    Provider("cudnn-fused", "cudnn_convolution_(add_)relu, BatchNorm folded", _op_cudnn, "cuda",
             ops=("conv_bn_act",)),
    Provider("compile", "torch.compile of the unfused formula, freezing", _op_compile,
             seconds=COMPILING),
    Provider(OURS, "ours, the backend it chooses", _op_ours),
)  # fmt: skip


def providers_of(suite: str, device: str) -> tuple[Provider, ...]:
    """All providers of a suite; ours also by each backend that the ops know."""
    chosen, others = ops.explain(device, "float32")
    fixed, by = {
        "models": (MODEL_PROVIDERS, _ours_by),
        "ops": (OP_PROVIDERS, _op_ours),
    }[suite]
    each = tuple(
        Provider(
            f"{OURS}-{name}", f"ours, backend {name}", partial(by, backend=name),
            _device_of(others.get(name, "")), cases.QUICK if suite == "ops" else cases.USUAL,
            ops=WITH_NORM,
        )
        for name in sorted([chosen, *others])
    )  # fmt: skip
    return fixed + each


def _device_of(refusal: str) -> str | None:
    """The device type that a backend's refusal asks for: "runs on cuda tensors, not cpu"."""
    words = refusal.split()
    return words[2] if refusal.startswith("runs on ") else None


def of_suite(suite: str) -> list[Provider]:
    """All providers of a suite, of any device."""
    listed = (provider for device in ("cpu", "cuda") for provider in providers_of(suite, device))
    return list({provider.name: provider for provider in listed}.values())


def names() -> list[str]:
    """What `--providers` may name, of any suite and device."""
    return list(dict.fromkeys(p.name for suite in ("models", "ops") for p in of_suite(suite)))


def choose(
    case: ModelCase | OpCase, device: str, wanted: tuple[str, ...], extent: str
) -> tuple[list[Provider], dict[str, str]]:
    """The providers to ask, and those that are not, each with the reason.

    Who is named is asked in any case: then its rows say why it has no time. Otherwise those of
    another device are left out at once, as are those too slow for the extent.
    """
    asked, left_out, order = [], {}, list(cases.EXTENTS)
    op = getattr(case, "op", None)
    for provider in providers_of("ops" if op else "models", device):
        if op and op not in provider.ops:
            continue
        if wanted:
            if provider.name in wanted:
                asked.append(provider)
        elif provider.device not in (None, device):
            left_out[provider.name] = f"runs on {provider.device}, this is {device}"
        elif order.index(provider.extent) > order.index(extent):
            more = "--full" if provider.extent == cases.FULL else "a run without --quick"
            left_out[provider.name] = f"part of {more} alone; or name it with --providers"
        else:
            asked.append(provider)
    return asked, left_out
