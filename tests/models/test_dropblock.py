"""DropBlock: the share that it drops, the shape of what it drops, where it sits, and its schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmpretrain.models.backbones import ResNet
from torch import nn

from enc_plugin.models import DropBlock, DropBlockResNet, DropBlockResNetCIFAR6n, DropBlockScheduleHook


@pytest.mark.parametrize("side", [7, 14])
@pytest.mark.parametrize("share", [0.1, 0.025])
def test_the_share_asked_for_is_dropped(side, share):
    out = DropBlock(share, 7)(torch.ones(64, 256, side, side))
    # Blocks may overlap, which drops a little less.
    assert 0.85 * share < (out == 0).float().mean().item() < 1.1 * share
    assert out.mean().item() == pytest.approx(1, abs=1e-3)


def test_what_is_dropped_are_whole_blocks_of_single_channels():
    zeros = DropBlock(0.02, 3)(torch.ones(16, 8, 15, 15)) == 0
    blocks = nn.functional.unfold(zeros.float().flatten(0, 1).unsqueeze(1), 3).sum(1) == 9
    covered = nn.functional.fold(blocks.float().unsqueeze(1).expand(-1, 9, -1).contiguous(), (15, 15), 3).squeeze(1)
    assert torch.equal(covered > 0, zeros.flatten(0, 1))
    assert not torch.equal(zeros[:, 0], zeros[:, 1])


def test_evaluation_and_zero_progress_drop_nothing():
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    layer = DropBlock(0.5)
    assert layer.eval()(x) is x
    layer.train().progress = 0.0
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_maps_smaller_than_a_block_work(side):
    assert DropBlock(0.1, 7)(torch.ones(2, 3, side, side)).shape == (2, 3, side, side)


def test_half_precision_keeps_its_scale():
    out = DropBlock(0.1, 7)(torch.ones(64, 256, 14, 14, dtype=torch.float16))  # the mask's sum is beyond float16
    assert out.dtype == torch.float16
    assert out.float().mean().item() == pytest.approx(1, abs=1e-2)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="block_size: expected an odd number, got 4"):
        DropBlock(0.1, 4)
    with pytest.raises(ValueError, match="drop_prob: expected a share"):
        DropBlock(1.0)
    with pytest.raises(ValueError, match="drop_stages: expected numbers from 1 to 3"):
        DropBlockResNetCIFAR6n(8, drop_stages=(3, 4))
    with pytest.raises(ValueError, match="with_cp"):
        DropBlockResNet(18, with_cp=True)


def test_stages_3_and_4_drop_and_stage_3_drops_a_quarter():
    backbone = DropBlockResNet(50)
    shares = {name: {block.drop_block.drop_prob for block in getattr(backbone, name)} for name in ("layer3", "layer4")}
    assert shares == {"layer3": {0.025}, "layer4": {0.1}}
    assert all(isinstance(block.drop_block, nn.Identity) for block in (*backbone.layer1, *backbone.layer2))


def test_the_last_two_stages_drop_by_default():
    backbone = DropBlockResNetCIFAR6n(8)
    dropping = {name: isinstance(getattr(backbone, name)[0].drop_block, DropBlock) for name in backbone.res_layers}
    assert dropping == {"layer1": False, "layer2": True, "layer3": True}


@pytest.mark.parametrize("depth", [18, 50])
def test_the_network_without_drops_is_the_stock_one(depth):
    stock, ours = ResNet(depth), DropBlockResNet(depth)
    ours.load_state_dict(stock.state_dict())
    for module in ours.modules():
        if isinstance(module, DropBlock):
            module.progress = 0.0
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x)[-1], stock(x)[-1])


@pytest.mark.parametrize(("depth", "places"), [(18, 3), (50, 4)])
def test_every_convolution_and_the_shortcut_of_a_dropping_block_drop(depth, places):
    block = DropBlockResNet(depth).layer4[1]
    calls = []
    block.drop_block.register_forward_hook(lambda *_: calls.append(1))
    block(torch.randn(2, block.in_channels, 7, 7))
    assert len(calls) == places


def test_the_share_rises_linearly_over_the_run():
    backbone = DropBlockResNetCIFAR6n(8, drop_stages=(2, 3))
    hook, seen = DropBlockScheduleHook(), []
    for iteration in range(4):
        hook.before_train_iter(SimpleNamespace(model=backbone, iter=iteration, max_iters=4), 0)
        seen.append({m.progress for m in backbone.modules() if isinstance(m, DropBlock)})
    assert seen == [{0.0}, {0.25}, {0.5}, {0.75}]
