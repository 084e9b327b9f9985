# SPDX-License-Identifier: Apache-2.0
"""A model as the list of its layers: what each computes, and the bytes it cannot avoid moving.

    layers(model, x)     as our models run: conv + BatchNorm (+ shortcut) + ReLU is one layer
    unfused(model, x)    as plain torch runs it: conv, norm, relu and add are a layer each
    layers_of(name)      either of one of our models, by its name

They let the model run once on tensors without data and write down the ops that arrive at torch's
dispatcher, so whatever the model does is counted as it is done. FLOPs are those of convolutions and
matrix products, a multiply-add counted as two; element-wise work is not counted, as torch's own
counter does not. Bytes are each tensor once: what is read, and what is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast import models, ops
from resnet_fast.conversion import optimize
from resnet_fast.nn import disabled
from resnet_fast.profiling.calls import around_calls
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec

# How an op's name begins -> the kind of layer. The first that fits; others are of the kind "other".
KINDS = (
    (ops.CONV_BN_JOIN.name, "join"),
    ("conv", "conv"),
    ("cudnn_convolution", "conv"),
    ("mkldnn_convolution", "conv"),
    ("stem_pool", "stem"),
    ("add", "add"),  # and add_relu
    ("linear", "linear"),
    ("mm", "linear"),
    ("bmm", "linear"),
    ("native_batch_norm", "norm"),
    ("_native_batch_norm", "norm"),
    ("cudnn_batch_norm", "norm"),
    ("native_group_norm", "norm"),
    ("native_layer_norm", "norm"),
    ("relu", "relu"),
    ("threshold", "relu"),
    ("max_pool", "pool"),
    ("avg_pool", "pool"),
    ("adaptive_avg_pool", "pool"),
    ("_adaptive_avg_pool", "pool"),
    ("mean", "pool"),
    ("clone", "copy"),
    ("copy", "copy"),
    ("_to_copy", "copy"),
)
NO_WORK = ("detach", "alias", "empty_like", "_unsafe_view")
MATRIX_PRODUCTS = ("addmm", "mm", "bmm", "linear")


@dataclass(frozen=True, slots=True)
class Layer:
    """One step of a model.

    Args:
        name: the path of the module it belongs to; of an op between modules, that of the module
            that calls it and the op's: "layer1.0.add".
        stage: "stem", "layer1", ..., "head": where in the model.
        kind: "conv", "join", "stem", "add", "pool", "linear", "norm", "relu", "copy" or "other".
        spec: the convolution, if it is one.
        flops: two for each multiply-add of a convolution or a matrix product.
        bytes: each tensor that is read or written, once.
        weight_bytes: how many of them are parameters and buffers: the same at any batch.
    """

    name: str
    stage: str
    kind: str
    spec: ConvSpec | None
    flops: int
    bytes: int
    weight_bytes: int = 0


def layers(model: nn.Module, x: Tensor) -> list[Layer]:
    """The layers of a model in execution order, at the granularity at which ours run fused.

    Args:
        model: any eager model in eval mode; known ResNets of other libraries are described as
            `resnet_fast.optimize` would run them.
        x: [N, C, H, W], an example; only its shape, dtype, layout and device matter.

    Example:
        >>> convolutions = {layer.spec for layer in layers(resnet50().eval(), x) if layer.spec}
    """
    return as_run(optimize(model), x)


def unfused(model: nn.Module, x: Tensor) -> list[Layer]:
    """`layers` where nothing is fused: convolution, norm, ReLU and addition are a layer each."""
    with disabled():
        return as_run(model, x)


@functools.cache
def layers_of(
    name: str, batch: int = 1, dtype: str = "float32", fused: bool = True
) -> tuple[Layer, ...]:
    """The layers of one of our models by its name, at 224x224; nothing is computed.

    Args:
        name: of a builder, as "resnet50".
        batch, dtype: of the input.
        fused: as ours run, or as plain torch runs them.

    Example:
        >>> specs = {layer.spec for layer in layers_of("resnet50", 32, "float16") if layer.spec}
    """
    kind = getattr(torch, dtype)
    with torch.random.fork_rng(devices=[]):
        model = models.get_model(name).eval().to(kind)
    x = torch.empty(batch, 3, 224, 224, dtype=kind)
    return tuple(layers(model, x) if fused else unfused(model, x))


def as_run(model: nn.Module, x: Tensor) -> list[Layer]:
    """`layers` of a model just as it stands: fused where it is, plain where it is not."""
    try:
        from torch._subclasses import FakeTensorMode

        return _record(model, x, FakeTensorMode(allow_non_fake_inputs=True))
    except Exception:
        # Not all models run without data (some look at values): those run for real. If the model is
        # at fault, its own run raises the error.
        return _record(model, x, None)


def _record(model: nn.Module, x: Tensor, fake) -> list[Layer]:
    recorder = _Recorder(model)
    # Under inference_mode composite ops would arrive whole, each with a signature of its own.
    with torch.no_grad(), fake or nullcontext():
        given = fake.from_tensor(x) if fake else x
        with recorder, around_calls(recorder.around):
            model(given)
    return _with_stages(recorder.layers)


class _Recorder(TorchDispatchMode):
    """Writes down a `Layer` per op; ops of one call of a module without children are one layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self._modules_by_name = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules_by_name.items()}
        self._owners = {
            id(tensor): module
            for module in model.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        self._views: list[Tensor] = []  # kept, so that none else can have their ids
        self._calls: list[tuple[nn.Module, int]] = []  # open calls, and the layers before each
        self._last_call: tuple[nn.Module, int] | None = None  # that the last layer belongs to
        self._called: set[nn.Module] = set()
        self._caller = ""  # whose forward runs, where it was not called: our blocks, run by a stage

    def around(self, module: nn.Module, call: Callable, args: tuple, kwargs: dict) -> object:
        self._calls.append((module, len(self.layers)))
        self._called.add(module)
        self._caller = self._bypassed(self._names.get(module, ""))
        try:
            return call(module, *args, **kwargs)
        finally:
            self._calls.pop()

    def _bypassed(self, name: str) -> str:
        """The module right above `name`, sequences apart, if it has not been called itself."""
        above = name.rpartition(".")[0]
        while above and type(self._modules_by_name[above]) is nn.Sequential:
            above = above.rpartition(".")[0]
        return above if above and self._modules_by_name[above] not in self._called else ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func, args: tuple, kwargs: dict, out: object) -> None:
        read = _distinct(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        written = next((t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)), None)
        name = func.__name__.partition(".")[0]
        if written is None:  # an op that writes into an argument and returns nothing
            written = next((t for t in read if _is_written(func, args, t)), None)
        if written is None or not read:
            return
        if func.is_view or name in NO_WORK:
            if id(read[0]) in self._owners:  # a parameter seen otherwise is a parameter still
                self._owners[id(written)] = self._owners[id(read[0])]
                self._views.append(written)
            return
        own = func.namespace == "resnet_fast"
        call = (
            _conv_of(name, args, own) if name.startswith(("conv_bn_act", "convolution")) else None
        )
        spec = _spec(call, written) if call else None
        parameters = sum(_nbytes(t) for t in read if id(t) in self._owners)
        moved = sum(map(_nbytes, read)) + _nbytes(written)
        if spec is not None:
            moved -= _nbytes(call.x) - touched_pixels(spec) * spec.c * call.x.element_size()
        if (
            name == ops.CONV_BN_JOIN.name
        ):  # of its second input, the pixels that the 1x1 filter samples
            x = args[4]
            sampled = written.numel() // written.shape[1] * x.shape[1]
            moved -= _nbytes(x) - sampled * x.element_size()
        layer = Layer(
            self._name(name, read if own else []), "", _kind(name), spec,
            spec.flops if spec else _flops(func, name, args, kwargs, out), moved, parameters,
        )  # fmt: skip
        self._append(layer, merge=not own)

    def _name(self, op: str, weights: list[Tensor]) -> str:
        """By the weight of a fused op; else by the module that is being called."""
        for tensor in weights:
            owner = self._owners.get(id(tensor))
            if owner is not None:
                return self._names[owner]
        if not self._calls:
            return op
        module = self._calls[-1][0]
        name = self._names.get(module, type(module).__name__)
        if not module._modules:
            return name or type(module).__name__
        return f"{self._caller or name}.{op.rstrip('_')}".lstrip(".")

    def _append(self, layer: Layer, merge: bool) -> None:
        call = self._calls[-1] if self._calls else None
        same = merge and call is not None and call == self._last_call and not call[0]._modules
        self._last_call = call
        if not same:
            self.layers.append(layer)
            return
        before = self.layers[-1]
        self.layers[-1] = replace(
            before,
            kind=before.kind if before.flops or not layer.flops else layer.kind,
            spec=before.spec or layer.spec,
            flops=before.flops + layer.flops,
            bytes=before.bytes + layer.bytes,
            weight_bytes=before.weight_bytes + layer.weight_bytes,
        )


def _distinct(tensors) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _is_written(func, args: tuple, tensor: Tensor) -> bool:
    schema = func._schema.arguments
    return any(
        a is tensor and s.alias_info is not None and s.alias_info.is_write
        for a, s in zip(args, schema, strict=False)
    )


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(op: str) -> str:
    if op in MATRIX_PRODUCTS:
        return "linear"
    return next((kind for prefix, kind in KINDS if op.startswith(prefix)), "other")


def _flops(func, name: str, args: tuple, kwargs: dict, out: object) -> int:
    if name in MATRIX_PRODUCTS:
        inner = args[1 if name == "addmm" else 0].shape[-1]
        return 2 * out.numel() * inner
    if func.namespace != "resnet_fast":
        return 0
    from torch.utils.flop_counter import flop_registry  # ours say there what they count

    formula = flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _conv_of(name: str, args: tuple, own: bool) -> ops.Call | None:
    """The convolution's arguments as our op has them; None if it is transposed or not 2-D."""
    if own:
        return ops.Call(*args)
    x, weight, _, stride, padding, dilation, transposed, _, groups = args
    if transposed or x.dim() != 4:
        return None
    return ops.Call(
        x, weight, None, None, None, tuple(stride), tuple(padding), tuple(dilation), groups, "none"
    )


def _spec(call: ops.Call, written: Tensor) -> ConvSpec | None:
    x, weight = call.x, call.weight
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in ELEMENT_SIZE:
        return None
    return ConvSpec(
        n=x.shape[0], h=x.shape[2], w=x.shape[3], c=x.shape[1],
        k=weight.shape[0], r=weight.shape[2], s=weight.shape[3],
        stride=tuple(call.stride), padding=tuple(call.padding), dilation=tuple(call.dilation),
        groups=call.groups, dtype=dtype, activation=call.activation,
        residual=call.residual is not None, norm=call.mean is not None,
        precision=ops.precision() if x.is_cuda else "ieee",
    )  # fmt: skip


def touched_pixels(spec: ConvSpec) -> int:
    """Pixels of x that the filter meets: with a stride of two, a 1x1 filter needs a quarter."""
    rows = spec.h if spec.r >= spec.stride[0] else min(spec.h, spec.p * spec.r)
    columns = spec.w if spec.s >= spec.stride[1] else min(spec.w, spec.q * spec.s)
    return prod((spec.n, rows, columns))


def _with_stages(found: list[Layer]) -> list[Layer]:
    """Name the stage of each layer.

    A stage is a sequence of numbered children: "layer1" of "layer1.0.conv1". What runs before the
    first is the stem, what runs after the last the head.
    """
    stages = [_stage(layer.name) for layer in found]
    inside = [i for i, stage in enumerate(stages) if stage]
    for i, layer in enumerate(found):
        stage = stages[i]
        if not stage:
            after = not inside or i > inside[-1]
            before = bool(inside) and i < inside[0]
            stage = "stem" if before else "head" if after else layer.name.partition(".")[0]
        found[i] = replace(layer, stage=stage)
    return found


def _stage(name: str) -> str:
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:numbered])
