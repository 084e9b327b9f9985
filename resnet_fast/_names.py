# SPDX-License-Identifier: Apache-2.0
"""Names as people write them: `ResNet18`, `fp32`, `torch.bfloat16`; refused with "did you mean".

One home: every function and command takes the same spellings and refuses others in the same words.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

DTYPES = ("float32", "bfloat16", "float16")
_SHORT = {
    "fp32": "float32", "f32": "float32", "float": "float32", "single": "float32",
    "fp16": "float16", "f16": "float16", "half": "float16", "bf16": "bfloat16",
}  # fmt: skip
ALIASES = _SHORT | {f"torch.{name}": _SHORT.get(name, name) for name in (*_SHORT, *DTYPES)}


def choose(
    kind: str, name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None
) -> str:
    """The one of `known` that `name` means; upper and lower case are the same.

    Args:
        kind: what it names, for the message: "model", "dtype", ...
        name: as the user wrote it.
        known: the names there are, in the order in which the message lists them.
        aliases: other spellings of them, in small letters.

    Raises:
        ValueError: none is meant; the nearest are suggested and all are listed.
    """
    known = list(known)
    spellings = {other: one for other, one in (aliases or {}).items() if one in known}
    spellings |= {one.lower(): one for one in known}
    written = name.lower()
    if written in spellings:
        return spellings[written]
    raise ValueError(unknown(kind, name, known, spellings))


def unknown(
    kind: str, name: str, known: Iterable[str], spellings: Mapping[str, str] | None = None
) -> str:
    """The words that refuse a name: they suggest the nearest and list the known."""
    known = list(known)
    spellings = spellings or {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), spellings, n=3)
    meant = " or ".join(dict.fromkeys(spellings[one] for one in near))
    question = f"did you mean {meant}? " if meant else ""
    return f"unknown {kind} {name!r}; {question}known are {', '.join(known)}"


def dtype(name: str, known: Iterable[str] = DTYPES) -> str:
    """The name that torch has for a dtype: "float32" for "fp32", "float" and "torch.float32".

    Raises:
        ValueError: it is none of `known`.
    """
    return choose("dtype", name, known, ALIASES)


def natural(names: Iterable[str]) -> list[str]:
    """Sorted as people count: resnet18 before resnet101."""
    return sorted(
        names, key=lambda name: [(text, int(n or 0)) for text, n in re.findall(r"(\D*)(\d*)", name)]
    )
