# SPDX-License-Identifier: Apache-2.0
"""The environment variables that the package reads: all of them, and nowhere else.

RESNET_FAST_DISABLE=1     every model takes its plain path, as under `resnet_fast.disabled()`.
RESNET_FAST_BACKEND=name  ask for one backend (`resnet-fast check` lists them); where it cannot
                          take a convolution, the usual choice is made and `report` says why.
"""

from __future__ import annotations

import os


def disabled() -> bool:
    """Whether RESNET_FAST_DISABLE asks for the plain path everywhere."""
    return os.environ.get("RESNET_FAST_DISABLE", "0") not in ("", "0")


def backend() -> str | None:
    """The backend that RESNET_FAST_BACKEND asks for, or None."""
    return os.environ.get("RESNET_FAST_BACKEND") or None
