# SPDX-License-Identifier: Apache-2.0
"""The ways to run a ResNet that are compared, each in its strongest honest form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

OURS = "resnet_fast"
NCHW, NHWC = "torchvision contiguous", "torchvision channels_last"
SEARCHED = "torchvision cudnn.benchmark"  # channels_last; on a GPU
COMPILED = "torch.compile, freezing"
OPENVINO = "OpenVINO"
PEERS = {"compile": COMPILED, "openvino": OPENVINO}

Call = Callable[[Tensor], Tensor]  # [N, 3, H, W] -> [N, num_classes]


def providers(
    theirs: nn.Module,
    ours: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    peers: Sequence[str],
) -> dict[str, Call]:
    """What to call, by name, for one dtype on one device.

    On a GPU eager torch also runs as it does by `torch.backends.cudnn.benchmark = True`, where
    cuDNN searches for its fastest kernels, and so do the peers. torch keeps what cuDNN chose per
    thread, searched for or not: whoever calls these gives each a thread of its own (`interleaved`
    does), or the first comer chooses for all.

    Args:
        theirs, ours: torchvision's model and ours, float32, in eval mode, with the same weights.
        dtype, device: what all of them are moved to.
        peers: keys of `PEERS`.

    Raises:
        ValueError: an unknown peer, or one that is not installed or cannot run here.
    """
    channels_last = copy.deepcopy(theirs).to(device, dtype).to(memory_format=torch.channels_last)
    found = {
        NCHW: eager(copy.deepcopy(theirs).to(device, dtype), torch.contiguous_format),
        NHWC: eager(channels_last, torch.channels_last),
        OURS: eager(
            copy.deepcopy(ours).to(device, dtype).to(memory_format=torch.channels_last),
            torch.channels_last,
        ),
    }
    if device.type == "cuda":
        found[SEARCHED] = searching(found[NHWC])
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}; known are {', '.join(PEERS)}")
        model = copy.deepcopy(channels_last)
        if peer == "compile":
            torch._dynamo.reset()
            call = torch.no_grad()(compiled(model))
            found[PEERS[peer]] = searching(call) if device.type == "cuda" else call
        else:
            found[PEERS[peer]] = openvino_call(model, dtype, device)
    return found


def eager(model: nn.Module, memory_format: torch.memory_format) -> Call:
    @torch.inference_mode()
    def call(x: Tensor) -> Tensor:
        return model(x.contiguous(memory_format=memory_format))

    call.model = model
    return call


def searching(call: Call) -> Call:
    """The call with cuDNN searching for its fastest kernels: at the first input of a shape."""

    def searched(x: Tensor) -> Tensor:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            return call(x)
        finally:
            torch.backends.cudnn.benchmark = before

    return searched


def compiled(model: nn.Module, mode: str | None = None) -> Call:
    """Inductor with freezing, which folds BatchNorm; torch.compile's options do not reach it.

    Call it under no_grad: what is compiled under inference_mode runs slower. Each model compiled
    adds to what Dynamo looks through; whoever makes many calls `torch._dynamo.reset()` between
    them, after which all that lived before is compiled anew.

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
    if find_spec("openvino") is None:
        raise ValueError('OpenVINO is not installed; pip install "resnet_fast[bench]"')
    if device.type != "cpu":
        raise ValueError(f"OpenVINO is compared on the CPU, not on {device.type}")
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
        ValueError: it is not installed, or cannot run the dtype or on the device.
    """
    for package in ("onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed; pip install onnxruntime onnxscript")
    if example.device.type != "cpu" or example.dtype != torch.float32:
        where = f"{str(example.dtype).removeprefix('torch.')} on {example.device.type}"
        raise ValueError(f"ONNX Runtime is compared in float32 on the CPU, not in {where}")
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
        ValueError: it is not installed, or there is no GPU.
    """
    if find_spec("torch_tensorrt") is None:
        raise ValueError("torch-tensorrt is not installed; pip install torch-tensorrt")
    if example.device.type != "cuda":
        raise ValueError(f"TensorRT runs on a GPU, not on the {example.device.type}")
    import torch_tensorrt

    # Explicit typing: in the model's own dtype, which a set of enabled ones is refused beside.
    return torch_tensorrt.compile(
        model, ir="dynamo", inputs=[example], use_explicit_typing=True,
        disable_tf32=torch.backends.cudnn.conv.fp32_precision != "tf32",
    )  # fmt: skip
