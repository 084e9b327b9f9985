# SPDX-License-Identifier: Apache-2.0
"""The package's models by name: its own registry, apart from torchvision's (same function names).

torchvision refuses a second builder under a name that it has, and `torchvision.models.get_model`
should go on returning torchvision's models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from resnet_fast import _names

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(name: str | None = None) -> Callable[[Builder], Builder]:
    """Enter the decorated builder in the registry, under its own name unless another is given.

    Raises:
        ValueError: the name is taken.
    """

    def register(builder: Builder) -> Builder:
        key = builder.__name__ if name is None else name
        if key in _BUILDERS:
            raise ValueError(f"An entry is already registered under the name '{key}'.")
        _BUILDERS[key] = builder
        return builder

    return register


def list_models() -> list[str]:
    """The names that `get_model` knows, sorted."""
    return sorted(_BUILDERS)


def get_model_builder(name: str) -> Callable[..., nn.Module]:
    """The builder registered under `name` (in any case of letters).

    Raises:
        ValueError: no such model; the message suggests the nearest and lists the known ones.
    """
    return _BUILDERS[model_name(name)]


def model_name(name: str) -> str:
    """The name under which a model is registered: "resnet18" for "ResNet18".

    Raises:
        ValueError: no such model; the message suggests the nearest and lists the known ones.
    """
    return _names.choose("model", name, _names.natural(_BUILDERS))


def get_model(name: str, **config: Any) -> nn.Module:
    """Build the model registered under `name`.

    Args:
        name: one of `list_models()`.
        **config: the builder's arguments, such as `weights` or `num_classes`.

    Raises:
        ValueError: no such model; the message suggests the nearest and lists the known ones.

    Example:
        >>> model = resnet_fast.models.get_model("resnet50", num_classes=10)
    """
    return get_model_builder(name)(**config)
