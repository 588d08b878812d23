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
# # A bundle from Python, whole and in parts
#
# A bundle is a network with everything around it: how a scan is prepared, how the network goes over it, what happens
# to the result. `load_model` gives all of it as one object. Each part can also be had alone.

# %%
import tempfile
from pathlib import Path

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNETR as MonaiUNETR
from PIL import Image

import medseg3d as ms
from medseg3d.checkpoints import CheckpointMismatch, load_checkpoint
from medseg3d.inference import SubVolumes
from medseg3d.networks import NETWORKS, build

# %% [markdown]
# ## A scan in, a segmentation out
#
# The scan may be a file, a DICOM folder, an image of nibabel or SimpleITK, or an array with its affine. The labels come
# back on its own grid. Here windows overlap by a quarter instead of a half: fewer windows, so less time, and fewer
# opinions at their borders.

# %%
model = ms.load_model("headneck_ct_unet", device="cpu", overlap=0.25)
result = model.predict(ms.sample_ct())
print(model.name, "on", model.describe_device())
print(result.segmentation.array.shape, result.segmentation.array.dtype, result.labels)
print({stage: round(seconds, 1) for stage, seconds in result.seconds.items()})

# %%
for name, organ in result.statistics()["labels"].items():
    cut_off = ", ".join(organ["touches_border"]) or "nothing"
    print(f"{name:14} {organ['volume_ml']:6.1f} ml, median {organ['hu']['median']:4.0f} HU, cut off at: {cut_off}")

# %% [markdown]
# A look at it comes before every figure.

# %%
result.save("seg.nii.gz")
preview = Image.open(result.preview("seg.png"))
preview.resize((preview.width // 2, preview.height // 2), Image.Resampling.LANCZOS)

# %% [markdown]
# ## The parts by themselves
#
# `model.network` is a plain module, `model.inferer` the strategy. A strategy brings any network and any image together:
# it is called like one of MONAI's inferers, and `label_map` gives labels without ever holding the logits of all voxels.

# %%
parameters = sum(parameter.numel() for parameter in model.network.parameters())
print(type(model.network).__name__, f"{parameters / 1e6:.2f} million parameters")
print(type(model.inferer).__name__, model.inferer.count((128, 80, 128)), "windows for 128 x 80 x 128 voxels")

image = torch.randn(1, 1, 80, 64, 80)
windows = SubVolumes(roi_size=64, overlap=0.25, blend="gaussian")
with torch.inference_mode():
    logits = windows(image, model.network)
    labels = windows.label_map(image, model.network)
print(logits.shape, labels.shape, labels.dtype, "differ in", int((logits.argmax(1, keepdim=True) != labels).sum()))

# %% [markdown]
# ## In the place of a MONAI inferer
#
# The same windows, the same weights at their borders: where a config says `SlidingWindowInferer`, `SubVolumes` may
# stand, and so in any evaluator or trainer of MONAI's.

# %%
sliding = SlidingWindowInferer(roi_size=64, overlap=0.25, mode="gaussian")
with torch.inference_mode():
    theirs = sliding(image, model.network)
difference = float((theirs - logits).abs().max())
print(f"logits up to {float(theirs.abs().max()):.1f}, largest difference {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# ## A network of your own choice, with public weights
#
# Networks have the keywords and the names of parameters that public weights were made for: MONAI's for V-Net, UNETR and
# Swin UNETR, torchvision's for VGG, ResNet and Mask R-CNN. `docs/checkpoints.md` lists the files that are known.

# %%
print(", ".join(NETWORKS))

# %% [markdown]
# Nothing is fetched here, so a file that MONAI's own class writes stands for one from the net. The report tells what
# went where.

# %%
SIZES = {"img_size": (32, 32, 32), "feature_size": 4, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "unetr_from_elsewhere.pt"
    original = MonaiUNETR(in_channels=1, out_channels=14, **SIZES).eval()
    torch.save({"state_dict": original.state_dict(), "epoch": 300}, file)

    network = build("unetr", in_channels=1, out_channels=14, **SIZES).eval()
    print(load_checkpoint(network, file))
    try:
        load_checkpoint(build("unetr", in_channels=1, out_channels=5, **SIZES), file)
    except CheckpointMismatch as refusal:
        print("\nrefused:", refusal)

with torch.inference_mode():
    window = torch.randn(1, 1, 32, 32, 32)
    difference = float((network(window) - original(window)).abs().max())
print(f"\nlargest difference to MONAI's network: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# Such a network goes into any strategy, as above: `SubVolumes(32)(image, network)`.
