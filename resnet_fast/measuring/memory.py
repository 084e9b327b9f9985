# SPDX-License-Identifier: Apache-2.0
"""A batch that does not fit is refused in words, before it can end the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from resnet_fast import _hardware
from resnet_fast.spec import ELEMENT_SIZE

# The tensors of the stem or of the widest block that live at once, over the images themselves.
ACTIVATIONS = 16


def check_memory(what: str, needed: int, place: torch.device) -> None:
    """Raise MemoryError where so many bytes cannot fit: asking for too much can end the process."""
    free = _hardware.free_bytes(place)
    if free is not None and needed > free:
        raise MemoryError(
            f"not enough memory: {what} needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} are "
            f"free on {place}; take a smaller --batch"
        )


@contextlib.contextmanager
def room_for(name: str, batch: int, dtype: str, place: torch.device) -> Iterator[None]:
    """Raises MemoryError, in words, before what is done inside cannot fit, or where it does not."""
    what, needed = f"batch {batch} of {name}", batch * 3 * 224 * 224 * ELEMENT_SIZE[dtype]
    check_memory(f"{what} in {dtype}", needed * ACTIVATIONS, place)
    try:
        yield
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise MemoryError(f"{what} does not fit: {reason}") from error
