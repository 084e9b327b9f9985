# SPDX-License-Identifier: Apache-2.0
"""What the CPU that runs the tests supports, in dispatch's words."""

from __future__ import annotations

import torch

from resnet_fast import ops


def cpu_refusal(dtype: torch.dtype | str) -> str | None:
    """Why the "cpu" backend takes no convolution of `dtype` on this machine; None if it does."""
    chosen, refusals = ops.CONV_BN_ACT.explain("cpu", str(dtype).removeprefix("torch."))
    return None if chosen == "cpu" else refusals["cpu"]


def cpu_backend(dtype: torch.dtype | str) -> str:
    """The backend that runs a convolution of `dtype` on this machine's CPU."""
    return "cpu" if cpu_refusal(dtype) is None else "aten"
