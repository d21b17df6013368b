"""DropBlock (Ghiasi et al., 2018) in a ResNet, placed and scheduled as in its paper."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from mmpretrain.models.backbones import ResNet
from mmpretrain.models.backbones.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.ops import drop_block2d

from ..functional.checks import check_integer, check_number
from ..functional.precision import at_least_float32
from .backbones import ResNetCIFAR6n


class DropBlock(nn.Module):
    """Sets square blocks of each channel to zero in training, and rescales the rest to keep the mean.

    Uses torchvision's ``drop_block2d``, which drops the requested share. timm's ``DropBlock2d`` (1.0.31) samples block
    centres over the whole map, with the rate for the positions where a block fits: on 7x7 maps with blocks of 7 it
    drops 93 % instead of 10 %.

    Args:
        drop_prob: Share of the activations that is dropped at the end of the schedule, from 0 to below 1.
        block_size: Side of a block, odd; on smaller maps, the largest odd side that fits.

    Attributes:
        progress: Progress of the schedule, 0 to 1: ``progress * drop_prob`` is dropped.
            :class:`DropBlockScheduleHook` sets it; 1 without the hook.
    """

    def __init__(self, drop_prob: float, block_size: int = 7):
        super().__init__()
        check_number("drop_prob", drop_prob, "a share from 0 to below 1", lambda value: 0 <= value < 1)
        check_integer("block_size", block_size, 1)
        if block_size % 2 == 0:
            raise ValueError(f"block_size: expected an odd number, got {block_size!r}; a block needs a centre")
        self.drop_prob = drop_prob
        self.block_size = block_size
        self.progress = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Drop blocks of ``(N, C, H, W)`` in training; return it unchanged in evaluation."""
        if not self.training:
            return input
        side = min(self.block_size, *input.shape[-2:])
        side -= 1 - side % 2
        # Not in half precision, where the sum of drop_block2d's mask overflows.
        x = input.to(at_least_float32(input.dtype))
        return drop_block2d(x, self.progress * self.drop_prob, side).to(input.dtype)

    def extra_repr(self) -> str:
        """Probability and block size."""
        return f"drop_prob={self.drop_prob:g}, block_size={self.block_size}"


class _DropBlockBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        """The stock block with DropBlock behind each batch norm and on the shortcut."""
        identity = self.drop_block(x if self.downsample is None else self.downsample(x))
        out = self.drop_block(self.relu(self.norm1(self.conv1(x))))
        out = self.drop_block(self.norm2(self.conv2(out)))
        return self.relu(self.drop_path(out) + identity)


class _DropBlockBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        """The stock block with DropBlock behind each batch norm and on the shortcut."""
        identity = self.drop_block(x if self.downsample is None else self.downsample(x))
        out = self.drop_block(self.relu(self.norm1(self.conv1(x))))
        out = self.drop_block(self.relu(self.norm2(self.conv2(out))))
        out = self.drop_block(self.norm3(self.conv3(out)))
        return self.relu(self.drop_path(out) + identity)


def _with_drop_block(arch_settings: dict) -> dict:
    blocks = {BasicBlock: _DropBlockBasicBlock, Bottleneck: _DropBlockBottleneck}
    return {depth: (blocks[block], stages) for depth, (block, stages) in arch_settings.items()}


class _DropBlockMixin:
    def __init__(
        self, *args, drop_prob: float = 0.1, block_size: int = 7, drop_stages: tuple[int, ...] | None = None, **kwargs
    ):
        if kwargs.get("with_cp"):
            raise ValueError("with_cp: DropBlock's blocks have no activation checkpointing; leave it out")
        super().__init__(*args, **kwargs)
        check_number("drop_prob", drop_prob, "a share from 0 to below 1", lambda value: 0 <= value < 1)
        if drop_stages is None:
            drop_stages = tuple(range(1, len(self.res_layers) + 1))[-2:]
        if not isinstance(drop_stages, (list, tuple)):
            raise TypeError(f"drop_stages: expected a sequence of numbers or None, got {drop_stages!r}")
        for stage in drop_stages:
            check_integer("drop_stages", stage, 1)
        if max(drop_stages, default=0) > len(self.res_layers):
            raise ValueError(f"drop_stages: expected numbers from 1 to {len(self.res_layers)}, got {drop_stages!r}")
        for stage, name in enumerate(self.res_layers, start=1):
            # As in the authors' code, every stage before the last one drops a quarter of what its successor drops.
            prob = drop_prob / 4 ** (len(self.res_layers) - stage)
            for block in getattr(self, name):
                block.drop_block = DropBlock(prob, block_size) if stage in drop_stages else nn.Identity()


@MODELS.register_module()
class DropBlockResNet(_DropBlockMixin, ResNet):
    """``ResNet`` with DropBlock behind every convolution and on every shortcut of some stages; its keys are stock keys.

    The defaults are the best ResNet-50 setting of the DropBlock paper: stages 3 and 4, blocks of 7, a keep probability
    that falls from 1 to 0.9 (:class:`DropBlockScheduleHook`), and a quarter of the drop probability in stage 3.

    Args:
        *args, **kwargs: As for ``ResNet``, without ``with_cp``.
        drop_prob: Share dropped in the last stage at the end of training; a quarter of it one stage earlier, and so on.
        block_size: Side of a block, odd.
        drop_stages: Numbers of the stages with DropBlock, counted from 1; None: the last two.
    """

    arch_settings = _with_drop_block(ResNet.arch_settings)


@MODELS.register_module()
class DropBlockResNetCIFAR6n(_DropBlockMixin, ResNetCIFAR6n):
    """:class:`ResNetCIFAR6n` with DropBlock; takes the arguments of this class and of :class:`DropBlockResNet`."""

    arch_settings = _with_drop_block(ResNetCIFAR6n.arch_settings)


@HOOKS.register_module()
class DropBlockScheduleHook(Hook):
    """Raises the share that every :class:`DropBlock` drops linearly during training, from 0 to its ``drop_prob``."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Set the progress of all DropBlock layers, from the iteration, so that it is right after a resume too."""
        for module in runner.model.modules():
            if isinstance(module, DropBlock):
                module.progress = runner.iter / runner.max_iters
