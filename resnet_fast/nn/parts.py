# SPDX-License-Identifier: Apache-2.0
"""What a module holds in the places that its recipe names, and which of it runs as one op.

Missing parts and identities drop out, parts that are sequences themselves are opened, and each
convolution that a BatchNorm follows becomes a `Fused`, together with its ReLU. All else stays the
module that it is, and is called: squeeze-and-excitation, pools, activations of other kinds.

What the modules *are* decides what is fused. The state they are *in* (training, hooks, a gradient
that is needed) decides whether: if it speaks against it, the owner runs its class's plain forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast.nn import reasons
from resnet_fast.nn.recipes import Recipe, is_sequence, recipe_of
from resnet_fast.nn.units import Unit

BY_ITSELF = "runs by itself"
_DROPS = ("DropPath", "DropBlock2d", "Dropout", "Dropout2d")  # the identity in evaluation


class Fused(NamedTuple):
    """A unit that runs as one op."""

    unit: Unit
    norm: nn.Module
    activation: str  # "relu" or "none"


Part = Fused | nn.Module


class Parts(NamedTuple):
    """What `parts_of` found.

    Args:
        main: in order.
        shortcut: in order; empty for the identity.
        fork: how many parts of main run before the shortcut branches off; 0 where it reads x.
        adds: whether the shortcut is added to main's result.
        joins: whether the last part of main adds it.
        after: what is called on the result; None where nothing is left to do.
        bypassed: the modules that are not called.
        left: in words, what is called and why.
    """

    main: list[Part]
    shortcut: list[Part]
    fork: int
    adds: bool
    joins: bool
    after: nn.Module | None
    bypassed: list[nn.Module]
    left: str

    @property
    def is_whole(self) -> bool:
        """Whether ops alone compute it: all parts are fused, and at most a projection is beside."""
        return (
            all(isinstance(part, Fused) for part in (*self.main, *self.shortcut))
            and len(self.shortcut) <= 1
            and (self.joins or not self.adds)
            and self.after is None
            and self.fork == 0
        )


# ---- what is there

Named = tuple[str, nn.Module]
Lookup = Callable[[nn.Module], Recipe | None]


def open_parts(
    named: Iterable[tuple[str, nn.Module | None]], bypassed: list[nn.Module], lookup: Lookup
) -> list[Named]:
    """The modules that run when these are called one after the other, sequences opened."""
    found: list[Named] = []
    for name, module in named:
        if module is None:
            continue
        inner = _inside(module, lookup)
        if inner is None:
            found.append((name, module))
            continue
        bypassed.append(module)
        found += open_parts([(f"{name}.{n}", m) for n, m in inner], bypassed, lookup)
    return found


def _inside(module: nn.Module, lookup: Lookup) -> list[Named] | None:
    """What runs in its place: nothing for an identity, children for a sequence; None if itself."""
    if _is_identity(module):
        return []
    if is_sequence(module):
        children = list(module._modules.items())
        # A stage of residual blocks is called as one: its blocks write over each other's results.
        return None if any(_is_residual(m, lookup) for _, m in children) else children
    recipe = None if reasons.has_hooks(module) else lookup(module)
    if recipe is None or recipe.shortcut:
        return None
    return list(named_of(module, recipe.main))


def _is_residual(module: nn.Module | None, lookup: Lookup) -> bool:
    recipe = module and lookup(module)
    return bool(recipe and recipe.shortcut)


def named_of(owner: nn.Module, names: tuple[str, ...] | None) -> Iterable[tuple[str, nn.Module]]:
    """(name, module or None) of an owner's parts; of all its children if `names` is None."""
    modules = owner._modules
    if names is None:
        return modules.items()
    return [(name, modules.get(name)) for name in (n.removesuffix("?") for n in names)]


def _is_identity(module: nn.Module) -> bool:
    """Whether it returns its input and nothing watches it: Identity, or a drop in evaluation."""
    kind = type(module)
    drops = kind.__name__ in _DROPS and not module.training
    return (kind is nn.Identity or drops) and reasons.call_refusal(module) is None


def candidates(
    owner: nn.Module, recipe: Recipe, lookup: Lookup, opened: list[nn.Module]
) -> list[nn.Module]:
    """The convolutions of an owner that may ever be fused, whatever it is in for the moment.

    Args:
        owner: any module.
        recipe: of it.
        lookup: a module's recipe, or None.
        opened: gets the sequences that are among its parts.
    """
    found = []
    for names in (recipe.main, (recipe.shortcut,)):
        modules = open_parts(named_of(owner, names), opened, lookup)
        pairs = pairwise(module for _, module in modules)
        found += [conv for conv, norm in pairs if reasons.unit_refusal(conv, norm) is None]
    return found


# ---- the guards


def parts_of(owner: nn.Module, recipe: Recipe, x: Tensor) -> Parts | str:
    """The owner's parts, or why nothing of it may run fused on a tensor like `x`.

    Ask `reasons.context_refusal` first: this looks at the modules alone.
    """
    reason = _missing(owner, recipe)
    if reason is not None:
        return reason
    modules = owner._modules
    bypassed: list[nn.Module] = []
    left: list[str] = []
    before, after_fork = _split(recipe)
    lead = _group(named_of(owner, before), x, bypassed, left)
    rest = _group(named_of(owner, after_fork), x, bypassed, left)
    adds = bool(recipe.shortcut) and (recipe.always or modules.get(recipe.shortcut) is not None)
    shortcut = _group(named_of(owner, (recipe.shortcut,)) if adds else (), x, bypassed, left)
    for group in (lead, rest, shortcut):
        if isinstance(group, str):
            return group
    main, fork = [*lead, *rest], len(lead)
    if not any(isinstance(part, Fused) for part in (*main, *shortcut)):
        return left[0] if left else f"{type(owner).__name__} has no convolution with a BatchNorm"
    if adds and not (main and _keeps_its_input(main[0])):
        # The class's forward reads x again afterwards.
        return left[0] if left else f"{type(owner).__name__} does not begin with a convolution"
    joins = adds and isinstance(main[-1], Fused) and main[-1].activation == "none"
    after = modules.get(recipe.activation)
    reason = after and reasons.activation_refusal(after)
    if after is None or _is_identity(after):
        after = None
    elif reason is None and joins:
        main[-1] = main[-1]._replace(activation="relu")
        bypassed.append(after)
        after = None
    elif type(after) is nn.ReLU and reason is not None:
        return f"{recipe.activation}: {reason}"
    elif reason is not None:
        left.append(f"{recipe.activation}: {reason}")
    if isinstance(main[0], Fused) and main[0].unit.channels != x.shape[1]:
        # torch's own error is the one that is expected
        return f"x has {x.shape[1]} channels, conv1 takes {main[0].unit.channels}"
    if not recipe.shortcut:  # a pool in a sequence needs no words
        left = [words for words in left if not words.endswith(BY_ITSELF)]
    words = "; ".join(dict.fromkeys(left))
    parts = Parts(main, shortcut, fork, adds, joins, after, bypassed, words)
    return (_misfit if parts.is_whole else _called_refusal)(parts, x) or parts


def _split(recipe: Recipe) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The names in main up to where the shortcut branches off, and the rest."""
    if not recipe.fork:
        return (), recipe.main
    at = recipe.main.index(recipe.fork) + 1
    return recipe.main[:at], recipe.main[at:]


def _keeps_its_input(part: Part) -> bool:
    """Whether it writes over nothing that it reads, whoever made it."""
    return type(part) in (Fused, nn.Conv2d) or reasons.is_plain_norm(part)


def _misfit(parts: Parts, x: Tensor) -> str | None:
    """Why the maps do not fit each other, which torch's own error will say; else None."""
    shape = x.shape
    for part in parts.main:
        if part.unit.channels != shape[1]:
            return f"a convolution takes {part.unit.channels} channels, it is given {shape[1]}"
        shape = part.unit.shape_after(shape)
    shortcut = x.shape
    if parts.shortcut:
        shortcut = parts.shortcut[0].unit.shape_after(shortcut)
    if parts.adds and shape != shortcut:
        return f"the convolutions end in {list(shape)}, the shortcut in {list(shortcut)}"
    return None


def _missing(owner: nn.Module, recipe: Recipe) -> str | None:
    """Why an owner's parts are not those of its class: its own forward has the error for it."""
    for name in (*(recipe.main or ()), recipe.shortcut + "?", recipe.activation + "?"):
        module = getattr(owner, name.removesuffix("?"), None)
        if module is None and not name.endswith("?"):
            return f"{name} is missing"
        if not (module is None or isinstance(module, nn.Module)):
            return f"{name.removesuffix('?')} is a {type(module).__name__}"
    if recipe.activation and owner._modules.get(recipe.activation) is None:
        return f"{recipe.activation} is missing"
    return None


def _group(
    named: Iterable[tuple[str, nn.Module | None]],
    x: Tensor,
    bypassed: list[nn.Module],
    left: list[str],
) -> list[Part] | str:
    """Modules that run one after the other as parts, or why one that could be fused may not."""
    rest = open_parts(named, bypassed, recipe_of)
    parts: list[Part] = []
    while rest:
        name, module = rest.pop(0)
        norm = rest[0][1] if rest else None
        reason = reasons.unit_refusal(module, norm)
        if reason is not None:
            left += _why_called(name, module, reason)
            parts.append(module)
            continue
        unit = reasons.unit_of(module, norm, x)
        if isinstance(unit, str):
            return f"{name}: {unit}"
        at = rest.pop(0)[0]
        inner = [(f"{at}.{n}", m) for n, m in reasons.runs_inside(norm)]
        rest = open_parts(inner, bypassed, recipe_of) + rest
        relu = bool(rest) and type(rest[0][1]) is nn.ReLU
        if relu and reasons.call_refusal(rest[0][1]) is not None:
            return f"{rest[0][0]}: {reasons.call_refusal(rest[0][1])}"
        parts.append(Fused(unit, norm, "relu" if relu else "none"))
        bypassed += [module, norm]
        if relu:
            bypassed.append(rest.pop(0)[1])
    return parts


def _why_called(name: str, module: nn.Module, refusal: str) -> list[str]:
    """In words, what is called that somebody might have expected to be fused."""
    kind, hooked = type(module).__name__, reasons.has_hooks(module)
    if isinstance(module, nn.Conv2d):
        return [f"{name}: {refusal}"]
    if type(module) is nn.ReLU or reasons.is_like_norm(module):
        return []
    if reasons.is_like_activation(module):
        return [f"{name}: {kind} is not a ReLU"]
    return [f"{name}: {reasons.HOOKED}" if hooked else f"{name} ({kind}) {BY_ITSELF}"]


def _called_refusal(parts: Parts, x: Tensor) -> str | None:
    """Why what is called beside the ops does not allow them: it needs or makes a gradient."""
    if not torch.is_grad_enabled():
        return None
    called = [part for part in (*parts.main, *parts.shortcut) if isinstance(part, nn.Module)]
    if x.requires_grad or any(p.requires_grad for m in called for p in m.parameters()):
        return "a gradient is needed; for inference use torch.inference_mode() or no_grad()"
    return None
