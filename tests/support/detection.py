# SPDX-License-Identifier: Apache-2.0
"""What a torchvision detector computes before it decides: the part whose rounding can be judged.

A detector ends in decisions: the best k candidates, those that overlap no better one. Two that
differ by a rounding may decide differently, by whole boxes, and both be right; with random weights,
whose scores lie close together, they often do. So what is compared comes before: features, scores
and offsets at every anchor, and what the heads say of boxes that are given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def undecided(
    model: nn.Module,
    images: list[Tensor],  # each [3, H, W]
    boxes: Tensor,  # [boxes, 4]: x1, y1, x2, y2
) -> dict[str, Tensor]:
    """All that a detector computes up to its decisions, by name.

    Args:
        model: torchvision's Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS, in evaluation mode.
        images: as the model takes them.
        boxes: what the second stage of an R-CNN is asked about, in every image.

    Example:
        >>> undecided(fasterrcnn_resnet50_fpn().eval(), [torch.rand(3, 64, 64)], boxes).keys()
    """
    batch, _ = model.transform(images)
    features = model.backbone(batch.tensors)
    found = {f"features {name}": feature for name, feature in features.items()}
    if not hasattr(model, "rpn"):
        return found | model.head(list(features.values()))
    objectness, offsets = model.rpn.head(list(features.values()))
    found |= {f"objectness {i}": level for i, level in enumerate(objectness)}
    found |= {f"offsets {i}": level for i, level in enumerate(offsets)}
    heads, given = model.roi_heads, [boxes.to(batch.tensors.dtype)] * len(images)
    pooled = heads.box_roi_pool(features, given, batch.image_sizes)
    found["classes"], found["boxes"] = heads.box_predictor(heads.box_head(pooled))
    for name in ("mask", "keypoint"):
        if getattr(heads, f"{name}_head", None) is not None:
            pooled = getattr(heads, f"{name}_roi_pool")(features, given, batch.image_sizes)
            head, predictor = (getattr(heads, f"{name}_{part}") for part in ("head", "predictor"))
            found[name] = predictor(head(pooled))
    return found


def some_boxes(
    count: int,
    size: int,  # of the image's side
) -> Tensor:  # [count, 4]
    """Boxes inside an image, the same each time."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * size / 2
    return torch.cat(
        [corners, corners + 1 + torch.rand(count, 2, generator=generator) * size / 3], 1
    )
