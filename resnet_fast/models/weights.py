# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights: torchvision's enums, looked up when they are used.

torchvision is optional, and this is the only module of `models` that imports it. Its enums
(`ResNet50_Weights`, ...) carry the URL, the transforms and the metadata of each checkpoint; they
are passed on, never redefined, so a member works with both packages.
"""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)

ENUM_NAMES = (
    "ResNet18_Weights",
    "ResNet34_Weights",
    "ResNet50_Weights",
    "ResNet101_Weights",
    "ResNet152_Weights",
    "ResNeXt50_32X4D_Weights",
    "ResNeXt101_32X8D_Weights",
    "ResNeXt101_64X4D_Weights",
    "Wide_ResNet50_2_Weights",
    "Wide_ResNet101_2_Weights",
)


def weights_enum(name: str) -> type[enum.Enum]:
    """torchvision's enum of that name, e.g. "ResNet50_Weights".

    Raises:
        ImportError: torchvision cannot be imported; the message says what to install.
    """
    try:
        from torchvision.models import resnet
    except ImportError as error:
        raise ImportError(
            f"{name} comes with torchvision, which cannot be imported here ({error}): "
            'pip install "resnet_fast[vision]", or build the model with weights=None '
            "and call load_state_dict",
            name="torchvision",
        ) from error
    return getattr(resnet, name)


def enum_getattr(module: str) -> Callable[[str], type[enum.Enum]]:
    """A `__getattr__` that gives a module torchvision's enums as attributes."""

    def find(name: str) -> type[enum.Enum]:
        if name in ENUM_NAMES:
            return weights_enum(name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


def takes_weights(enum_name: str) -> Callable[[Callable[..., Model]], Callable[..., Model]]:
    """Give a builder f(*, weights, progress, **kwargs) the calling conventions of torchvision's.

    The builder receives a member of the enum or None. Its caller may pass a member, its name as a
    string ("DEFAULT", "IMAGENET1K_V2", "ResNet50_Weights.DEFAULT"), or, with torchvision's
    deprecation warnings, positional arguments and the boolean `pretrained`.

    Args:
        enum_name: torchvision's enum for this builder, one of `ENUM_NAMES`.

    Raises (when the builder is called):
        TypeError: `weights` is a member of another enum.
        KeyError: `weights` is a string that names no member.
        ImportError: weights are given and torchvision is not installed.
    """

    def decorate(function: Callable[..., Model]) -> Callable[..., Model]:
        @functools.wraps(function)
        def builder(*args: Any, **kwargs: Any) -> Model:
            kwargs = _modernize(enum_name, args, kwargs)
            weights = kwargs.pop("weights", None)
            if weights is not None:
                weights = weights_enum(enum_name).verify(weights)
            return function(weights=weights, **kwargs)

        builder.__wrapped__ = _Described(function, enum_name)
        return builder

    return decorate


def overwrite_named_param(kwargs: dict[str, Any], name: str, value: Any) -> None:
    """Set kwargs[name]; the caller may have set it already, but only to the same value.

    Raises:
        ValueError: the caller set another value.
    """
    given = kwargs.setdefault(name, value)
    if given != value:
        raise ValueError(f"The parameter '{name}' expected value {value} but got {given} instead.")


def _modernize(enum_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Today's keyword arguments for a call in the style before torchvision 0.13, with warnings.

    The warnings' words are torchvision's: programs filter on them.
    """
    if len(args) > 2:
        raise TypeError(f"at most 2 positional arguments (weights, progress), got {len(args)}")
    if args:
        positional = dict(zip(("weights", "progress"), args, strict=False))
        _warn_deprecated(
            f"Using {' and '.join(map(repr, positional))} as positional parameter(s) is deprecated "
            "since 0.13 and may be removed in the future. Please use keyword parameter(s) instead."
        )
        kwargs = kwargs | positional

    if "weights" in kwargs:
        weights = kwargs["weights"]
        modern_string = isinstance(weights, str) and weights != "legacy"
        if weights is None or modern_string or isinstance(weights, enum.Enum):
            return kwargs
        pretrained = kwargs.pop("weights")
        kwargs.pop("pretrained", None)
    elif "pretrained" in kwargs:
        pretrained = kwargs.pop("pretrained")
        _warn_deprecated(
            "The parameter 'pretrained' is deprecated since 0.13 and may be removed in the future, "
            "please use 'weights' instead."
        )
    else:
        return kwargs

    # Programs that still use pretrained=True were written for the first weights, not the best.
    weights = weights_enum(enum_name).IMAGENET1K_V1 if pretrained else None
    hint = (
        f" You can also use `weights={enum_name}.DEFAULT` to get the most up-to-date weights."
        if pretrained
        else ""
    )
    _warn_deprecated(
        "Arguments other than a weight enum or `None` for 'weights' are deprecated since 0.13 and "
        "may be removed in the future. The current behavior is equivalent to passing "
        f"`weights={weights}`.{hint}"
    )
    return kwargs | {"weights": weights}


def _warn_deprecated(message: str) -> None:
    """A UserWarning, as torchvision's is, at the line that called the builder."""
    warnings.warn(message, stacklevel=4)


class _Described:
    """A builder as `inspect.signature` sees it: `weights` annotated with torchvision's enum.

    `torchvision.models.get_model_weights(builder)` reads that annotation. It is made on demand,
    once torchvision has been imported by someone else; until then, and without torchvision, the
    signature is the function's own. So looking at a builder never imports anything. It works by
    standing in the chain of `__wrapped__`, where `inspect` stops at the first `__signature__`,
    while `inspect.getsource` goes on to the function.
    """

    def __init__(self, function: Callable[..., Any], enum_name: str) -> None:
        self.__wrapped__ = function
        self.enum_name = enum_name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__wrapped__)
        weights = getattr(sys.modules.get("torchvision.models.resnet"), self.enum_name, None)
        if weights is None:
            return signature
        parameters = dict(signature.parameters)
        parameters["weights"] = parameters["weights"].replace(annotation=weights | None)
        return signature.replace(parameters=list(parameters.values()))
