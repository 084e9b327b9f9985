# SPDX-License-Identifier: Apache-2.0
"""Real photographs to run models on: freely licensed ones that two packages ship, or any files.

scikit-image ships astronaut, coffee, chelsea and rocket (public domain and CC0) and a stereo pair
of a motorcycle (CC0); scikit-learn ships china and flower (CC BY 2.0, by danielbuechele and
vultilion). See their data folders' README files.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

SHIPPED = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/motorcycle_right.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)


@dataclass(frozen=True, slots=True)
class Photographs:
    """Photographs as a model takes them.

    Args:
        names: file names, in order.
        pixels: [N, 3, 224, 224] float32, resized, cropped and normalised as torchvision's weights
            ask for.
        skipped: files that could not be read, with the reason.
    """

    names: list[str]
    pixels: Tensor
    skipped: dict[str, str]

    def batch(self, size: int) -> Tensor:
        """`size` of them, starting over where there are fewer: [size, 3, 224, 224]."""
        return self.pixels[torch.arange(size) % len(self.names)]


def load(files: Sequence[str | Path] = ()) -> Photographs:
    """Read photographs, skipping what is none.

    Args:
        files: image files; empty for the shipped ones.

    Raises:
        FileNotFoundError: no file was given and neither scikit-image nor scikit-learn is installed.
        ValueError: none of the files is a readable image.
    """
    paths = [Path(f) for f in files] or _shipped()
    if not paths:
        raise FileNotFoundError(
            'no photographs: pip install "resnet_fast[all]" (scikit-image and scikit-learn ship '
            "some), or name image files with --images"
        )
    names, pixels, skipped = [], [], {}
    for path in paths:
        try:
            pixels.append(_read(path))
            names.append(path.name)
        except (OSError, ValueError, SyntaxError, Warning) as error:
            skipped[str(path)] = f"{type(error).__name__}: {error}"
    if not pixels:
        listed = "; ".join(f"{name} ({reason})" for name, reason in skipped.items())
        raise ValueError(f"none of the files is a readable image: {listed}")
    return Photographs(names, torch.stack(pixels), skipped)


def _shipped() -> list[Path]:
    found = []
    for package, relative in SHIPPED:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / relative
            if path.exists():
                found.append(path)
    return found


def _read(path: Path) -> Tensor:  # [3, 224, 224]
    from PIL import Image
    from torchvision.transforms._presets import ImageClassification

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    return ImageClassification(crop_size=224)(rgb)
