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

    Args:
        theirs, ours: torchvision's model and ours, float32, in eval mode, with the same weights.
        dtype, device: what all of them are moved to.
        peers: keys of `PEERS`.

    Raises:
        ValueError: an unknown peer, or one that is not installed or cannot run here.
    """
    channels_last = copy.deepcopy(theirs).to(device, dtype).to(memory_format=torch.channels_last)
    found = {
        NCHW: _eager(copy.deepcopy(theirs).to(device, dtype), torch.contiguous_format),
        NHWC: _eager(channels_last, torch.channels_last),
        OURS: _eager(
            copy.deepcopy(ours).to(device, dtype).to(memory_format=torch.channels_last),
            torch.channels_last,
        ),
    }
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}; known are {', '.join(PEERS)}")
        build = {"compile": _compiled, "openvino": _openvino}[peer]
        found[PEERS[peer]] = build(copy.deepcopy(channels_last), dtype, device)
    return found


def _eager(model: nn.Module, memory_format: torch.memory_format) -> Call:
    @torch.inference_mode()
    def call(x: Tensor) -> Tensor:
        return model(x.contiguous(memory_format=memory_format))

    call.model = model
    return call


def _compiled(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Call:
    """Inductor with freezing, which folds BatchNorm; torch.compile's options do not reach it."""
    from torch._inductor import config

    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False)

    # no_grad: what is compiled under inference_mode runs slower.
    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        with config.patch(freezing=True):
            return compiled(x.contiguous(memory_format=torch.channels_last))

    return call


def _openvino(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Call:
    if find_spec("openvino") is None:
        raise ValueError("OpenVINO is not installed; pip install openvino")
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
