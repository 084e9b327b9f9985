# SPDX-License-Identifier: Apache-2.0
"""A batch that does not fit is refused in words, and before it can end the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from resnet_fast import _hardware
from resnet_fast.spec import ELEMENT_SIZE

# The tensors of the stem or of the widest block that live at once, over the images themselves.
ACTIVATIONS = 16


def check_memory(name: str, batch: int, dtype: str, place: torch.device) -> None:
    """Raise MemoryError where a batch cannot fit: asking for too much can end the process."""
    needed = batch * 3 * 224 * 224 * ELEMENT_SIZE[dtype] * ACTIVATIONS
    free = _hardware.free_bytes(place)
    if free is not None and needed > free:
        raise MemoryError(
            f"batch {batch} of {name} in {dtype} needs about {needed / 1e9:.0f} GB of memory; "
            f"{free / 1e9:.0f} GB are free on {place}; take a smaller --batch"
        )


@contextlib.contextmanager
def room_for(name: str, batch: int, dtype: str, place: torch.device) -> Iterator[None]:
    """Raises MemoryError, in words, where what is done inside does not fit after all."""
    check_memory(name, batch, dtype, place)
    try:
        yield
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise MemoryError(f"batch {batch} of {name} does not fit: {reason}") from error
