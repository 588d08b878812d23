"""FCN at strides 32, 16 and 8 on thin structures: trained in stages, measured on pictures held back, and drawn.

python benchmarks/fcn_strides.py --output benchmarks/fcn_strides.png

The pictures are drawn here: two vessel trees, a bright and a dark one, on clouds and noise. Each stage starts from the
weights of the one before, as in Long et al. 2015. As a control the coarse net is trained on for as many steps as the
finer stages take.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from medseg3d.metrics.confusion import Confusion
from medseg3d.networks.fcn import FCN, parameter_groups

CLASSES = ("background", "bright vessels", "dark vessels")
COLOURS = np.array([(24, 24, 28), (240, 110, 60), (70, 150, 240)], np.uint8)
HELD_BACK = 10_000_000  # seeds from here on are never trained on
MARGIN, TITLE, SHOWN, SCALE = 8, 22, 4, 2


def grow_tree(draw: ImageDraw.ImageDraw, rng: np.random.Generator, at: np.ndarray, angle: float, width: float) -> None:
    """A bent branch, and two thinner ones from its end."""
    for _ in range(int(rng.integers(14, 30))):
        radius = width / 2
        draw.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), fill=1)
        angle += rng.normal(0, 0.09)
        at = at + 1.5 * np.array([np.cos(angle), np.sin(angle)])
    if width > 3:
        spread = rng.uniform(0.3, 0.6)
        grow_tree(draw, rng, at, angle + spread, 0.8 * width)
        grow_tree(draw, rng, at, angle - spread, 0.8 * width)


def picture(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture (size, size) float32 and its labels, uint8, the indices of ``CLASSES``."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, size), np.uint8)
    for label in rng.permutation([1, 2]):
        tree = Image.new("1", (size, size))
        side = rng.uniform(0, 2 * np.pi)
        start = size / 2 - size / 2 * np.array([np.cos(side), np.sin(side)])
        grow_tree(ImageDraw.Draw(tree), rng, start, side + rng.normal(0, 0.3), rng.uniform(7, 10))
        labels[np.asarray(tree)] = label
    clouds = ndimage.gaussian_filter(rng.normal(size=(size, size)), 12)
    grey = 0.4 * clouds / clouds.std() + np.array([0, 1.2, -1.2])[labels]
    grey = ndimage.gaussian_filter(grey, 0.7) + rng.normal(0, 0.35, (size, size))
    return grey.astype(np.float32), labels


def batches(seed: int, size: int, images: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fresh pictures for every step: (B, 1, H, W) and labels (B, H, W)."""
    for step in range(steps):
        pairs = [picture(seed + step * images + i, size) for i in range(images)]
        x, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        yield torch.from_numpy(x)[:, None], torch.from_numpy(labels).long()


def train(network: FCN, arguments: argparse.Namespace, seed: int, steps: int) -> None:
    """Momentum SGD with the rate falling to zero, cross-entropy."""
    network.train()
    optimizer = torch.optim.SGD(parameter_groups(network, arguments.rate), momentum=0.9, weight_decay=5e-4)
    falling = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    for step, (x, labels) in enumerate(batches(seed, arguments.size, arguments.batch, steps)):
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        if step % 50 == 0:
            print(f"  step {step}: {loss.item():.3f}", flush=True)


@torch.no_grad()
def predict(network: nn.Module, x: np.ndarray) -> np.ndarray:
    return network.eval()(torch.from_numpy(x)[None, None])[0].argmax(0).numpy().astype(np.uint8)


def measure(network: nn.Module, arguments: argparse.Namespace) -> Confusion:
    held_back = (picture(HELD_BACK + i, arguments.size) for i in range(arguments.held_back))
    counts = (Confusion.of(predict(network, x), labels, len(CLASSES)) for x, labels in held_back)
    return sum(counts, Confusion.zeros(len(CLASSES)))


def draw(networks: dict[str, FCN], size: int, path: Path) -> None:
    """Rows: pictures held back. Columns: the picture, its labels, what each network makes of it."""
    columns = ["picture", "labels", *networks]
    cell = size * SCALE + MARGIN
    sheet = Image.new("RGB", (len(columns) * cell + MARGIN, SHOWN * cell + MARGIN + TITLE), "white")
    write = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        write.text((MARGIN + column * cell, MARGIN // 2), title, fill="black", font_size=14)
    for row in range(SHOWN):
        x, labels = picture(HELD_BACK + row, size)
        grey = np.clip(128 + 50 * x, 0, 255).astype(np.uint8)
        maps = [labels, *(predict(network, x) for network in networks.values())]
        for column, tile in enumerate([np.stack([grey] * 3, -1), *(COLOURS[labels] for labels in maps)]):
            enlarged = Image.fromarray(tile).resize((size * SCALE, size * SCALE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + column * cell, TITLE + row * cell))
    sheet.save(path, optimize=True)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=3, default=[600, 300, 300], help="of the stages 32, 16 and 8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate at the start of each stage")
    parser.add_argument("--size", type=int, default=128, help="edge of the pictures")
    parser.add_argument("--width", type=float, default=1 / 8, help="of VGG16's widths")
    parser.add_argument("--held-back", type=int, default=100, help="pictures to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-control", action="store_true", help="do not train the coarse net on")
    parser.add_argument("--output", type=Path, help="PNG with the results side by side")
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    network = FCN(1, len(CLASSES), "vgg16_bn", stride=32, padding="same", width=arguments.width)
    networks: dict[str, FCN] = {}
    rows: list[tuple[str, int, FCN]] = []
    first, done = arguments.seed * 1_000_000, 0
    started = time.process_time()
    for stride, steps in zip((32, 16, 8), arguments.steps, strict=True):
        network = network if stride == 32 else network.refined()
        print(f"FCN-{stride}s, {sum(p.numel() for p in network.parameters()):,} parameters", flush=True)
        train(network, arguments, first + done * arguments.batch, steps)
        done += steps
        networks[f"FCN-{stride}s"] = network
        rows.append((f"FCN-{stride}s", done, network))
    if not arguments.no_control:
        control = copy.deepcopy(networks["FCN-32s"])
        print("FCN-32s, trained on", flush=True)
        train(control, arguments, first + arguments.steps[0] * arguments.batch, sum(arguments.steps[1:]))
        rows.append(("FCN-32s, trained on", done, control))
    minutes = (time.process_time() - started) / 60
    print("\n| network | steps | pixel accuracy | mean accuracy | mean IoU | f.w. IoU | IoU of each class |")
    print("|---|---|---|---|---|---|---|")
    for name, steps, trained in rows:
        print(f"| {name} | {steps} | {summary(measure(trained, arguments))} |")
    print(f"\n{minutes:.1f} CPU minutes of training, {os.cpu_count()} cores, torch {torch.__version__}")
    if arguments.output:
        draw(networks, arguments.size, arguments.output)


def summary(confusion: Confusion) -> str:
    means = confusion.accuracy, confusion.mean_accuracy, confusion.mean_iou, confusion.frequency_weighted_iou
    in_percent = [f"{100 * value:.1f}" for value in (*means, *confusion.iou)]
    return " | ".join([*in_percent[: len(means)], ", ".join(in_percent[len(means) :])])


if __name__ == "__main__":
    main()
