"""CIFAR ResNets (6n+2 layers) with parameter-free shortcuts, the networks of the CIFAR-10 benchmarks.

Source: K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, 2016, section 4.2, shortcut option A.
The state-dict keys (conv1, bn1, layer1.0.conv1 …, linear) are those of the public CIFAR-10 checkpoints, so that these load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64)

# Library networks of further kinds, beside those of the peer's list (`python -m benchmarks.graph more`).
MORE = (
    "timm:halonet26t timm:lambda_resnet26t timm:coatnet_pico_rw_224 timm:davit_tiny timm:gcresnet33ts timm:inception_v4 "
    "timm:inception_resnet_v2 timm:nextvit_small timm:twins_svt_small timm:volo_d1_224 timm:tresnet_m timm:legacy_seresnext26_32x4d "
    "timm:dla60_res2next timm:xcit_nano_12_p16_224 timm:mixer_s32_224 timm:resmlp_12_224 timm:focalnet_tiny_srf timm:mvitv2_tiny "
    "timm:resnetv2_50x1_bit timm:nf_resnet50 keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn fcos_resnet50_fpn ssd300_vgg16 r3d_18 "
    "s3d mvit_v2_s swin_v2_t shufflenet_v2_x0_5 timm:pnasnet5large timm:nasnetalarge timm:repghostnet_050 timm:repvit_m0_9 "
    "timm:resnest26d timm:selecsls60 timm:starnet_s2 timm:xception65 timm:mobileone_s2 timm:fastvit_sa12 timm:efficientformerv2_s1 "
    "timm:ese_vovnet39b timm:hrnet_w18_small_v2 timm:botnet26t_256 timm:eca_halonext26ts timm:bat_resnext26ts timm:visformer_tiny "
    "timm:convit_tiny timm:pit_xs_224 timm:coat_lite_tiny timm:rdnet_tiny timm:mambaout_femto timm:sequencer2d_s timm:nest_tiny "
    "timm:gcvit_xxtiny timm:crossvit_tiny_240 timm:hiera_tiny_224 timm:ghostnetv3_100 timm:shvit_s1 timm:convmixer_768_32 "
    "timm:gmlp_s16_224 timm:efficientnet_cc_b0_4e timm:efficientvit_b1 timm:dm_nfnet_f0 timm:skresnext50_32x4d timm:regnety_008 "
    "timm:edgenext_xx_small timm:swinv2_cr_tiny_224 timm:tnt_s_legacy_patch16_224 timm:lamhalobotnet50ts_256 "
).split()


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the width doubles, the shortcut takes every second pixel and pads with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2  # zero channels on either side of the shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        shortcut = x
        if self.padding:
            shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + shortcut)


class ResNet(nn.Module):
    """Three stages of `blocks` blocks at 16, 32 and 64 channels, for 32x32 images."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(WIDTHS[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) -> logits (n, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


def resnet(depth: int) -> ResNet:
    """The CIFAR ResNet of `depth` layers; raises ValueError unless depth = 6n + 2 with n >= 1."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (20, 32, 44, 56, 110 …), got {depth}.")
    return ResNet(blocks)


def resnet20() -> ResNet:
    """The 20-layer network, 0.27 M parameters."""
    return resnet(20)


def resnet56() -> ResNet:
    """The 56-layer network, 0.85 M parameters."""
    return resnet(56)


def _stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut, which is projected where the sizes differ."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        project = stride > 1 or inputs != outputs
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, 4 * width, h / stride, w / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(functional.relu(self.bn2(self.conv2(y)))))
        return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def resnet50() -> nn.Module:
    """ResNet-50 for 224x224 images as a user would write it, where no library is to be imported. Source: as above, table 1."""
    blocks, inputs = [], 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            blocks.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    stem = (nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
