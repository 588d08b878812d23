"""UPSNet and FCN trained from nothing on 16 microscope pictures, measured on the 7 test pictures, and drawn.

python benchmarks/panoptic_nuclei.py DSB2018_FOLDER --output benchmarks/panoptic_nuclei.png

The pictures are those of ``data_manifests/dsb2018_nuclei.json``. What lies between the nuclei is stuff: dark ground in
fluorescence, tissue where the picture is stained (``PanopticTargetsd``). UPSNet learns nuclei, ground and tissue as a
panoptic map, FCN the three classes, in the stages 32, 16 and 8.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.engines import SupervisedTrainer
from monai.utils import set_determinism
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from torch.utils.data import WeightedRandomSampler

from medseg3d.data.colours import even_weights
from medseg3d.data.manifest import datalist
from medseg3d.data.pictures import UNKNOWN, LoadPictured, PanopticTargetsd, StretchContrastd
from medseg3d.data.results import as_result
from medseg3d.metrics import Confusion, PanopticQuality
from medseg3d.metrics.panoptic import Quality
from medseg3d.networks import FCN, UPSNet
from medseg3d.networks.backbones.fpn import resnet_fpn_backbone
from medseg3d.networks.fcn import parameter_groups
from medseg3d.tasks import Categories, Category, Panoptic, semantic_from_panoptic
from medseg3d.training import DetectionIteration, SegmentationIteration

STUFF = ("dark ground", "tissue")
NAMES = (*STUFF, "nucleus")
CATEGORIES: Categories = {number: Category(name, name not in STUFF) for number, name in enumerate(NAMES)}
COLOURS = np.array([(24, 24, 70), (200, 165, 205), (250, 190, 40)], np.uint8)
SCALE = 2  # of what FCN is shown: the smallest nuclei are 5 pixels wide, and its finest scores have a stride of 8
MARGIN, TITLE, TILE = 8, 22, 256
Case = dict[str, Any]


def upsnet() -> UPSNet:
    """ResNet-18 with group norm, a pyramid of 64 channels, narrow heads."""
    backbone = resnet_fpn_backbone("resnet18", lambda c: nn.GroupNorm(16, c), 5, out_channels=64, global_pool=True)
    return UPSNet(
        len(STUFF),
        1,
        backbone,
        semantic_channels=(64, 64),
        semantic_weight=1.0,
        panoptic_weight=0.5,
        least_stuff=0,
        scale=1.0,
        anchor_sizes=((8,), (16,), (32,), (64,), (128,)),
        box_features=128,
        mask_channels=64,
        box_batch_size_per_image=128,
        box_detections_per_img=400,
    )


class Magnified(nn.Module):
    """A network that is shown pictures ``SCALE`` times as large; its logits have the pictures' own size."""

    def __init__(self, network: FCN) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        larger = F.interpolate(x, scale_factor=SCALE, mode="bilinear", align_corners=False)
        return F.interpolate(self.network(larger), size=x.shape[2:], mode="bilinear", align_corners=False)


def loading() -> list[Callable]:
    both = ["image", "label"]
    return [LoadPictured(both, "label"), StretchContrastd("image"), mt.EnsureTyped(both, track_meta=False)]


def batches(folder: Path, crop: int, images: int, steps: int, maps_only: bool) -> DataLoader:
    """Random crops, scaled, turned and with another contrast; stained pictures as often as the others.

    ``maps_only`` leaves "image" and "label", the semantic classes (B, 1, H, W); else batches are lists, for detectors.
    """
    both = ["image", "label"]
    random = [
        mt.RandSpatialCropd(both, (2 * crop, 2 * crop), random_size=False),
        mt.RandZoomd(both, prob=1.0, min_zoom=0.65, max_zoom=1.5, mode=["bilinear", "nearest"], keep_size=False),
        mt.RandSpatialCropd(both, (crop, crop), random_size=False),
        mt.RandFlipd(both, 0.5, 0),
        mt.RandRotate90d(both, 0.75),
        mt.RandAdjustContrastd("image", 0.5, gamma=(0.6, 1.6)),
        mt.RandGaussianNoised("image", 0.3, std=0.05),
        PanopticTargetsd("label", least=12),
    ]
    last = [lambda data: {"image": data["image"], "label": data["semantic"][None]}] if maps_only else []
    data = datalist("dsb2018_nuclei", folder, "train")
    dataset = CacheDataset(data, mt.Compose([*loading(), *random, *last]), progress=False)
    stained = [int(bool((case["image"][0] != case["image"][1]).any())) for case in dataset._cache]
    sampler = WeightedRandomSampler(even_weights(stained), images * steps)
    collate = list_data_collate if maps_only else list
    return DataLoader(dataset, batch_size=images, sampler=sampler, collate_fn=collate)


def train(
    network: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, iteration: Callable, loss: Callable
) -> None:
    """One pass through ``loader``, the rate falling to zero."""
    falling = torch.optim.lr_scheduler.PolynomialLR(optimizer, len(loader), power=0.9)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        iteration_update=iteration,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: falling.step())
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=50), tell)
    trainer.run()


def tell(trainer: SupervisedTrainer) -> None:
    losses = {name: value.item() for name, value in trainer.state.output.items() if name.startswith("loss")}
    text = ", ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
    print(f"  step {trainer.state.iteration}: {text}", flush=True)


def cross_entropy(logits_BKHW: torch.Tensor, classes_B1HW: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BKHW.float(), classes_B1HW[:, 0].long(), ignore_index=UNKNOWN)


def trained_upsnet(arguments: argparse.Namespace) -> UPSNet:
    set_determinism(arguments.seed)
    network = upsnet()
    print(f"UPSNet, {parameters(network)}", flush=True)
    optimizer = torch.optim.AdamW(network.parameters(), arguments.rate, weight_decay=1e-4)
    loader = batches(arguments.data, arguments.crop, arguments.batch, arguments.steps, maps_only=False)
    step = DetectionIteration(("boxes", "labels", "masks", "semantic"))
    train(network, loader, optimizer, step, sum)  # the step adds up the losses itself
    return network.eval()


def trained_fcn(arguments: argparse.Namespace) -> Magnified:
    set_determinism(arguments.seed)
    network = FCN(3, len(NAMES), "vgg16_bn", stride=32, padding="same", width=1 / 8)
    for stride, steps in zip((32, 16, 8), arguments.fcn_steps, strict=True):
        network = network if stride == 32 else network.refined()
        print(f"FCN-{stride}s, {parameters(network)}", flush=True)
        optimizer = torch.optim.SGD(parameter_groups(network, 0.05), momentum=0.9, weight_decay=5e-4)
        loader = batches(arguments.data, arguments.fcn_crop, arguments.fcn_batch, steps, maps_only=True)
        train(Magnified(network), loader, optimizer, SegmentationIteration(), cross_entropy)
    return Magnified(network).eval()


def parameters(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()):,} parameters"


def test_cases(folder: Path) -> list[Case]:
    """The test pictures with "semantic", the classes, and "panoptic", the reference."""
    prepare = mt.Compose([*loading(), PanopticTargetsd("label")])
    cases = [prepare(case) for case in datalist("dsb2018_nuclei", folder, "test")]
    for case in cases:
        case["panoptic"] = as_result(torch.stack([case["semantic"], case["label"][0]]), "panoptic", CATEGORIES)
    return cases


@torch.no_grad()
def found_by(network: UPSNet, case: Case) -> tuple[Panoptic, np.ndarray]:
    """The panoptic map, and the classes of the semantic head alone."""
    (found,) = network([case["image"]])
    panoptic = as_result(found, "panoptic", CATEGORIES)
    assert isinstance(panoptic, Panoptic)
    return panoptic, found["semantic"].numpy()


@torch.no_grad()
def classes_by(network: nn.Module, case: Case) -> np.ndarray:
    return network(case["image"][None])[0].argmax(0).numpy()


def panoptic_table(found: list[Panoptic], cases: list[Case]) -> str:
    each = (PanopticQuality.of(panoptic, case["panoptic"]) for panoptic, case in zip(found, cases, strict=True))
    quality = sum(each, PanopticQuality())
    rows = {CATEGORIES[number].name: found for number, found in quality.per_category.items()}
    head = ["| | PQ | SQ | RQ | found | false alarms | missed |", "|---|---|---|---|---|---|---|"]
    counts = {CATEGORIES[number].name: f"{c.tp} | {c.fp} | {c.fn}" for number, c in quality.counts.items()}
    lines = [f"| {name} | {digits(found)} | {counts[name]} |" for name, found in rows.items()]
    return "\n".join([*head, *lines, f"| **mean** | {digits(quality.all)} | | | |"])


def digits(quality: Quality) -> str:
    return " | ".join(f"{100 * value:.1f}" for value in (quality.pq, quality.sq, quality.rq))


def semantic_row(name: str, maps: list[np.ndarray], cases: list[Case]) -> str:
    counts = [Confusion.of(m, case["semantic"].numpy(), len(NAMES)) for m, case in zip(maps, cases, strict=True)]
    total = sum(counts, Confusion.zeros(len(NAMES)))
    values = [total.accuracy, total.mean_iou, *total.iou]
    return f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |"


def tile(image_CHW: torch.Tensor, classes: np.ndarray | None = None, ids: np.ndarray | None = None) -> Image.Image:
    """The picture, or its classes; ``ids`` part touching objects by a dark line, and black is void."""
    rows, columns = (slice(0, TILE),) * 2
    pixels = (255 * image_CHW[:, rows, columns].numpy()).astype(np.uint8).transpose(1, 2, 0)
    if classes is not None:
        known = classes[rows, columns]
        pixels = np.where((known < len(NAMES))[..., None], COLOURS[known.clip(0, len(NAMES) - 1)], 0).astype(np.uint8)
        if ids is not None:
            inner = ids[rows, columns]
            pixels[ndimage.grey_dilation(inner, (2, 2)) != inner] //= 3
    return Image.fromarray(pixels)


def draw(columns: dict[str, list[Image.Image]], path: Path) -> None:
    """A row for each picture, the upper left 256 x 256 pixels of it."""
    cell, rows = TILE + MARGIN, len(columns["picture"])
    sheet = Image.new("RGB", (len(columns) * cell + MARGIN, rows * cell + MARGIN + TITLE), "white")
    write = ImageDraw.Draw(sheet)
    for column, (title, tiles) in enumerate(columns.items()):
        write.text((MARGIN + column * cell, MARGIN // 2), title, fill="black", font_size=14)
        for row, drawn in enumerate(tiles):
            sheet.paste(drawn, (MARGIN + column * cell, TITLE + row * cell))
    sheet.save(path, optimize=True)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the pictures that the manifest names")
    parser.add_argument("--steps", type=int, default=600, help="of UPSNet")
    parser.add_argument("--fcn-steps", type=int, nargs=3, default=[200, 100, 100], help="of the stages 32, 16 and 8")
    parser.add_argument("--batch", type=int, default=1, help="crops in a step of UPSNet")
    parser.add_argument("--fcn-batch", type=int, default=8, help="of FCN: batch norm needs both kinds of pictures")
    parser.add_argument("--crop", type=int, default=160, help="edge of UPSNet's crops")
    parser.add_argument("--fcn-crop", type=int, default=128, help="of FCN's")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of UPSNet at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="PNG with the results side by side")
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    torch.set_num_threads(arguments.threads)
    seconds = {}
    started = time.process_time()
    panoptic_network = trained_upsnet(arguments)
    seconds["UPSNet"] = time.process_time() - started
    semantic_network = trained_fcn(arguments)
    seconds["FCN"] = time.process_time() - started - seconds["UPSNet"]

    cases = test_cases(arguments.data)
    found = [found_by(panoptic_network, case) for case in cases]
    maps = [classes_by(semantic_network, case) for case in cases]
    print(f"\nUPSNet, in percent:\n\n{panoptic_table([panoptic for panoptic, _ in found], cases)}")
    print(f"\n| | pixel accuracy | mean IoU | IoU of {' | '.join(NAMES)} |\n|---|---|---|---|---|---|")
    print(semantic_row("UPSNet's semantic head", [semantic for _, semantic in found], cases))
    print(semantic_row("FCN-8s", maps, cases))
    spent = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    print(f"\nCPU minutes of training: {spent}; {os.cpu_count()} cores, torch {torch.__version__}")
    if arguments.output:
        draw(sheet_columns(cases, [panoptic for panoptic, _ in found], maps), arguments.output)


def sheet_columns(cases: list[Case], found: list[Panoptic], maps: list[np.ndarray]) -> dict[str, list[Image.Image]]:
    images = [case["image"] for case in cases]
    return {
        "picture": [tile(image) for image in images],
        "reference": [panoptic_tile(case["image"], case["panoptic"]) for case in cases],
        "UPSNet": [panoptic_tile(image, panoptic) for image, panoptic in zip(images, found, strict=True)],
        "FCN-8s": [tile(image, classes) for image, classes in zip(images, maps, strict=True)],
    }


def panoptic_tile(image_CHW: torch.Tensor, panoptic: Panoptic) -> Image.Image:
    return tile(image_CHW, semantic_from_panoptic(panoptic, void=UNKNOWN).classes, panoptic.ids)


if __name__ == "__main__":
    main()
