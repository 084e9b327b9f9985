# SPDX-License-Identifier: Apache-2.0
"""The torch library `resnet_fast`: how an op is registered, and how it says no.

Schemas are strings in Python (`Library.define` and `Library.impl`): the op exists without any
compiled part, and a call costs 3.5 microseconds where the `custom_op` decorator costs 5 to 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NAMESPACE = "resnet_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# needs_fixed_stride_order: under torch.compile the op is given the layout it had in eager.
NOT_DENSE = ("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
MAX_PLANS = 4096  # distinct problems that an op remembers; past that they are planned anew


class ArgumentError(ValueError):
    """An op was given something it cannot take: the text says what, and what to do."""


def reject(op: str, argument: str, expected: str, got: object, remedy: str) -> None:
    """Raise the one form of error that the ops use."""
    raise ArgumentError(f"{NAMESPACE}::{op}: {argument} must be {expected}, got {got}; {remedy}")


def remember(plans: dict, key: tuple, plan):
    """Keep an op's new plan for the next call of the same key, and return it."""
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


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
    save: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define `resnet_fast::name` and return its overload packet.

    Args:
        schema: the schema without namespace, "name(Tensor x, ...) -> Tensor".
        implementation: runs on real tensors, on any device.
        fake: the same checks and an output without data.
        tensors: picks the tensor arguments that could need a gradient out of the arguments.
        save: save(ctx, inputs, output) keeps what `backward` needs; None: there is no gradient yet.
        backward: backward(ctx, gradient of the output) -> a gradient or None for each argument.
    """
    LIBRARY.define(schema, tags=TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    for key in NOT_DENSE:  # only the checks: they reject these layouts in the ops' own words
        LIBRARY.impl(name, fake, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is not None:
        qualified = f"{NAMESPACE}::{name}"
        torch.library.register_autograd(qualified, backward, setup_context=save, lib=LIBRARY)
        return op

    def without_gradient(*args):
        # The default would return a tensor that silently has no gradient.
        needed = (t is not None and t.requires_grad for t in tensors(*args))
        if torch.is_grad_enabled() and any(needed):
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no gradient yet; call it under torch.no_grad() or "
                "torch.inference_mode(), or use the plain torch functions to train"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, without_gradient, "Autograd")
    return op
