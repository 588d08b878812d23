"""A whole CT of 25 classes, .nii.gz in and .nii.gz out: nnU-Net v2's predictor against medseg3d's parts.

    pip install nnunetv2
    python benchmarks/whole_scan_nnunet.py [--shape 512 512 300] [--spacing 1.5] [--threads 2] [--folder KEPT]

Both sides run one plain nnU-Net, trained as in whole_scan.py, without mirroring, at a step of half a window, and take
images and logits from grid to grid by the trilinear interpolation of nnU-Net's resample_torch_fornnunet, the faster of
its two. nnU-Net predicts and exports in one process here, so that it need not hand logits from process to process and
its peak memory is all of it. Labels are compared before times and memory are printed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import in_child
from torch import nn
from torch.nn import functional as F
from whole_scan import (
    CLASSES,
    HU,
    Taken,
    argument_parser,
    print_agreement,
    print_times,
    process,
    train,
    working_folder,
    write_scan,
)

WIDTHS = (16, 32, 64, 128, 160)
WINDOW = (96, 96, 96)
NNUNET, OURS = "nnU-Net v2", "medseg3d"


def architecture() -> dict[str, Any]:
    """As nnU-Net's planner writes it for a PlainConvUNet, with half its usual widths."""
    levels = len(WIDTHS)
    arguments = {
        "n_stages": levels,
        "features_per_stage": list(WIDTHS),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * levels,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (levels - 1),
        "n_conv_per_stage": [2] * levels,
        "n_conv_per_stage_decoder": [2] * (levels - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(spacing: float) -> dict[str, Any]:
    options = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}
    resampling = {
        f"resampling_fn_{what}{end}": value
        for what in ("data", "seg", "probabilities")
        for end, value in (("", "resample_torch_fornnunet"), ("_kwargs", {**options, "is_seg": what == "seg"}))
    }
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(WINDOW),
        "spacing": [spacing] * 3,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture(),
        **resampling,
    }
    seen = {"mean": HU[0], "std": HU[1] - HU[0], "percentile_00_5": HU[0], "percentile_99_5": HU[1]}
    return {
        "dataset_name": "Dataset001_Phantom",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": seen},
        "configurations": {"3d_fullres": full},
    }


def network() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    own = architecture()["arch_kwargs"]
    modules = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    return PlainConvUNet(input_channels=1, num_classes=CLASSES, deep_supervision=False, **{**own, **modules})


def run_nnunet(folder: Path, spacing: float) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    labels = {"background": 0} | {f"organ {n}": n for n in range(1, CLASSES)}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    manager = PlansManager(plans(spacing))
    predictor = nnUNetPredictor(0.5, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    weights = torch.load(folder / "network.pt", weights_only=True)
    configuration = manager.get_configuration("3d_fullres")
    predictor.manual_initialization(network(), manager, configuration, [weights], dataset, "nnUNetTrainer", None)
    predictor.predict_from_files_sequential([[str(folder / "ct.nii.gz")]], [str(folder / NNUNET)])


def run_ours(folder: Path, spacing: float, precision: str) -> None:
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    from medseg3d.inference import SubVolumes
    from medseg3d.inference.grid_map import edge_to_edge
    from medseg3d.inference.memory import keep_freed_memory
    from medseg3d.inference.onto_grid import labels_onto
    from medseg3d.io import read_volume, write_label_map
    from medseg3d.runner import Runner

    model = network().eval()
    model.load_state_dict(torch.load(folder / "network.pt", weights_only=True, mmap=True))
    seconds = {"start": time.perf_counter()}
    volume = read_volume(folder / "ct.nii.gz")
    seconds["read"] = time.perf_counter()
    scan = volume.array.T  # nnU-Net's axes: slices first
    shape = [round(n * old / spacing) for n, old in zip(scan.shape, volume.spacing[::-1], strict=True)]
    image = torch.from_numpy(scan.astype(np.float32)).clamp_(*HU).sub_(HU[0]).div_(HU[1] - HU[0])
    image_BCDHW = F.interpolate(image[None, None], shape, mode="trilinear")
    del image
    seconds["resample"] = time.perf_counter()
    # MONAI's weights, which are the default, do not fall below a thousandth towards a window's corners.
    weights = compute_gaussian(WINDOW, sigma_scale=1 / 8, dtype=torch.float32, device="cpu")
    windows = SubVolumes(WINDOW, placement="even", weight_map=weights)
    maps = edge_to_edge(shape, scan.shape)
    runner = Runner(model, torch.device("cpu"), precision)
    with keep_freed_memory(), torch.inference_mode():
        labels = runner(
            lambda ready: labels_onto(windows.slabs(image_BCDHW, ready), maps),
            lambda: windows.example(image_BCDHW),
            [],
        )
    seconds["network and labels"] = time.perf_counter()
    names = {n: f"organ {n}" for n in range(1, CLASSES)}
    write_label_map(volume.with_array(labels.T), folder / f"{OURS} {precision}.nii.gz", names)
    seconds["write"] = time.perf_counter()
    times = list(seconds.values())
    stages = zip(list(seconds)[1:], np.diff(times), strict=True)
    chosen = f", {runner.precision.reason}" if runner.precision else ""
    print(f"{OURS} {precision}{chosen}: seconds of", ", ".join(f"{name} {value:.1f}" for name, value in stages))


def prepare(folder: Path, shape: tuple[int, ...], steps: int) -> None:
    write_scan(folder, shape)
    torch.manual_seed(0)
    torch.save(train(network(), steps).state_dict(), folder / "network.pt")


def main() -> None:
    parser = argument_parser(__doc__, "scan and weights")
    parser.add_argument("--side", choices=(NNUNET, "fp32", "auto"), help="run one side only, in this process")
    args = parser.parse_args()
    if args.side == NNUNET:
        run_nnunet(args.folder, args.spacing)
    elif args.side is not None:
        run_ours(args.folder, args.spacing, args.side)
    else:
        with working_folder(args) as folder:
            if not (folder / "network.pt").exists():
                in_child(prepare, folder, tuple(args.shape), args.steps)
            compare(folder, args.spacing, args.threads, args.rounds)


def compare(folder: Path, spacing: float, threads: int, rounds: int) -> None:
    names = {NNUNET: NNUNET, f"{OURS} fp32": "fp32", f"{OURS} auto": "auto"}
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    command = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), "--spacing", str(spacing)]
    for _ in range(rounds):
        for name, side in names.items():
            taken[name].append(process([*command, "--side", side], threads, folder / f"{side}.txt"))
            print(f"{name}: {taken[name][-1]}", file=sys.stderr, flush=True)
    print_agreement({name: folder / f"{name}.nii.gz" for name in names}, folder / "truth.nii.gz")
    print_times(taken)
    for side in ("fp32", "auto"):
        print("\n" + (folder / f"{side}.txt").read_text().strip().splitlines()[-1])


if __name__ == "__main__":
    main()
