# SPDX-License-Identifier: Apache-2.0
"""The one list of ways to run a whole ResNet that are measured, each in its strongest honest form.

A provider builds an `Entrant` for a case, or raises to say why it cannot. What conversion it needs
(memory order, another array type) is done to the inputs before the clock runs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import _names, ops
from resnet_fast.measuring import cudnn
from resnet_fast.measuring.protocol import Entrant, Inputs, LeftOut, Missing

OURS = "resnet_fast"
NCHW, NHWC = "torchvision-contiguous", "torchvision-channels_last"
SEARCHED = "torchvision-cudnn-benchmark"
EAGER = (NCHW, NHWC, SEARCHED)
NAMED = ("compile", "openvino")  # that `compare` times where it is asked to
QUICK, USUAL, FULL = "quick", "usual", "full"  # how much of the suite is run

Call = Callable[[Tensor], Tensor]  # [N, 3, H, W] -> [N, num_classes]


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model's providers are given.

    Args:
        theirs, ours: torchvision's model and ours, float32, eval, on the CPU, of the same weights.
        x: [N, 3, 224, 224] of the case's dtype on its device, channels_last.
        compiles: whether there is the time to compile.
    """

    theirs: nn.Module
    ours: nn.Module
    x: Tensor
    compiles: bool = True

    def placed(self, model: nn.Module) -> nn.Module:
        """A copy on the case's device, in its dtype, channels_last."""
        model = copy.deepcopy(model).to(self.x.device, self.x.dtype)
        return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to compute a case.

    Args:
        name: the one spelling, in options, tables and files.
        about: one line for the report.
        build: makes it ready for a ModelWork or an OpWork.
        device: "cuda" or "cpu" where it exists on one only.
        extent: the least of "quick", "usual" and "full" by which it is asked.
        seconds: that it takes to get ready, about, by suite.
        ops: that it computes; empty for all of them.
    """

    name: str
    about: str
    build: Callable[[object], Entrant]
    device: str | None = None
    extent: str = QUICK
    seconds: dict[str, float] = field(default_factory=lambda: {"models": 0.5, "ops": 0.02})
    ops: tuple[str, ...] = ()


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """cuDNN at its best: it searches. Providers measured without that have a thread of their own.

    Enter it before references are made: the first to run a convolution chooses for its thread.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def how_cudnn(benchmark: bool, device: torch.device) -> dict[str, object]:
    """How a entrant with cuDNN's convolutions is called: with the search or without."""
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


def contiguous(inputs: Inputs) -> Inputs:
    return tuple(t.contiguous() for t in inputs)


def compiled(model: nn.Module, mode: str | None = None) -> Call:
    """Inductor with freezing, which folds BatchNorm; torch.compile's options do not reach it.

    Call it under no_grad: what is compiled under inference_mode runs slower. Each model compiled
    adds to what Dynamo looks through: `torch._dynamo.reset()` between many of them, after which
    all that lived before is compiled anew.

    Args:
        model: in eval mode, on its device, in its dtype and memory format.
        mode: of torch.compile.
    """
    from torch._inductor import config

    frozen = torch.compile(model, dynamic=False, mode=mode)
    seen = set()

    def call(x: Tensor, *more: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if x.shape in seen:
            return frozen(x, *more)
        seen.add(x.shape)
        with config.patch(freezing=True):  # read when it compiles; ten microseconds elsewhere
            return frozen(x, *more)

    return call


def openvino_call(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Call:
    """OpenVINO on the CPU, at its hint for latency; takes contiguous float32.

    Raises:
        Missing: it is not installed, or the device is none of its.
    """
    if find_spec("openvino") is None:
        raise Missing('OpenVINO is not installed; pip install "resnet_fast[bench]"')
    if device.type != "cpu":
        raise Missing(f"OpenVINO is compared on the CPU, not on {device.type}")
    import openvino

    example = torch.zeros(1, 3, 224, 224)
    graph = openvino.convert_model(model.float(), example_input=example)
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    by_shape: dict[torch.Size, object] = {}

    def call(x: Tensor) -> Tensor:
        compiled = by_shape.get(x.shape)
        if compiled is None:
            graph.reshape(list(x.shape))
            compiled = by_shape[x.shape] = openvino.Core().compile_model(graph, "CPU", settings)
        # It takes float32 and converts by itself: it has no bfloat16 arrays.
        return torch.from_numpy(compiled(x.float().contiguous().numpy())[0])

    return call


def onnxruntime_call(model: nn.Module, example: Tensor) -> Call:
    """ONNX Runtime on the CPU, with all of its graph optimizations; takes contiguous float32.

    Raises:
        Missing: it is not installed, or cannot run the dtype or on the device.
    """
    for package in ("onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            raise Missing(f"{package} is not installed; pip install onnxruntime onnxscript")
    if example.device.type != "cpu" or example.dtype != torch.float32:
        where = f"{str(example.dtype).removeprefix('torch.')} on {example.device.type}"
        raise Missing(f"ONNX Runtime is compared in float32 on the CPU, not in {where}")
    import onnxruntime

    with torch.no_grad():
        program = torch.onnx.export(
            model, (example.contiguous(),), dynamo=True, verbose=False, optimize=True
        )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    graph = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def torch_tensorrt_call(model: nn.Module, example: Tensor) -> Call:
    """TensorRT through torch-tensorrt, at the example's shape and dtype.

    Raises:
        Missing: it is not installed, or there is no GPU.
    """
    if find_spec("torch_tensorrt") is None:
        raise Missing("torch-tensorrt is not installed; pip install torch-tensorrt")
    if example.device.type != "cuda":
        raise Missing(f"TensorRT runs on a GPU, not on the {example.device.type}")
    import torch_tensorrt

    # Explicit typing: in the model's own dtype, which a set of enabled ones is refused beside.
    return torch_tensorrt.compile(
        model, ir="dynamo", inputs=[example], use_explicit_typing=True,
        disable_tf32=torch.backends.cudnn.conv.fp32_precision != "tf32",
    )  # fmt: skip


# ---- the list


def _eager(work: ModelWork, benchmark: bool = False, nhwc: bool = True) -> Entrant:
    model = work.placed(work.theirs)
    if not nhwc:
        model = model.to(memory_format=torch.contiguous_format)
    how = {**how_cudnn(benchmark, work.x.device), "backend": "torch"}
    if nhwc:
        return Entrant(model, **how)
    return Entrant(model, contiguous, layout="contiguous", **how)


def _cudnn_fused(work: ModelWork) -> Entrant:
    cudnn.check_available(work.x.device)
    model = work.placed(cudnn.CudnnFused(work.theirs))
    return Entrant(model, backend="cuDNN, fused calls", **how_cudnn(True, work.x.device))


def _compile(work: ModelWork, mode: str | None = None, graphable: bool = True) -> Entrant:
    if not work.compiles:
        raise LeftOut("compiling takes longer than --quick may take; run without it")
    call = compiled(work.placed(work.theirs), mode)
    graphable = graphable or not work.x.is_cuda  # its graphs are a GPU's
    return Entrant(call, around=torch.no_grad, backend="Inductor, freezing", graphable=graphable)


def _openvino(work: ModelWork) -> Entrant:
    call = openvino_call(copy.deepcopy(work.theirs), work.x.dtype, work.x.device)
    return Entrant(call, _float_contiguous, layout="contiguous", backend="OpenVINO")


def _onnxruntime(work: ModelWork) -> Entrant:
    call = onnxruntime_call(copy.deepcopy(work.theirs), work.x)
    return Entrant(call, contiguous, layout="contiguous", backend="ONNX Runtime")


def _float_contiguous(inputs: Inputs) -> Inputs:
    return tuple(t.float().contiguous() for t in inputs)


def _tensorrt(work: ModelWork) -> Entrant:
    call = torch_tensorrt_call(work.placed(work.theirs), work.x)
    return Entrant(call, around=torch.no_grad, backend="TensorRT")


def _ours(work: ModelWork) -> Entrant:
    model = work.placed(work.ours)
    return Entrant(model, backend=partial(_backends_of, model))


def _ours_by(work: ModelWork, backend: str) -> Entrant:
    model = resnet_fast.optimize(work.placed(work.theirs), backend=backend, strict=True)
    return Entrant(model, backend=partial(_backends_of, model))


def _backends_of(model: nn.Module) -> str:
    """The backends that ran a model's blocks, as its report says."""
    report = resnet_fast.report(model)
    used = sorted({name for row in report for name in row.backend.split(", ") if name})
    return f"{', '.join(used)}: {report.fused} of {len(report)} blocks fused"


def _ours_graph(work: ModelWork) -> Entrant:
    if not work.x.is_cuda:
        raise Missing(f"CUDA graphs run on a GPU, not on the {work.x.device.type}")
    # Recorded in the first call, which is made under inference_mode; it cannot be captured again.
    graph = resnet_fast.cuda_graph(work.placed(work.ours), clone=False)
    return Entrant(graph, backend="CUDA graph", graphable=False)


COMPILING, AUTOTUNING = {"models": 25.0, "ops": 3.0}, {"models": 600.0}
MODEL_PROVIDERS = (
    Provider(NCHW, "torchvision, NCHW", partial(_eager, nhwc=False)),
    Provider(NHWC, "torchvision, channels_last", _eager),
    Provider(SEARCHED, "torchvision, channels_last, cudnn.benchmark",
             partial(_eager, benchmark=True), "cuda"),
    Provider("cudnn-fused", "cudnn_convolution_(add_)relu, BatchNorm folded", _cudnn_fused, "cuda"),
    Provider("compile", "torch.compile with freezing; on a GPU cudnn.benchmark, as below", _compile,
             seconds=COMPILING),
    Provider("compile-reduce-overhead", "torch.compile with CUDA graphs, freezing",
             partial(_compile, mode="reduce-overhead", graphable=False), "cuda",
             USUAL, COMPILING),
    Provider("compile-max-autotune", "torch.compile, max-autotune, freezing",
             partial(_compile, mode="max-autotune", graphable=False), None, FULL, AUTOTUNING),
    Provider("torch-tensorrt", "TensorRT", _tensorrt, "cuda", USUAL, COMPILING),
    Provider("openvino", "OpenVINO", _openvino, "cpu", seconds={"models": 3.0}),
    Provider("onnxruntime", "ONNX Runtime", _onnxruntime, "cpu", USUAL, COMPILING),
    Provider(OURS, "ours, the backend it chooses", _ours),
    Provider("resnet_fast-cuda-graph", "ours in a CUDA graph", _ours_graph, "cuda"),
)  # fmt: skip


def model_providers() -> tuple[Provider, ...]:
    """All of them; ours also by each backend that the ops know."""
    return MODEL_PROVIDERS + tuple(
        Provider(f"{OURS}-{name}", f"ours, backend {name}", partial(_ours_by, backend=name),
                 device, USUAL)
        for name, device in sorted(ops.backend_devices().items())
    )  # fmt: skip


def compared(kind: str, named: Sequence[str] = ()) -> list[Provider]:
    """The providers of `compare` on a device type: eager torch, ours, and those that are named.

    Raises:
        ValueError: a name that is not known, or a provider of another device.
    """
    wanted = [_names.choose("peer", name, NAMED) for name in named]
    found = [p for p in MODEL_PROVIDERS if p.name in (*EAGER, OURS, *wanted)]
    for provider in found:
        if provider.name in wanted and provider.device not in (None, kind):
            raise ValueError(f"{provider.about} runs on {provider.device}, not on {kind}")
    return [provider for provider in found if provider.device in (None, kind)]
