"""Samples a second in training: the shipped pipeline against MONAI's stock one, same network, data and windows.

    python benchmarks/training.py DATASET_DIR [--cases 4] [--rounds 5] [--threads 1] [--device cpu]

Stock is what MONAI's tutorials do: LoadImaged, Orientationd, Spacingd, ScaleIntensityRanged, CropForegroundd and
ClassesToIndicesd into a CacheDataset, then RandCropByLabelClassesd, RandAffined and the other random transforms of
train.json, a DataLoader without workers, DiceCELoss and the step of SupervisedTrainer: in float32, which is its
default, and with amp. Ours is train.json. Both train ``medseg3d.networks.UNet``; stock also MONAI's BasicUNet of the
same widths. All take turns, two batches each; ratios are medians of those within a round, of CPU seconds on a CPU.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from measuring import describe_machine, median_ratio, restart_with, take_turns
from monai.bundle import ConfigParser
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    CropForegroundd,
    DeleteItemsd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandAffined,
    RandCropByLabelClassesd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)
from monai.utils import set_determinism

from medseg3d.resources import resource_folder
from medseg3d.training import SegmentationIteration

BOTH = ["image", "label"]
BATCHES = 2  # a turn


def shipped(dataset_dir: str, cases: int, device: torch.device) -> ConfigParser:
    """The train.json of the shipped bundle."""
    folder = resource_folder("bundles") / "headneck_ct_unet"
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "train.json"))
    parser.update(
        {"bundle_root": str(folder), "dataset_dir": dataset_dir, "cases": cases, "cache_dir": None, "device": device}
    )
    return parser


def stock_dataset(parser: ConfigParser) -> CacheDataset:
    """MONAI's transforms in the place of ours; the rest of train.json's random ones stay."""
    window = parser.get_parsed_content("patch_size")
    crop = [voxels + 16 for voxels in window]  # room for the turns of RandAffined
    scale = parser.get_parsed_content("scale_intensity")
    fixed = [
        LoadImaged(BOTH),
        EnsureChannelFirstd(BOTH),
        Orientationd(BOTH, "RAS", labels=None),
        CropForegroundd(BOTH, source_key="image", select_fn=lambda image: image > -500, margin=5),
        Spacingd(BOTH, parser.get_parsed_content("to_grid::spacing"), mode=("bilinear", "nearest")),
        ScaleIntensityRanged("image", -1000, 1200, scale.scaler.b_min, scale.scaler.b_max, clip=True),
        SpatialPadd(BOTH, crop),
        ClassesToIndicesd("label", num_classes=8, max_samples_per_class=4000),
    ]
    random = [
        RandCropByLabelClassesd(
            BOTH, "label", crop, [1, 1, 2, 1, 1, 4, 2, 1], 8, 1, indices_key="label_cls_indices", warn=False
        ),
        DeleteItemsd("label_cls_indices"),
        RandAffined(
            BOTH,
            prob=1.0,
            spatial_size=window,
            rotate_range=(0.15, 0.15, 0.3),
            scale_range=(0.18, 0.18, 0.18),
            translate_range=(4, 4, 4),
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        *parser.get_parsed_content("train::random_transforms")[1:],
    ]
    return CacheDataset(parser.get_parsed_content("train::dataset::data"), Compose([*fixed, *random]), progress=False)


def batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def stock_step(network: torch.nn.Module, device: torch.device, amp: bool) -> Callable[[dict[str, Any]], None]:
    """The iteration of MONAI's SupervisedTrainer."""
    network, loss = network.to(device), DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)

    def step(batch: dict[str, Any]) -> None:
        image, label = (batch[key].to(device) for key in BOTH)
        network.train()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            value = loss(network(image), label)
        value.backward()
        optimizer.step()
        value.item()

    return step


def our_step(parser: ConfigParser) -> Callable[[dict[str, Any]], None]:
    network = parser.get_parsed_content("network")
    engine = SimpleNamespace(
        state=SimpleNamespace(device=parser.get_parsed_content("device"), iteration=1),
        network=network,
        optimizer=parser.get_parsed_content("optimizer"),
        inferer=lambda image, network: network(image),
        loss_function=parser.get_parsed_content("loss"),
    )
    step = SegmentationIteration("annotated")
    return lambda batch: step(engine, batch)


def basic_unet() -> BasicUNet:
    return BasicUNet(3, 1, 8, features=(16, 32, 64, 128, 192, 16), norm=("group", {"num_groups": 8}), bias=False)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("dataset_dir")
    options.add_argument("--cases", type=int, default=4)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", default="cpu", type=torch.device)
    args = options.parse_args()
    if args.device.type == "cpu":
        restart_with("default", args.threads)
    warnings.filterwarnings("ignore")
    set_determinism(0)
    parser = shipped(args.dataset_dir, args.cases, args.device)
    datasets = {"stock": stock_dataset(parser), "ours": parser.get_parsed_content("train::dataset")}
    size = parser.get_parsed_content("batch_size")
    feeds = {name: batches(DataLoader(data, batch_size=size, shuffle=True)) for name, data in datasets.items()}
    plain = parser.get_parsed_content("network_def")  # before train.json makes it channels-last
    steps = {
        "MONAI, float32": stock_step(deepcopy(plain), args.device, amp=False),
        "MONAI, amp": stock_step(deepcopy(plain), args.device, amp=True),
        "MONAI with BasicUNet, float32": stock_step(basic_unet(), args.device, amp=False),
        "MONAI with BasicUNet, amp": stock_step(basic_unet(), args.device, amp=True),
        "medseg3d": our_step(parser),
    }

    def whole(name: str, step: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        feed = feeds["stock" if name.startswith("MONAI") else "ours"]
        return lambda: [step(next(feed)) for _ in range(BATCHES)] and None

    runs: dict[str, Callable[[], Any]] = {name: whole(name, step) for name, step in steps.items()}
    runs |= {
        f"transforms, {name}": (lambda feed=feed: [next(feed) for _ in range(BATCHES)]) for name, feed in feeds.items()
    }
    for run in runs.values():
        run()
    clock = time.process_time if args.device.type == "cpu" else time.perf_counter
    seconds = take_turns(runs, args.rounds, args.device, clock=clock)
    print(describe_machine(args.device, "default"))
    print(
        f"\n| | {'CPU ' if args.device.type == 'cpu' else ''}s a batch of {size} | samples/s | medseg3d is faster by |"
    )
    print("|---|---|---|---|")
    for name, times in seconds.items():
        each = median(times) / BATCHES
        ours = seconds["transforms, ours" if name.startswith("transforms") else "medseg3d"]
        print(f"| {name} | {each:.3f} | {size / each:.2f} | {median_ratio(times, ours):.2f} |")


if __name__ == "__main__":
    main()
