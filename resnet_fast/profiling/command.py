# SPDX-License-Identifier: Apache-2.0
"""A profile of one of the registered models by its name, as `resnet-fast profile` asks for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from resnet_fast import models
from resnet_fast.comparison.measure import pick_device
from resnet_fast.profiling.profile import PEERS, SECONDS, Profile, profile

DTYPES = ("float32", "bfloat16", "float16")


def profile_by_name(
    name: str,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "auto",
    compare: str | None = None,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Build one of our models with random weights (seed 0) and profile it on random pixels.

    Raises:
        ValueError: unknown model, dtype, device or peer; the known ones are listed.
        MemoryError: the batch does not fit.
    """
    place = pick_device(device)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if compare is not None and compare not in PEERS:
        raise ValueError(f"unknown model to compare with: {compare!r}; known: {', '.join(PEERS)}")
    build = models.get_model_builder(name)
    kind, nhwc = getattr(torch, dtype), torch.channels_last
    progress(f"building {name}")
    torch.manual_seed(0)
    model = build().eval().to(place, kind, memory_format=nhwc)
    try:
        x = torch.randn(batch, 3, 224, 224).to(place, kind, memory_format=nhwc)
        found = profile(model, x, seconds=seconds, compare=compare, progress=progress)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise MemoryError(f"batch {batch} of {name} does not fit: {reason}") from error
    found.model = name
    return found
