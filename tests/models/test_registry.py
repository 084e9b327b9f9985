# SPDX-License-Identifier: Apache-2.0
"""The registry of models: names in, builders out."""

from __future__ import annotations

import pytest
import torchvision.models.resnet as reference

from resnet_fast import models
from resnet_fast.models import registry


def test_the_ten_builders_are_registered():
    builders = {name for name in reference.__all__ if name[0].islower()}
    assert builders <= set(models.list_models())
    assert models.list_models() == sorted(models.list_models())


def test_builder_by_name():
    assert models.get_model_builder("resnet50") is models.resnet50
    assert models.get_model_builder("ResNet50") is models.resnet50  # as torchvision's


def test_model_by_name_takes_the_builder_s_arguments():
    model = models.get_model("resnet18", num_classes=7)
    assert type(model) is models.ResNet
    assert model.fc.out_features == 7


@pytest.mark.parametrize("look_up", [models.get_model, models.get_model_builder])
def test_an_unknown_model_lists_the_known_ones(look_up):
    with pytest.raises(
        ValueError, match="unknown model 'resnet51'; did you mean resnet50"
    ) as caught:
        look_up("resnet51")
    assert all(name in str(caught.value) for name in models.list_models())


def test_registering(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @models.register_model()
    def tiny(**config):
        return models.ResNet(**config)

    models.register_model("small")(tiny)
    assert models.get_model_builder("tiny") is models.get_model_builder("small") is tiny
    with pytest.raises(ValueError, match="already registered under the name 'tiny'"):
        models.register_model()(tiny)


def test_the_test_s_models_are_gone():
    assert "tiny" not in models.list_models()
