# SPDX-License-Identifier: Apache-2.0
"""The torch library `resnet_fast`: how an op is registered, and how it says no.

Schemas are strings in Python (`Library.define` and `Library.impl`): the op exists without any
compiled part, and a call costs 3.5 microseconds where the `custom_op` decorator costs 5 to 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "resnet_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
NOT_DENSE = ("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU")
# needs_fixed_stride_order: under torch.compile the op is given the layout it had in eager.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


class ArgumentError(ValueError):
    """An op was given something it cannot take: the text says what, and what to do."""


def reject(op: str, argument: str, expected: str, got: object, remedy: str) -> None:
    """Raise the one form of error that the ops use."""
    raise ArgumentError(f"{NAMESPACE}::{op}: {argument} must be {expected}, got {got}; {remedy}")


def describe(tensor: Tensor) -> str:
    """A tensor as the errors print it: "[2, 64, 56, 56] channels_last float16 on cuda:0"."""
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
    elif tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        layout = "channels_last"
    elif tensor.is_contiguous():
        layout = "contiguous"
    else:
        layout = f"strided {list(tensor.stride())}"
    return f"{list(tensor.shape)} {layout} {dtype_name(tensor.dtype)} on {tensor.device}"


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def register(
    name: str,
    schema: str,
    implementation: Callable,
    fake: Callable,
    tensors: Callable[..., Sequence[Tensor | None]],
    gradient: tuple[Callable, Callable] | None = None,
    reference: Callable[..., Tensor] | None = None,
) -> Callable:
    """Define `resnet_fast::name` and return its overload.

    Args:
        schema: the schema without namespace, "name(Tensor x, ...) -> Tensor".
        implementation: runs on real tensors, on any device.
        fake: the same checks and an output without data.
        tensors: picks the tensor arguments that could need a gradient out of the arguments.
        gradient: save(ctx, inputs, output) keeps what backward needs; backward(ctx, gradient of the
            output) -> a gradient or None for each argument.
        reference: the op's arguments -> its result by torch's own functions, whose gradient is the
            op's where none is given. Without either, a call that needs one is refused.
    """
    LIBRARY.define(schema, tags=TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    for key in NOT_DENSE:  # only the checks: they reject these layouts in the ops' own words
        LIBRARY.impl(name, fake, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if gradient is not None:
        save, backward = gradient
        qualified = f"{NAMESPACE}::{name}"
        torch.library.register_autograd(qualified, backward, setup_context=save, lib=LIBRARY)
        return op

    def in_grad_mode(*args):
        tensors_ = tensors(*args)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors_):
            if reference is None:
                # The default would return a tensor that silently has no gradient.
                raise RuntimeError(
                    f"{NAMESPACE}::{name} has no gradient; call it under torch.no_grad() or "
                    "torch.inference_mode(), or use the plain torch functions to train"
                )
            return _ByReference.apply(op, reference, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, in_grad_mode, "Autograd")
    return op


class _ByReference(torch.autograd.Function):
    """An op with the gradient of its reference, which the backward pass computes anew."""

    @staticmethod
    def forward(ctx, op: Callable, reference: Callable[..., Tensor], *args) -> Tensor:
        ctx.reference = reference
        ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))
        ctx.others = [None if isinstance(a, Tensor) else (a,) for a in args]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved).detach() if other is None else other[0] for other in ctx.others]
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            for arg, needs in zip(args, needed, strict=True):
                if needs:
                    arg.requires_grad_()
            y = ctx.reference(*args)
        wanted = [arg for arg, needs in zip(args, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, None, *(next(found) if needs else None for needs in needed)
