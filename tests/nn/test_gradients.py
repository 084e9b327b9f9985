# SPDX-License-Identifier: Apache-2.0
"""Where a gradient is needed the plain path runs, and every gradient is torchvision's."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

import resnet_fast


def gradients(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def assert_gradients_agree(fused, plain, x):
    for mine, theirs in zip(gradients(fused, x), gradients(plain, x), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


def test_evaluation_with_gradients(warmed, image, row):
    fused, plain = warmed
    x = image(2, 3, 40, 40)
    assert_gradients_agree(fused, plain, x)
    assert "gradient" in row(fused, "layer1.0").reason
    assert "gradient" in row(fused, "(stem)").reason
    with torch.no_grad():
        for _ in range(2):
            fused(x)
    found = row(fused, "layer1.0")
    assert found.fused, found  # what spoke against it in another call does no longer


def test_frozen_weights_run_fused_with_grad_mode_on(warmed, image, row):
    fused, plain = warmed
    x = image(2, 3, 40, 40)
    for model in (fused, plain):
        model.requires_grad_(False)
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert row(fused, "layer1.0").fused
    mine, theirs = (
        torch.autograd.grad(m(y).sum(), y)[0]
        for m, y in ((m, x.clone().requires_grad_()) for m in (fused, plain))
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert "gradient" in row(fused, "layer1.0").reason


def test_fine_tuning_the_last_stage(warmed, image, row):
    fused, plain = warmed
    for model in (fused, plain):
        model.requires_grad_(False)
        model.layer2.requires_grad_(True)
    x = image(2, 3, 40, 40)
    for model in (fused, plain):
        model(x).square().sum().backward()
    assert row(fused, "layer1.0").fused
    assert not row(fused, "layer2.0").fused
    for mine, theirs in zip(fused.layer2.parameters(), plain.layer2.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4 * scale)


def test_full_backward_hooks_fire(warmed, image):
    fused, plain = warmed
    fired = {fused: [], plain: []}
    for model, seen in fired.items():
        for name in ("layer1.0.conv1", "layer1.0", "layer2.0.downsample", "layer2"):
            module = model.get_submodule(name)
            module.register_full_backward_hook(
                lambda _m, _i, grads, seen=seen, name=name: seen.append((name, grads[0].sum()))
            )
    x = image(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert_gradients_agree(fused, plain, x)
    assert [name for name, _ in fired[fused]] == [name for name, _ in fired[plain]]
    assert len(fired[fused]) == 4


def test_a_global_hook_sees_every_module(warmed, image, row):
    fused, plain = warmed
    x = image(2, 3, 40, 40)
    seen = {}
    with torch.no_grad():
        for model in (fused, plain):
            names = {module: name for name, module in model.named_modules()}
            calls = seen[model] = []
            handle = nn_module.register_module_forward_hook(
                lambda module, _i, _o, calls=calls, names=names: calls.append(names[module])
            )
            model(x)
            handle.remove()
    assert seen[fused] == seen[plain]
    assert "layer1.0.relu" in seen[fused]
    assert "global" in row(fused, "layer1.0").reason


def test_a_hook_can_be_removed_again(warmed, image, row):
    fused, plain = warmed
    x = image(2, 3, 40, 40)
    with torch.no_grad():
        for _ in range(2):
            handles = [
                m.layer1[0].bn1.register_forward_hook(lambda *a: a[2] * 2) for m in (fused, plain)
            ]
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
            assert not row(fused, "layer1.0").fused
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
            assert row(fused, "layer1.0").fused


def test_training_mode_is_torchvisions_own(pair, image):
    fused, plain = (m.train() for m in pair())
    assert_gradients_agree(fused, plain, image(4, 3, 40, 40))
    state = plain.state_dict()
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)
    assert not any(r.fused for r in resnet_fast.report(fused))


def test_forward_mode_derivatives(warmed, image, row):
    fused, plain = warmed
    x, tangent = image(2, 3, 40, 40), image(2, 3, 40, 40, seed=4)
    tangents = []
    for model in (fused, plain):
        with torch.no_grad(), forward_ad.dual_level():  # no_grad() does not switch it off
            y = model(forward_ad.make_dual(x, tangent))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-4)
    assert "forward_ad" in row(fused, "layer1.0").reason
