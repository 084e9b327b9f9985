# SPDX-License-Identifier: Apache-2.0
"""A profile of one of the registered models by its name, as `resnet-fast profile` asks for it."""

from __future__ import annotations

import torch

from resnet_fast import _names, models
from resnet_fast.measuring.machine import pick_device
from resnet_fast.measuring.memory import room_for
from resnet_fast.measuring.progress import Progress, Rounds
from resnet_fast.profiling.profile import PEERS, SECONDS, Profile, profile


def profile_by_name(
    name: str,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "auto",
    compare: str | None = None,
    seconds: float = SECONDS,
    progress: Progress = lambda text, share: None,
) -> Profile:
    """Build one of our models with random weights (seed 0) and profile it on random pixels.

    Raises:
        ValueError: unknown model, dtype, device or peer; the known ones are listed.
        MemoryError: the batch does not fit.
    """
    place = pick_device(device)
    name, dtype = models.registry.model_name(name), _names.dtype(dtype)
    if compare is not None:
        compare = _names.choose("model to compare with", compare, PEERS)
    kind, nhwc = getattr(torch, dtype), torch.channels_last
    tell = Rounds("", 0, 1, seconds, progress)
    with room_for(name, batch, dtype, place):
        tell(f"building {name}")
        torch.manual_seed(0)
        model = models.get_model(name).eval().to(place, kind, memory_format=nhwc)
        x = torch.randn(batch, 3, 224, 224).to(place, kind, memory_format=nhwc)
        found = profile(model, x, seconds=seconds, compare=compare, progress=tell)
    found.model = name
    return found
