# SPDX-License-Identifier: Apache-2.0
"""`weights=` in every spelling, with torchvision's enums; nothing is downloaded here."""

from __future__ import annotations

import enum
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
import torchvision
import torchvision.models._api as reference_api
import torchvision.models.resnet as reference

import resnet_fast.models
import resnet_fast.models.resnet as ours

BUILDERS = [name for name in reference.__all__ if name[0].islower()]


@pytest.fixture
def server(monkeypatch):
    """Checkpoints by URL, as the download would give them; `calls` tells who asked for what."""

    class Server:
        def __init__(self):
            self.calls, self.states = [], {}

        def get(self, url, *args, **kwargs):
            self.calls.append((url, args, kwargs))
            if url not in self.states:
                torch.manual_seed(len(self.states) + 100)
                name = url.rsplit("/", 1)[1].split("-")[0]
                self.states[url] = getattr(reference, name)().state_dict()
            return self.states[url]

    server = Server()
    monkeypatch.setattr(reference_api, "load_state_dict_from_url", server.get)
    return server


def build(module, name, *args, **kwargs):
    """What a call does: the model's weights or the error, and the warnings' types and texts."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = getattr(module, name)(*args, **kwargs).state_dict()
        except Exception as error:
            result = (type(error), str(error))
    return result, [(w.category, str(w.message)) for w in caught]


def assert_alike(server, name, *args, **kwargs):
    """Our builder does what torchvision's does; returns what that was."""
    server.calls = []
    mine, my_warnings = build(ours, name, *args, **kwargs)
    my_calls, server.calls = server.calls, []
    theirs, their_warnings = build(reference, name, *args, **kwargs)
    assert my_warnings == their_warnings
    assert my_calls == server.calls
    assert type(mine) is type(theirs), (mine, theirs)
    if isinstance(theirs, tuple):
        assert mine == theirs
    else:
        assert all(torch.equal(a, b) for a, b in zip(mine.values(), theirs.values(), strict=True))
    return mine, my_warnings


V2 = reference.ResNet50_Weights.IMAGENET1K_V2.url
V1 = reference.ResNet50_Weights.IMAGENET1K_V1.url


@pytest.mark.parametrize(
    ("weights", "url"),
    [
        pytest.param("IMAGENET1K_V1", V1, id="V1"),
        pytest.param("IMAGENET1K_V2", V2, id="V2"),
        pytest.param("DEFAULT", V2, id="DEFAULT"),
        pytest.param("ResNet50_Weights.DEFAULT", V2, id="qualified"),
        pytest.param(reference.ResNet50_Weights.IMAGENET1K_V1, V1, id="member"),
        pytest.param(reference.ResNet50_Weights.DEFAULT, V2, id="alias"),
    ],
)
def test_spellings_of_weights(weights, url, server):
    state, caught = assert_alike(server, "resnet50", weights=weights)
    assert not caught
    assert server.calls == [(url, (), {"progress": True, "check_hash": True})]
    assert torch.equal(state["conv1.weight"], server.states[url]["conv1.weight"])


def test_progress_is_passed_on(server):
    assert_alike(server, "resnet18", weights="DEFAULT", progress=False)
    assert server.calls[0][2] == {"progress": False, "check_hash": True}


@pytest.mark.parametrize(
    ("args", "kwargs", "messages", "url"),
    [
        pytest.param((), {"pretrained": True}, 2, V1, id="pretrained"),
        pytest.param((), {"pretrained": False}, 2, None, id="not-pretrained"),
        pytest.param((True,), {}, 2, V1, id="positional-true"),
        pytest.param((False,), {}, 2, None, id="positional-false"),
        pytest.param((None,), {}, 1, None, id="positional-none"),
        pytest.param((True, False), {}, 2, V1, id="positional-progress"),
        pytest.param(("IMAGENET1K_V2",), {"progress": False}, 1, V2, id="positional-string"),
        pytest.param((), {"weights": True}, 1, V1, id="weights-true"),
        pytest.param((), {"weights": "legacy"}, 1, V1, id="legacy-string"),
        pytest.param((True,), {"pretrained": False}, 2, V1, id="positional-over-pretrained"),
        pytest.param((None,), {"weights": "DEFAULT"}, 1, None, id="positional-over-keyword"),
    ],
)
def test_legacy_arguments(args, kwargs, messages, url, server):
    _, caught = assert_alike(server, "resnet50", *args, **kwargs)
    assert [category for category, _ in caught] == [UserWarning] * messages
    assert [call[0] for call in server.calls] == ([url] if url else [])


def test_a_legacy_warning_points_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.resnet18(False)
    assert len(caught) == 2
    assert {w.filename for w in caught} == {__file__}


class Foreign(enum.Enum):
    A = 1


@pytest.mark.parametrize(
    ("error", "name", "kwargs"),
    [
        pytest.param(
            TypeError, "resnet50", {"weights": reference.ResNet18_Weights.DEFAULT}, id="wrong-enum"
        ),
        pytest.param(KeyError, "resnet50", {"weights": "IMAGENET22K"}, id="unknown-string"),
        pytest.param(
            KeyError, "resnet18", {"weights": "ResNet50_Weights.DEFAULT"}, id="wrong-name"
        ),
        pytest.param(
            ValueError, "resnet50", {"weights": "DEFAULT", "num_classes": 10}, id="classes"
        ),
        pytest.param(ValueError, "resnext50_32x4d", {"groups": 1}, id="x50-groups"),
        pytest.param(ValueError, "resnext50_32x4d", {"width_per_group": 8}, id="x50-width"),
        pytest.param(ValueError, "resnext101_32x8d", {"width_per_group": 4}, id="x101-width"),
        pytest.param(ValueError, "resnext101_64x4d", {"groups": 32}, id="x101-64-groups"),
        pytest.param(ValueError, "wide_resnet50_2", {"width_per_group": 64}, id="w50-width"),
        pytest.param(ValueError, "wide_resnet101_2", {"width_per_group": 64}, id="w101-width"),
        pytest.param(TypeError, "resnet50", {"weights": None, "pretrained": True}, id="both"),
    ],
)
def test_errors_are_torchvision_s(error, name, kwargs, server):
    result, _ = assert_alike(server, name, **kwargs)
    assert result[0] is error
    assert not server.calls


def test_error_texts():
    """The two texts of torchvision that programs match on, spelled out."""
    with pytest.raises(TypeError, match="Invalid Weight class provided"):
        ours.resnet50(weights=reference.ResNet18_Weights.DEFAULT)
    with pytest.raises(ValueError, match="'num_classes' expected value 1000 but got 10 instead"):
        ours.resnet50(weights="DEFAULT", num_classes=10)


def test_a_foreign_enum_is_refused():
    with pytest.raises(TypeError, match="Invalid Weight class provided"):
        ours.resnet50(weights=Foreign.A)


def test_arguments_that_agree_with_the_weights(server):
    assert_alike(server, "resnet18", weights="DEFAULT", num_classes=1000)
    assert_alike(server, "resnext50_32x4d", groups=32, width_per_group=4)


def test_too_many_positional_arguments():
    with pytest.raises(TypeError, match="at most 2 positional arguments"):
        ours.resnet18(None, True, 10)


@pytest.mark.parametrize("name", BUILDERS)
def test_get_model_weights_reads_our_builders(name):
    theirs = torchvision.models.get_model_weights(name)
    assert torchvision.models.get_model_weights(getattr(ours, name)) is theirs
    assert getattr(resnet_fast.models, theirs.__name__) is theirs


def test_torchvision_s_registry_is_left_alone():
    assert torchvision.models.get_model_builder("resnet50") is reference.resnet50


def test_source_and_help_of_a_builder():
    assert "Bottleneck, [3, 4, 6, 3]" in inspect.getsource(ours.resnet50)
    assert ours.resnet50.__name__ == "resnet50"
    assert ours.resnet50.__module__ == ours.__name__
    assert "ResNet-50" in inspect.getdoc(ours.resnet50)


def python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_models_do_not_import_torchvision():
    python(
        "import inspect, sys\n"
        "from resnet_fast.models import *\n"
        "resnet18(num_classes=2)\n"
        "assert list(inspect.signature(resnet18).parameters) == ['weights', 'progress', 'kwargs']\n"
        "assert 'torchvision' not in sys.modules"
    )


def test_without_torchvision():
    """Everything works but `weights=`, and that says what to install."""
    python(
        """
import sys, warnings
sys.modules["torchvision"] = None
warnings.simplefilter("ignore")
import torch
from resnet_fast.models import *
import resnet_fast.models

model = get_model("resnet18", num_classes=3).eval()
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
resnet18(pretrained=False)
resnet18(None, False)

def fails(call):
    try:
        call()
    except ImportError as error:
        assert 'pip install "resnet_fast[vision]"' in str(error), error
        assert "ResNet18_Weights" in str(error), error
    else:
        raise AssertionError("no error")

fails(lambda: resnet18(weights="DEFAULT"))
fails(lambda: resnet18(pretrained=True))
fails(lambda: resnet_fast.models.ResNet18_Weights)
"""
    )
