# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own data, from a folder to a trained model
#
# A data set is checked, dealt into folds, trained on, and the model that comes of it is measured. The scans are made up
# here, so that all of it takes seconds and nothing is fetched; the network is tiny for the same reason. With your own
# scans you leave out the first cell below and make the sizes larger.
#
# Everything is also a command: `medseg3d(...)` runs the very line that you would type into a shell.

# %%
import json
import logging
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser
from PIL import Image

from medseg3d.cli import main
from medseg3d.training.curves import read_curves

logging.disable(logging.WARNING)  # MONAI tells every step; too much for this page


def medseg3d(line):
    print("$ medseg3d", line)
    code = main(shlex.split(line))
    if code:
        print("exit code", code)
    return code


# %% [markdown]
# ## Scans
#
# Six patients: a body of soft tissue, a liver that is a little brighter, a spine that is much brighter, each a little
# elsewhere in everyone. They lie in a folder as nnU-Net wants it; a MONAI datalist or a CSV of two columns would do as
# well.

# %%
LABELS = {"background": 0, "liver": 1, "spine": 2}
SHAPE, SPACING = (52, 44, 36), 4.0  # voxels, mm
AFFINE = np.diag([-SPACING, -SPACING, SPACING, 1.0])  # voxels go to the left, back and up: LPS


def ellipsoid(centre, radii):
    points = [np.arange(size) - size / 2 for size in SHAPE]
    x, y, z = np.meshgrid(*points, indexing="ij", sparse=True)
    return sum(((p - c) / r) ** 2 for p, c, r in zip((x, y, z), centre, radii, strict=True)) < 1


def patient(rng):
    """HU and labels."""
    shift = rng.normal(0, 1.5, 3)
    labels = np.zeros(SHAPE, np.uint8)
    labels[ellipsoid(np.array([-8, -2, 0]) + shift, (9, 8, 9) * rng.uniform(0.85, 1.15, 3))] = 1
    labels[ellipsoid(np.array([0, 12, 0]) + shift, (4, 4, 99))] = 2
    body = ellipsoid((0, 0, 0), (23, 19, 99))
    hu = np.where(body, 20, -1000) + 90 * (labels == 1) + 500 * (labels == 2) + rng.normal(0, 25, SHAPE)
    return hu.astype(np.int16), labels


data = Path("Dataset001_Torso")
data.mkdir(exist_ok=True)
description = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 6, "file_ending": ".nii.gz"}
(data / "dataset.json").write_text(json.dumps(description))
rng = np.random.default_rng(0)
for n in range(6):
    for folder, array, end in zip(("imagesTr", "labelsTr"), patient(rng), ("_0000", ""), strict=True):
        (data / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, AFFINE), data / folder / f"torso_{n}{end}.nii.gz")

# %% [markdown]
# ## Check before hours are spent
#
# Someone exported one label map 8 mm beside its scan. Nothing would have failed in training; the model would just have
# been worse. `check` looks at geometry, numbers, labels, patients and duplicates.

# %%
label = data / "labelsTr" / "torso_3.nii.gz"
whole = nib.load(label)
voxels = np.asarray(whole.dataobj)
moved = AFFINE.copy()
moved[0, 3] = 8
nib.save(nib.Nifti1Image(voxels, moved), label)
assert medseg3d(f"check {data}") == 4  # there are faults

# %% [markdown]
# Put right, the patients are dealt into folds. All scans of a patient stay together, rare organs are spread, and the
# same seed gives the same folds everywhere. The result is a MONAI datalist.

# %%
nib.save(nib.Nifti1Image(voxels, AFFINE), label)
datalist = data / "datalist.json"
assert medseg3d(f"check {data} --make-folds 3 --seed 0 -o {datalist}") == 0

# %% [markdown]
# ## A bundle of your own
#
# A bundle is a folder with configs: how scans are prepared, the network, the windows, the loss. `adapt` copies one that
# ships and puts your labels and voxels into it. Here: two organs instead of seven, voxels of 4 mm. The mirror image
# goes, since no organ here has a twin on the other side: it would show a liver on the left.

# %%
own = Path("torso_ct_unet")
shutil.rmtree(own, ignore_errors=True)  # of an earlier run of this page
assert medseg3d(f"adapt {datalist} -o {own} --spacing {SPACING}") == 0

# %% [markdown]
# Everything in its configs is yours to change. So that this page takes seconds, here are a small network and windows of
# 32 voxels; for a real run leave this cell out.


# %%
def change(config, changes):
    """Set values by their ids, as MONAI writes them: parts are joined by ::, items of a list have numbers."""
    path = own / "configs" / f"{config}.json"
    parser = ConfigParser(ConfigParser.load_config_file(path))
    for name, value in changes.items():
        assert name in parser, name
        parser[name] = value
    path.write_text(json.dumps(parser.get(), indent=2))


change(
    "train",
    {
        "network_def::channels": [8, 16, 32],
        "patch_size": [32, 32, 32],
        "learning_rate": 0.01,
        "ema_decay": 0.9,  # the mean of the weights of the last 10 steps; of a long run, those of more
        "iterations_per_epoch": 10,
        "val_interval": 3,
    },
)
change("inference", {"network_def::channels": [8, 16, 32], "inferer::roi_size": [32, 32, 32]})

# %% [markdown]
# ## Train, stop, go on
#
# Fold 0 validates, the others are trained on. After each epoch the weights, the optimiser and the learning rate's
# schedule are saved; random numbers follow from the seed and the epoch. Whatever ends a run (Ctrl-C, a crash,
# `kill -9`, or here a limit of time that one epoch exceeds), the same line again goes on behind the last whole epoch.
#
# `--trust` says that you trust a bundle that does not ship with medseg3d: its configs run as code.

# %%
line = f"train -m {own} --trust -o run --epochs 6 -d cpu -q"
assert medseg3d(f"{line} --max-hours 0.0000001") == 0
print([f"epoch {row['epoch']:.0f}: loss {row['loss']:.2f}" for row in read_curves(Path("run/checkpoints/curves.csv"))])

# %%
assert medseg3d(line) == 0
curves = read_curves(Path("run/checkpoints/curves.csv"))
for row in curves:
    dice = "" if row["validation"] is None else f", Dice of the validation {row['validation']:.3f}"
    print(f"epoch {row['epoch']:.0f}: loss {row['loss']:.2f}{dice}")
assert [row["epoch"] for row in curves] == [1, 2, 3, 4, 5, 6]

# %%
Image.open("run/checkpoints/curves.png")

# %% [markdown]
# ## Use it, measure it
#
# The best weights of the validation become the bundle's. It now runs like any other, here on the two patients of the
# validation. That is no test: the weights were chosen by these two. A figure to publish comes from patients that had no
# part in anything, and from all folds.

# %%
shutil.copy("run/checkpoints/best.pt", own / "models" / "model.pt")
cases = [entry for entry in json.loads(datalist.read_text())["training"] if entry["fold"] == 0]
images = " ".join(str(data / entry["image"]) for entry in cases)
assert medseg3d(f"predict -i {images} -o results -m {own} --trust -d cpu -p -q") == 0
assert medseg3d(f"evaluate -p results -r {data}/labelsTr -o metrics.csv") == 0

# %%
preview = Image.open(sorted(Path("results").glob("*.preview.png"))[0])
preview.resize((preview.width // 2, preview.height // 2))

# %% [markdown]
# Tiny network, few steps, round organs: the figures say that the way works, not how good it gets. For a real run use
# the bundle's own sizes, hundreds of epochs and, where there is one, a GPU. [docs/training.md](../docs/training.md) has
# all that a run takes.
