# SPDX-License-Identifier: Apache-2.0
"""The environment variables that the package reads: all of them are read here.

RESNET_FAST_DISABLE=1     every model takes its plain path, as under `resnet_fast.disabled()`.
RESNET_FAST_BACKEND=name  ask for one backend (`resnet-fast check` lists them); where it cannot
                          take a convolution, the usual choice is made and `report` says why.
RESNET_FAST_CACHE=folder  where `resnet-fast tune` keeps what it measured; otherwise `resnet_fast`
                          in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache).
TRITON_INTERPRET=1        Triton's own variable: its interpreter runs the kernels on the CPU.
"""

from __future__ import annotations

import os
from pathlib import Path


def disabled() -> bool:
    """Whether RESNET_FAST_DISABLE asks for the plain path everywhere."""
    return os.environ.get("RESNET_FAST_DISABLE", "0") not in ("", "0")


def backend() -> str | None:
    """The backend that RESNET_FAST_BACKEND asks for, or None."""
    return os.environ.get("RESNET_FAST_BACKEND") or None


def cache_folder() -> Path | None:
    """The folder of measured choices, which may not exist; None without a home folder."""
    if named := os.environ.get("RESNET_FAST_CACHE"):
        return Path(named)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "resnet_fast"
    try:
        return Path.home() / ".cache" / "resnet_fast"
    except RuntimeError:
        return None


def triton_interprets() -> bool:
    """Whether Triton's interpreter is on, which runs the GPU kernels on CPU tensors for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
