# SPDX-License-Identifier: Apache-2.0
"""Measure the swap: torchvision's model and ours, same weights, same photographs, one run."""

from resnet_fast.comparison.measure import Comparison, compare

__all__ = ["Comparison", "compare"]
