# SPDX-License-Identifier: Apache-2.0
"""What the tests of conversion ask of every model."""

from __future__ import annotations

import torch

import resnet_fast


def run(model, x):
    """model(x) as a server calls it."""
    with torch.inference_mode():
        return model(x)


def close(a, b):
    """Assert that two float32 results differ by rounding at the most."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def is_fused(model) -> bool:
    """Whether `report` has rows, and all of them are fused."""
    rows = resnet_fast.report(model)
    return len(rows) > 0 and rows.fused == len(rows)
