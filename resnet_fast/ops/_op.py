# SPDX-License-Identifier: Apache-2.0
"""What every op has, once: its schema, its plans, its gradient, what it tells of itself.

An op's own file has the formula, a `Call` (the arguments), a reference, the checks, and what of a
call is its problem. Plans are kept by the facts of a call: shapes, strides, dtypes, devices. The
same facts are neither checked nor planned again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast import _hardware
from resnet_fast.dispatch import table
from resnet_fast.dispatch.problem import Problem, Runner
from resnet_fast.dispatch.table import AUTO, Plan
from resnet_fast.ops._flops import flop_formula
from resnet_fast.ops._library import LIBRARY, NAMESPACE, NOT_DENSE, TAGS, ByReference
from resnet_fast.spec import Spec

MAX_PLANS = 4096  # distinct problems that an op remembers; past that they are planned anew
# the annotations of a `Call`, as torch's schemas spell them
TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "tuple[int, int]": "int[2]",
    "int": "int",
    "float": "float",
    "str": "str",
    "bool": "bool",
}


class Op:
    """One op of `torch.ops.resnet_fast`. A subclass says what it computes; an instance defines it.

    Attributes:
        overload: the bare torch overload: all arguments by position, least overhead.
        overloads: it, and those of variants that have the same arguments.

    A subclass has, each method of a `Call`:
        name, Call, Problem: its name, its arguments (a NamedTuple in the schema's order and with
            its defaults), and how the backends see it.
        reference: the result step by step in torch's own functions, at the arguments' dtype.
        check_args: raises ArgumentError unless the op can take it; real and fake tensors alike.
        output: an uninitialised result, the arguments checked.
        key_of: all that `check_args` and the choice of a plan read.
        spec_of, problem_of: what it computes; and how its tensors lie, once they are checked.
        layer, inputs: the arguments that a plan is bound to, and those it is then called with.
        typical(dtype): the spec that `explain` asks for.
        sample(spec, device): a `Call` of random tensors, as models would ask for it.
        flops: operations as torch's counter counts them, from the shapes of the arguments.
        cast(call, dtype), gradient: the call under autocast; how to differentiate, if not by the
            reference: (save(ctx, inputs, output), backward(ctx, gradient)).
    """

    name: str
    Call: type[NamedTuple]
    Problem: type[Problem]
    cast: Callable[[tuple, torch.dtype], tuple] | None = None
    gradient: tuple[Callable, Callable] | None = None

    def __init__(self) -> None:
        self._plans: dict[tuple, Plan] = {}
        self._last = threading.local()
        self.overloads: list[Callable] = []
        self.overload = self.define(self.name, self._implementation, self._fake)

    def layer(self, call) -> tuple:
        return ()

    def flops(self, *shapes, out_shape=None, **keywords) -> int:
        return 0

    # ---- the definition

    def define(self, name: str, implementation, fake, writes: str = "") -> Callable:
        """Define `resnet_fast::name` and return its overload.

        Args:
            name, implementation, fake: of the op, or of a variant of it.
            writes: the argument that the variant writes its result over; it has no gradient then.
        """
        qualified = f"{NAMESPACE}::{name}"
        LIBRARY.define(self.schema(name, writes), tags=TAGS)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, implementation, key)
        for key in NOT_DENSE:  # only the checks: they reject these layouts in the ops' own words
            LIBRARY.impl(name, fake, key)
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        packet = getattr(torch.ops.resnet_fast, name)
        op = packet.default
        if self.gradient:
            save, backward = self.gradient
            torch.library.register_autograd(qualified, backward, setup_context=save, lib=LIBRARY)
        else:
            LIBRARY.impl(name, self._in_grad_mode(op, not writes), "Autograd")
        for device in ("cpu", "cuda") if self.cast else ():
            LIBRARY.impl(
                name, self._under_autocast(op, device, writes), f"Autocast{device.upper()}"
            )
        flop_formula(packet)(self.flops)
        self.overloads.append(op)
        return op

    def _in_grad_mode(self, op: Callable, differentiable: bool) -> Callable:
        """The op with the gradient of its reference, or refused where that is asked for in vain."""
        tensors = [i for i, kind in enumerate(self._types()) if kind.startswith("Tensor")]

        def reference(*args) -> Tensor:
            return self.reference(self.Call(*args))

        def run(*args):
            given = (args[i] for i in tensors if i < len(args))
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
                if not differentiable:
                    # The default would return a tensor that silently has no gradient.
                    raise RuntimeError(
                        f"{op.name()} has no gradient; call it under torch.no_grad() or "
                        "torch.inference_mode(), or use the plain torch functions to train"
                    )
                return ByReference.apply(op, reference, *args)
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        return run

    def _types(self) -> list[str]:
        kinds = self.Call.__annotations__.values()
        return [getattr(kind, "__forward_arg__", kind) for kind in kinds]

    def schema(self, name: str, writes: str = "") -> str:
        """The schema without namespace, from the fields of `Call`."""
        arguments = []
        for field, kind in zip(self.Call._fields, self._types(), strict=True):
            text = f"{TYPES[kind]} {field}"
            if field == writes:
                text = f"Tensor(a!) {field}"
            elif field in self.Call._field_defaults:
                default = self.Call._field_defaults[field]
                text += f"={default[0] if isinstance(default, tuple) else repr(default)}"
            arguments.append(text)
        return f"{name}({', '.join(arguments)}) -> {'()' if writes else 'Tensor'}"

    def _under_autocast(self, op: Callable, device: str, writes: str) -> Callable:
        """The op with what `cast` makes of its arguments.

        A tensor that is written to is not cast, as the result would be lost with the copy: the op
        rejects it.
        """

        def cast(*args):
            call = self.Call(*args)
            narrow = self.cast(call, torch.get_autocast_dtype(device))
            if writes:
                narrow = narrow._replace(**{writes: getattr(call, writes)})
            with torch.amp.autocast(device, enabled=False):
                return op(*narrow)

        return cast

    def _fake(self, *args, **kwargs) -> Tensor:
        return self.output(self.Call(*args, **kwargs))

    def _implementation(self, *args, **kwargs) -> Tensor:
        return self.run(self.Call(*args, **kwargs))

    def run(self, call, *more) -> Tensor:
        """The result of a call; `more` goes to the runner behind the call's own inputs."""
        plan = self.plan_of(call)
        plan.calls += 1
        self._last.plan = plan
        return plan.bind(*self.layer(call))(*self.inputs(call), *more)

    # ---- plans

    def plan_of(self, call) -> Plan:
        """The plan for a call; made, and the arguments checked, when its facts are first met."""
        key = self.key_of(call)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(call)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _make_plan(self, call) -> Plan:
        self.check_args(call)
        problem = self.problem_of(call)
        plan = table.plan(problem, getattr(call, "backend", AUTO))
        if problem.is_empty:
            nothing = Runner(lambda y, *_: torch.empty_like(y), self.output(call))
            plan.bind = lambda *_: nothing
        return plan

    def last_plan(self) -> Plan:
        """The plan of this thread's last call."""
        return self._last.plan

    def plans(self) -> list[Plan]:
        """All problems met so far, with the backend chosen for each and how often it was called."""
        return list(self._plans.values())

    # ---- what it tells of itself

    @property
    def backends(self) -> list[str]:
        """What the `backend` argument may be."""
        return table.names(self.name)

    def may_fuse(self, device: str, backend: str = AUTO) -> bool:
        """Whether `backend`, or some if it is "auto", could run the op as one kernel on `device`.

        Raises:
            ValueError: RESNET_FAST_BACKEND names no backend.
        """
        return table.may_fuse(self.name, device, backend)

    def usual(self, spec: Spec, **where) -> Problem:
        """The problem that models ask for: channels_last, aligned, one dtype.

        Args:
            spec: what is computed.
            where: `device`, and of a GPU also `arch`, `gpu` and `hardware`: see `Problem`.
        """
        return self.Problem.usual(spec, **where)

    def explain(self, device: str, dtype: str) -> tuple[str, dict[str, str]]:
        """The backend for a typical problem here, and why each of the others would not run it."""
        kind = torch.device(device)
        available = kind.type == "cuda" and torch.cuda.is_available()
        arch = _hardware.capability_of(kind) if available else 0
        return table.explain(self.usual(self.typical(dtype), device=kind.type, arch=arch))


# ---- facts of tensors


def facts(tensor: Tensor) -> tuple:
    """What a plan depends on of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def layout_of(tensor: Tensor) -> str:
    """How a 4-D tensor lies in memory, as problems say it."""
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    if tensor.is_contiguous():
        return "contiguous"
    return "channels_inner" if tensor.stride(1) == 1 else "strided"


def are_aligned(*tensors: Tensor | None) -> bool:
    """Whether each starts at a multiple of 16 bytes: GPU kernels read so many at a time."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def where(tensor: Tensor) -> dict:
    """The device of a tensor, as problems say it."""
    if not tensor.is_cuda:
        return {"device": tensor.device.type}
    device = tensor.device
    return {
        "device": "cuda", "arch": _hardware.capability_of(device),
        "gpu": torch.cuda.get_device_name(device), "hardware": _hardware.gpu_of(device),
    }  # fmt: skip


def precision() -> str:
    """ "tf32" where cuDNN would use TF32 for a float32 convolution, else "ieee"."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"
