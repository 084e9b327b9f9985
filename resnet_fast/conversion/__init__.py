# SPDX-License-Identifier: Apache-2.0
"""Convert a model that exists: `optimize`, look at it with `report`, undo it with `restore`."""

from resnet_fast.conversion.optimize import optimize, refresh, restore
from resnet_fast.conversion.report import Report, report

__all__ = ["Report", "optimize", "refresh", "report", "restore"]
