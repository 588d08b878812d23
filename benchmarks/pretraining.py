"""What self-supervised pre-training is worth: Swin UNETR from random weights and from those of ``bundles/ct_swin_ssl``,
trained alike on 5, 15 and all completely contoured training cases of OpenKBP; mean Dice on its validation split.

    python benchmarks/pretraining.py DATA_FOLDER --runs RUN_FOLDER > benchmarks/pretraining.md

Data, preprocessing, augmentation and post-processing are those of ``bundles/headneck_ct_unet``. Both runs of a pair
have the same cases, windows, decoder and schedule; they differ in the encoder's first weights alone. A finished run
leaves RUN_FOLDER/NAME.json and is not repeated, so the command goes on where it was stopped. Progress goes to stderr;
stdout is Markdown. bfloat16 autocast, as in the bundles' training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, Dataset
from torch import nn

from medseg3d.checkpoints import load_checkpoint
from medseg3d.data.manifest import datalist, load_manifest
from medseg3d.data.transforms import LabelsOnInputGridd
from medseg3d.inference import SubVolumes
from medseg3d.inference.postprocessing import DropSmallComponentsd
from medseg3d.losses import PartialDiceCELoss
from medseg3d.metrics.overlap import overlaps
from medseg3d.networks import SwinUNETR
from medseg3d.resources import resource_folder
from medseg3d.training import Muon, WarmupCosine, channels_last
from medseg3d.training.autocast import thin_maps_in_float32

MANIFEST = "openkbp_headneck"
PRETRAINED = resource_folder("bundles") / "ct_swin_ssl"
TRAIN = resource_folder("bundles") / "headneck_ct_unet" / "configs" / "train.json"
STARTS = ("random", "pre-trained")
NORM = 12.0  # the gradient's L2 norm is clipped to this
ORGAN_SHARE = 0.02  # as in train.json: a short training would else find nothing but background


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    parser = ConfigParser()
    parser.read_config(str(TRAIN))
    parser.update({"dataset_dir": str(arguments.data), "bundle_root": str(TRAIN.parent.parent)})
    complete = datalist(MANIFEST, arguments.data, "train", complete=True)
    sizes = [min(size, len(complete)) for size in arguments.cases]
    cache: dict[str, Dataset] = {}
    for size in sizes:
        for start in STARTS:
            file = arguments.runs / f"{start}_{size}_cases_{arguments.steps}_steps_seed_{arguments.seed}.json"
            if file.is_file():
                continue
            if not cache:
                cache = {"train": training_set(parser, complete[: max(sizes)]), "validation": validation_set(parser)}
            result = run(cache, size, start, arguments)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1))
    print(report(sorted(arguments.runs.glob(f"*_{arguments.steps}_steps_seed_{arguments.seed}.json")), arguments))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that the manifest's paths start from")
    parser.add_argument("--runs", type=Path, required=True, help="folder of finished runs")
    parser.add_argument("--cases", type=int, nargs="+", default=[5, 15, 30])
    parser.add_argument("--steps", type=int, default=200, help="of one window each")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def training_set(parser: ConfigParser, cases: Sequence[dict[str, Any]]) -> CacheDataset:
    transform = parser.get_parsed_content("train::preprocessing")
    return CacheDataset(cases, transform, num_workers=1, progress=False)


def validation_set(parser: ConfigParser) -> CacheDataset:
    return CacheDataset(
        datalist(MANIFEST, parser["dataset_dir"], "validation"),
        parser.get_parsed_content("validate::preprocessing"),
        num_workers=1,
        progress=False,
    )


def network_of(start: str, seed: int) -> nn.Module:
    """With the same decoder from either start."""
    config = json.loads((PRETRAINED / "configs" / "train.json").read_text())["network_def"]
    torch.manual_seed(seed)
    network = SwinUNETR(
        in_channels=1,
        out_channels=len(load_manifest(MANIFEST)["labels"]),
        feature_size=config["feature_size"],
        window_size=config["window_size"],
    )
    if start == "pre-trained":
        load_checkpoint(network, PRETRAINED / "models" / "model.pt")
    return channels_last(network)


def run(data: dict[str, Dataset], size: int, start: str, arguments: argparse.Namespace) -> dict[str, Any]:
    network = network_of(start, arguments.seed)
    began = time.process_time()
    losses = train(network, data["train"], size, arguments, name=f"{start}, {size} cases")
    seconds = time.process_time() - began
    dice = validate(network, data["validation"])
    print(f"{start}, {size} cases: mean Dice {mean_dice(dice):.3f}", file=sys.stderr)
    return {"start": start, "cases": size, "cpu_seconds": seconds, "losses": losses, "dice": dice}


def train(
    network: nn.Module, dataset: CacheDataset, size: int, arguments: argparse.Namespace, name: str
) -> list[float]:
    """Muon with a warm-up of a tenth and a cosine; the loss of every step."""
    optimizer = Muon(network, arguments.rate)
    schedule = WarmupCosine(optimizer, arguments.steps, warmup=0.1)
    loss_function = PartialDiceCELoss(organ_share=ORGAN_SHARE)
    losses = []
    network.train()
    for step, window in enumerate(windows(dataset, size, arguments.steps, arguments.seed)):
        image = window["image"].unsqueeze(0).contiguous(memory_format=torch.channels_last_3d)
        optimizer.zero_grad()
        with thin_maps_in_float32(network):
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(image)
            loss = loss_function(logits.float(), window["label"].unsqueeze(0))
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), NORM, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"{name}: step {step + 1}, loss {np.mean(losses[-10:]):.3f}", file=sys.stderr)
    return losses


def windows(dataset: CacheDataset, size: int, steps: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Augmented windows of the first ``size`` cases, the same ones for the same seed."""
    dataset.transform.set_random_state(seed)
    order = np.random.default_rng(seed)
    turns = math.ceil(steps / size)
    for index in np.concatenate([order.permutation(size) for _ in range(turns)])[:steps]:
        window = dataset[int(index)]
        window = window[0] if isinstance(window, list) else window
        yield {key: torch.as_tensor(window[key]).clone() for key in ("image", "label")}


@torch.no_grad()
def validate(network: nn.Module, dataset: Dataset) -> list[dict[str, float]]:
    """Dice of each contoured organ in each case, by name, in the scan's own grid."""
    labels = {int(number): name for number, name in load_manifest(MANIFEST)["labels"].items() if number != "0"}
    strategy = SubVolumes((64, 64, 64), overlap=0.25, padding_value=-3.4666667)
    back, clean = LabelsOnInputGridd("pred"), DropSmallComponentsd("pred", min_share=0.5)
    network.eval()
    rows = []
    for case in dataset:
        case = {"image": case["image"], "label": case["label"], "annotated": case["annotated"]}
        case["pred"] = strategy(torch.as_tensor(case["image"]).as_subclass(torch.Tensor)[None], network)[0]
        predicted = clean(back(case))["pred"][0].numpy().astype(np.uint8)
        reference = case["label"][0].numpy().astype(np.uint8)
        contoured = [number for number in labels if case["annotated"][number]]
        found = overlaps(predicted, reference, contoured)
        rows.append({labels[number]: found[number].dice for number in contoured if found[number].reference})
    return rows


def mean_dice(rows: Sequence[dict[str, float]], organ: str | None = None) -> float:
    """Mean over the cases of one organ, or of these means over all organs."""
    if organ is not None:
        return float(np.mean([row[organ] for row in rows if organ in row]))
    return float(np.mean([mean_dice(rows, name) for name in organs_of(rows)]))


def organs_of(rows: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def report(files: Sequence[Path], arguments: argparse.Namespace) -> str:
    results = sorted(
        (json.loads(file.read_text()) for file in files), key=lambda r: (r["cases"], STARTS.index(r["start"]))
    )
    if not results:
        return "no finished run"
    organs = organs_of(results[0]["dice"])
    lines = [
        "# What self-supervised pre-training is worth",
        "",
        f"`python benchmarks/pretraining.py DATA_FOLDER --runs RUN_FOLDER --steps {arguments.steps}`",
        "",
        f"Swin UNETR (feature size 12) on OpenKBP, {arguments.steps} steps of one window, one seed; Dice on the "
        f"{len(results[0]['dice'])} validation cases in their own grid.",
        "",
        "| training cases | encoder starts from | loss of the last tenth | mean Dice | " + " | ".join(organs) + " |",
        "|---" * (4 + len(organs)) + "|",
    ]
    for result in results:
        tail = result["losses"][-max(1, len(result["losses"]) // 10) :]
        each = " | ".join(f"{mean_dice(result['dice'], organ):.3f}" for organ in organs)
        mean = mean_dice(result["dice"])
        lines.append(f"| {result['cases']} | {result['start']} | {np.mean(tail):.3f} | **{mean:.3f}** | {each} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
