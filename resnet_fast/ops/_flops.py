# SPDX-License-Identifier: Apache-2.0
"""Flop formulas that reach torch's counter when it is imported, and do not import it themselves.

`torch.utils.flop_counter` imports triton, and logs a warning where there is none: two thirds of
what importing this package cost, for a counter that few programs use.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable

COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[object, Callable]] = []


def flop_formula(op: object) -> Callable[[Callable], Callable]:
    """torch's `register_flop_formula` for one overload packet, now or when there is a counter."""

    def register(formula: Callable) -> Callable:
        if COUNTER in sys.modules:
            sys.modules[COUNTER].register_flop_formula(op)(formula)
        else:
            _waiting.append((op, formula))
        return formula

    return register


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the counter's module as Python would, once, and registers behind its import."""

    def find_spec(self, name, path, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            for op, formula in _waiting:
                module.register_flop_formula(op)(formula)

        spec.loader.exec_module = load_and_register
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
