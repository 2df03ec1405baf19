"""Networks for the surgery tests: the library's own in small, and torchvision's MobileNetV2, DenseNet and GoogLeNet."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten import models
from hasten.surgery import Channels


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6())


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project; added to its input where shapes agree."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = c_in * expand
        layers: list[nn.Module] = [conv_bn(c_in, wide, 1)] if expand != 1 else []
        layers += [
            conv_bn(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        ]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        rows = [(1, 2, 1, 1), (6, 3, 2, 2), (6, 4, 3, 2), (6, 8, 2, 1)]
        layers: list[nn.Module] = [conv_bn(3, 4 * width // 2, 3, 1)]
        c_in = 4 * width // 2
        for expand, c, n, stride in rows:
            for i in range(n):
                layers.append(InvertedResidual(c_in, c * width // 2, stride if i == 0 else 1, expand))
                c_in = c * width // 2
        layers.append(conv_bn(c_in, 16 * width // 2, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(16 * width // 2, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class DenseBlockLayer(nn.Module):
    """DenseNet-121's layer: bottleneck 1x1, then 3x3; its inputs come as a list."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(4 * growth),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseNetBC(nn.Module):
    def __init__(self, growth: int = 8, depths: tuple[int, ...] = (3, 4)) -> None:
        super().__init__()
        c = 2 * growth
        self.stem = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(depths):
            self.blocks.append(nn.ModuleList(DenseBlockLayer(c + j * growth, growth) for j in range(depth)))
            c += depth * growth
            if i + 1 < len(depths):
                self.transitions.append(
                    nn.Sequential(
                        nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c // 2, 1, bias=False), nn.AvgPool2d(2)
                    )
                )
                c //= 2
        self.norm = nn.BatchNorm2d(c)
        self.classifier = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = torch.cat(features, 1)
            if i < len(self.transitions):
                x = self.transitions[i](x)
        x = F.relu(self.norm(x)).mean((2, 3))
        return self.classifier(x)


class Inception(nn.Module):
    def __init__(self, c_in: int, a: int, b: tuple[int, int], c: tuple[int, int], d: int) -> None:
        super().__init__()
        self.branch1 = conv_bn(c_in, a, 1)
        self.branch2 = nn.Sequential(conv_bn(c_in, b[0], 1), conv_bn(b[0], b[1], 3))
        self.branch3 = nn.Sequential(conv_bn(c_in, c[0], 1), conv_bn(c[0], c[1], 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(c_in, d, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.inception3a = Inception(16, 8, (8, 12), (4, 8), 8)
        self.pool = nn.MaxPool2d(2)
        self.inception3b = Inception(36, 12, (8, 16), (4, 12), 8)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inception3b(self.pool(self.inception3a(self.stem(x))))
        return self.fc(x.mean([2, 3]))


class Flat(nn.Module):
    """A convolution whose map is flattened into a linear layer, with a hidden linear layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 10, 3, padding=1, stride=2)
        self.fc1, self.fc2 = nn.Linear(10 * 8 * 8, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 1)
        x = F.relu(self.conv2(x)).view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))


class Gated(nn.Module):
    """Squeeze-and-excite, a per-channel scale held as a loose parameter, PReLU and a shared convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.PReLU(16)
        self.down, self.up = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 16).view(1, 16, 1, 1))
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        x = x * gate * self.scale
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: models.build("resnet8", seed=0),
    "resnet18": lambda: models.build("resnet18", seed=0),
    "wrn-16-4": lambda: models.build("wrn-16-4", seed=0),
    "densenet40": lambda: models.build("densenet40", seed=0),
    "mobilenet-v1": lambda: models.build("mobilenet-v1", seed=0),
    "lenet": lambda: models.build("lenet", seed=0),
    "alexnet": lambda: models.build("alexnet", seed=0),
    "mobilenet-v2": MobileNetV2,
    "densenet-bc": DenseNetBC,
    "googlenet": GoogLeNet,
    "flat": Flat,
    "gated": Gated,
}


def net(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network with batch norm statistics and affine parameters that are not those of initialisation."""
    torch.manual_seed(0)
    made = NETS[name]().to(dtype)
    g = torch.Generator().manual_seed(1)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=g))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=g))
            with torch.no_grad():
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=g))
                module.bias.copy_(0.2 * torch.randn(module.num_features, generator=g))
    return made


def images(n: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def silence(model: nn.Module, channels: Channels, layer: str, which: list[int]) -> dict[str, Tensor]:
    """Zero what every reader has for these channels, so that removing them changes nothing; return the masks of those."""
    gone = set(channels.outputs(layer)[which].tolist())
    masks: dict[str, Tensor] = {}
    for slot in channels.slots.values():
        module = model.get_submodule(slot.module) if not slot.role.startswith("axis") else None
        reads = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if slot.role != "in" or not reads:
            continue
        at = [i for i, c in enumerate(channels.classes[slot.labels].tolist()) if c in gone]
        if at:
            mask = torch.ones_like(module.weight)
            mask[:, at] = 0
            with torch.no_grad():
                module.weight.mul_(mask)
            masks[f"{slot.module}.weight"] = mask
    return masks


def removable(model: nn.Module, channels: Channels) -> list[str]:
    """Return the layers whose outputs can be removed."""
    found = []
    for name, role in channels.slots:
        module = model.get_submodule(name) if role == "out" else None
        if isinstance(module, nn.Conv2d | nn.Linear) and channels.why_not(name) is None:
            found.append(name)
    return found


def masked_steps_of(model: nn.Module, optimizer: Optimizer, masks: dict[str, Tensor], steps: int) -> None:
    """Train with the gradients of ``masks`` masked, by parameter name."""
    parameters = dict(model.named_parameters())
    for step in range(steps):
        x, y = images(4, seed=10 + step), torch.arange(4)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, mask in masks.items():
            parameters[name].grad.mul_(mask)
        optimizer.step()
