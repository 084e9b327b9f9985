# SPDX-License-Identifier: Apache-2.0
"""Models of other libraries, small and with random weights, and what of them fuses.

`python -m tests.conversion.zoo` writes the table of `resnet_fast/conversion/README.md`; the test
beside it holds the table to what happens.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import resnet_fast

TABLE = Path(resnet_fast.__file__).parent / "conversion" / "README.md"
HEAD = "| library | model | fused | what stays as it is |\n|---|---|---|---|\n"


@dataclass(frozen=True, slots=True)
class Case:
    """A model to optimize.

    Args:
        library: its import name.
        name: of the model, as the table has it.
        build: makes it.
        size: height and width of its input.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    size: int = 64

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"


def _torchvision(name: str, **options) -> Case:
    def build() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, **options)

    return Case("torchvision", name, build)


def _children_of_resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return nn.Sequential(*list(resnet18().children())[:-1])


def _timm(name: str, label: str = "", **options) -> Case:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return Case("timm", label or name, build)


SMALL = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1]}
DETR = {
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 3,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


def _transformers(prefix: str, head: str, label: str = "", **options) -> Case:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{prefix}Config")(**SMALL, **options)
        return getattr(transformers, f"{prefix}{head}")(config)

    return Case("transformers", f"{prefix}{head}{label}", build)


def _detr(prefix: str) -> Case:
    def build() -> nn.Module:
        import transformers

        backbone = transformers.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16] * 4,
            depths=[1] * 4,
            out_features=["stage2", "stage3", "stage4"],
        )
        config = getattr(transformers, f"{prefix}Config")(backbone_config=backbone, **DETR)
        return getattr(transformers, f"{prefix}ForObjectDetection")(config)

    return Case("transformers", f"{prefix}ForObjectDetection (frozen norms)", build, size=128)


def _clip() -> nn.Module:
    from open_clip.modified_resnet import ModifiedResNet

    return ModifiedResNet([1, 2, 1, 1], output_dim=16, heads=4, image_size=64, width=16)


def _torchreid(file: str, name: str) -> Case:
    def build() -> nn.Module:
        # The packages around its models import data loaders, and those much that we do not need.
        for package in ("torchreid", "torchreid.reid", "torchreid.reid.models"):
            spec = importlib.util.find_spec(package)
            sys.modules.setdefault(package, importlib.util.module_from_spec(spec))
        models = importlib.import_module(f"torchreid.reid.models.{file}")
        return getattr(models, name)(num_classes=4, pretrained=False)

    return Case("torchreid", name, build)


def _smp(decoder: str, encoder: str) -> Case:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, decoder)(encoder, encoder_weights=None)

    return Case("segmentation_models_pytorch", f"{decoder} on {encoder}", build)


CASES = [
    _torchvision("resnet18"),
    _torchvision("resnext50_32x4d"),
    Case("torchvision", "Sequential(*resnet18.children())", _children_of_resnet18),
    _torchvision("regnet_x_400mf"),
    _torchvision("regnet_y_400mf"),
    _torchvision("mobilenet_v2"),
    _torchvision("fcn_resnet50", weights_backbone=None),
    _torchvision("deeplabv3_resnet50", weights_backbone=None),
    _torchvision("densenet121"),
    _torchvision("googlenet", init_weights=False, aux_logits=False),
    _timm("resnet18"),
    _timm("resnet26d"),
    _timm("resnet26t"),
    _timm("resnet26d", "resnet26d, features_only", features_only=True),
    _timm("seresnext26d_32x4d"),
    _timm("ecaresnet26t"),
    _timm("resnetblur18"),
    _timm("skresnet18"),
    _timm("legacy_seresnet18"),
    _timm("resnet50_clip.openai"),
    _timm("regnety_002"),
    _timm("hrnet_w18_small"),
    _timm("gcresnext26ts"),
    _timm("res2net50_26w_4s"),
    _timm("resnetv2_50"),
    _timm("resnet50_gn"),
    _transformers("ResNet", "ForImageClassification"),
    _transformers("ResNet", "ForImageClassification", ", basic blocks", layer_type="basic"),
    _transformers("ResNet", "Backbone"),
    _transformers("RegNet", "ForImageClassification", groups_width=16),
    *map(_detr, ("Detr", "ConditionalDetr", "DeformableDetr")),
    Case("open_clip", "ModifiedResNet", _clip),
    _torchreid("resnet", "resnet50"),
    _torchreid("resnetmid", "resnet50mid"),
    _torchreid("senet", "se_resnet50"),
    _torchreid("osnet", "osnet_x0_25"),
    _smp("Unet", "resnet18"),
    _smp("UnetPlusPlus", "resnet18"),
    _smp("Linknet", "tu-resnet26d"),
    _smp("FPN", "resnet18"),
    _smp("DeepLabV3Plus", "se_resnet50"),
]


def randomize(model: nn.Module) -> nn.Module:
    """Weights as drawn; BatchNorms as training leaves them; in evaluation."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)  # some start at zero
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def installed(case: Case) -> bool:
    return importlib.util.find_spec(case.library) is not None


def made(case: Case) -> tuple[nn.Module, torch.Tensor]:
    """The model and an input."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, case.size, case.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say while they build is theirs
        return randomize(case.build()), x


def row_of(case: Case, report: resnet_fast.Report) -> str:
    """A model's line of the table."""
    left: dict[str, None] = {}
    for row in report:
        if not row.fused:
            words = row.reason.partition("pre-activation")[1] or row.reason.split(": ")[-1]
            if words.endswith("forward is not one that is known"):
                words = "its forward is not known"
            left[f"{row.kind} ({words})"] = None
            continue
        for words in filter(None, row.reason.split("; ")):
            alone = re.search(r"\((\w+)\) runs by itself|: (\w+) is not a ReLU", words)
            if alone:
                left[alone[1] or alone[2]] = None
    stays = ", ".join(left)
    return f"| {case.library} | {case.name} | {report.fused} of {len(report)} | {stays} |"


def write_table() -> None:
    """Write the table anew, from the libraries that are here."""
    lines = []
    for case in filter(installed, CASES):
        model, x = made(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimized = resnet_fast.optimize(model)
        with torch.inference_mode():
            optimized(x)
        lines.append(row_of(case, resnet_fast.report(optimized)))
        print(lines[-1], flush=True)
    text = TABLE.read_text()
    TABLE.write_text(text[: text.index(HEAD)] + HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    write_table()
