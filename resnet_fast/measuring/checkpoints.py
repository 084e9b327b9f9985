# SPDX-License-Identifier: Apache-2.0
"""torchvision's model with the weights that a user names, or a message about what does not fit."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_fast import models

NAMED = 3  # names in a message that counts the others
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


def torchvision_model(name: str, weights: str | None = None) -> nn.Module:
    """torchvision's model of that name.

    Args:
        name: one of our builders, as `models.list_models` has it.
        weights: None for random ones; the file of a state_dict; or the name of torchvision's
            ("DEFAULT", "IMAGENET1K_V1"), which are downloaded.

    Raises:
        ValueError: the file does not hold the model's state_dict, or no weights have that name.
    """
    import torchvision

    build = getattr(torchvision.models, name)
    if weights is None:
        return build()
    path = Path(weights)
    if path.is_file():
        model = build()
        _load(model, name, path, read(path))
        return model
    enum = torchvision.models.get_model_weights(name)
    member = weights.removeprefix(f"{enum.__name__}.")
    if member not in enum.__members__:
        known = ", ".join(enum.__members__)
        text = f"weights {weights!r} are no file, and torchvision has none of that name for {name}"
        raise ValueError(f"{text}; it has {known}")
    return build(weights=enum[member])


def read(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file.

    Raises:
        ValueError: the file holds something else; the message says what, and what to do.
    """
    saved = "save the weights alone: torch.save(model.state_dict(), file)"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what the first bytes happen to mean
        if zipfile.is_zipfile(path) and "Weights only load failed" in str(error):
            why = "holds pickled objects, which are not loaded because that can run any code"
            raise ValueError(f"{path} {why}; {saved}") from error
        raise ValueError(f"{path} is no file that torch.save wrote, or is damaged") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a state_dict; {saved}")
    if all(isinstance(value, Tensor) for value in found.values()):
        return found
    for key, value in found.items():
        if isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()):
            why = f"holds a checkpoint whose weights are under {key!r}, not a state_dict"
            raise ValueError(f"{path} {why}; torch.save that part alone, and name its file")
    keys = ", ".join(map(repr, list(found)[:NAMED]))
    raise ValueError(f"{path} holds {keys} and more, not a state_dict; {saved}")


def _load(model: nn.Module, name: str, path: Path, state: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is no state_dict of {name}: {_misfit(model, state)}") from error


def _misfit(model: nn.Module, state: dict[str, Tensor]) -> str:
    """What is missing, too much, or of another shape, and what it could be instead."""
    mine = _shapes(model.state_dict())
    theirs = _shapes(state)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in theirs):
            return f"all names in it begin with {prefix!r}; take that away from each of them"
    for other in models.list_models():
        with torch.device("meta"):
            if _shapes(models.get_model(other).state_dict()) == theirs:
                return f"it is one of {other}"
    parts = [
        _listed([key for key in mine if key not in theirs], "missing"),
        _listed([key for key in theirs if key not in mine], "not of the model"),
    ]
    parts += [
        f"{key} is {list(theirs[key])}, not {list(shape)}"
        for key, shape in mine.items()
        if theirs.get(key, shape) != shape
    ][:NAMED]
    return "; ".join(filter(None, parts))


def _listed(keys: list[str], what: str) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"{', '.join(keys[:NAMED])}{more} {what}" if keys else ""


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
