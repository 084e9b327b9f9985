# SPDX-License-Identifier: Apache-2.0
"""compare() is a view of the suite: its peers' answers are checked before they get a time."""

from __future__ import annotations

import pytest
import torch

from resnet_fast.comparison import measure, tables
from resnet_fast.comparison.measure import compare
from resnet_fast.measuring import peers, protocol
from resnet_fast.measuring.photographs import Photographs


def wrong(work):
    model = work.placed(work.theirs)
    return protocol.Entrant(lambda x: model(x) + 1)


def missing(work):
    raise protocol.Missing("not installed; pip install it")


@pytest.fixture
def pictures():
    torch.manual_seed(0)
    return Photographs(["a", "b"], torch.randn(2, 3, 224, 224), {})


def run(pictures, monkeypatch, build):
    peer = peers.Provider("peer", "", build)
    listed = peers.compared("cpu")
    monkeypatch.setattr(measure, "compared", lambda kind, named: [*listed, peer])
    return compare("resnet18", pictures, batches=[1], dtypes=["float32"], device="cpu", seconds=0.0)


def test_a_peer_whose_answer_is_wrong_has_no_time_and_the_others_have_one(pictures, monkeypatch):
    found = run(pictures, monkeypatch, wrong)
    (setting,) = found.settings
    assert found.agrees and set(setting.timings) == {peers.NCHW, peers.NHWC, peers.OURS}
    assert setting.untimed["peer"].startswith("failed its check: its first call: error")
    assert all(timing.rounds == 7 for timing in setting.timings.values())
    *_, table = (part for part in tables.render(found) if not isinstance(part, str))
    assert "failed its check" in str(table)
    assert found.to_json()["settings"][0]["untimed"] == setting.untimed


def test_a_peer_that_is_not_installed_is_bad_input(pictures, monkeypatch):
    with pytest.raises(ValueError, match="pip install it"):
        run(pictures, monkeypatch, missing)
