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
# # Slices, a smaller volume, or sub-volumes?
#
# A CT has tens of millions of voxels. A 3D network that looks at all of them at once, at full resolution, needs more
# memory than most machines have. Something must go:
#
# - **Slices**: a 2D network sees one plane after another. It loses the third axis.
# - **Downsampled**: a 3D network sees the whole scan, made smaller. It loses detail.
# - **Sub-volumes**: a 3D network sees windows at full resolution that overlap. It loses the long range.
#
# Here all three meet one CT: what each sees, what each computes, and how well the shipped models that work this way do.

# %%
import numpy as np
import torch
from PIL import Image, ImageDraw

import medseg3d as ms
from medseg3d.catalogue import shipped_bundles
from medseg3d.compare import Contender, compare
from medseg3d.compare.pictures import examples
from medseg3d.costs import scan_costs
from medseg3d.data.datasets import Case
from medseg3d.data.sample import sample_labels
from medseg3d.inference import Downsampled, Slices, SubVolumes

ct = ms.read_volume(ms.sample_ct())
spacing = " x ".join(f"{mm:g}" for mm in ct.spacing)
print(f"{' x '.join(map(str, ct.shape))} voxels of {spacing} mm: {ct.array.size / 1e6:.1f} million")

# %% [markdown]
# ## What the network sees
#
# One coronal plane, in four ways. A slice network sees the bright row and nothing above or below. A smaller volume has
# it all, coarser: a strategy takes any function for a network, so one that hands back its input shows what is left. A
# window shows everything nearby and nothing else.

# %%
row = ct.shape[1] // 2
millimetres = ct.shape[0] * ct.spacing[0], ct.shape[2] * ct.spacing[2]


def coronal(volume):
    """The plane as a picture, head up, with voxels as wide and high as they are."""
    grey = np.clip((volume[:, row] + 160) / 400, 0, 1) * 255
    picture = Image.fromarray(grey.T[::-1].astype(np.uint8))
    return picture.resize(tuple(round(0.7 * mm) for mm in millimetres), Image.Resampling.BILINEAR)


def side_by_side(pictures):
    """Pictures with their names above, from left to right."""
    gap, head = 8, 22
    pictures = {name: p.convert("RGB") for name, p in pictures.items()}
    page = Image.new(
        "RGB",
        (sum(p.width + gap for p in pictures.values()) - gap, head + max(p.height for p in pictures.values())),
        "white",
    )
    left = 0
    for name, picture in pictures.items():
        ImageDraw.Draw(page).text((left + 2, 4), name, fill="black", font_size=13)
        page.paste(picture, (left, head))
        left += picture.width + gap
    return page


def only(*place):
    """The CT where a network looks at it, dark elsewhere."""
    seen = np.full(ct.shape, -160.0)
    seen[place] = ct.array[place]
    return 0.8 * seen + 0.2 * ct.array


image = torch.from_numpy(ct.array.astype(np.float32))[None, None]
everything = slice(None)
middle = [slice(size // 2 - 32, size // 2 + 32) for size in ct.shape]
slice_number = ct.shape[2] // 2
small = Downsampled((64, 64, 32))(image, lambda volume: volume)[0, 0].numpy()
side_by_side(
    {
        "the CT": coronal(ct.array),
        "slices: one of them": coronal(only(everything, everything, slice(slice_number - 1, slice_number + 2))),
        "downsampled to 64 x 64 x 32": coronal(small),
        "sub-volumes: one of 64 x 64 x 64": coronal(only(*middle)),
    }
)

# %% [markdown]
# ## What it computes
#
# The U-Net of `headneck_ct_unet` in its own windows, and networks of the same layers in the two other strategies: in 2D
# for slices. Counted without running, two operations for a multiply-add. Windows overlap by half, so that most voxels
# are computed up to eight times.

# %%
for cost in scan_costs("headneck_ct_unet", ct.shape, ct.spacing):
    window = " x ".join(map(str, cost.window))
    print(
        f"{cost.strategy:12} {cost.windows:4} x {window:14} {cost.flops / 1e9:7.0f} GFLOP "
        f"{cost.parameters / 1e6:5.2f} million parameters"
    )

# %% [markdown]
# ## What it keeps in memory
#
# Beside the network's own layers, which grow with its window, results wait to be blended. All classes at all voxels of
# a long scan would be gigabytes. Finished slices leave early instead: sub-volumes keep as many as a window is thick,
# slices along one axis none, the small volume only itself. (Slices along three axes are fused, and keep a sum of all.)

# %%
LONG, CLASSES = (512, 512, 600), 8
print(f"{'x'.join(map(str, LONG))}, {CLASSES} classes: {np.prod(LONG) * CLASSES * 4 / 1e9:6.2f} GB if all were kept")
for name, strategy in {
    "sub-volumes of 64": SubVolumes(64),
    "slices along one axis": Slices(),
    "slices along three, fused": Slices((0, 1, 2)),
    "downsampled to 128x128x64": Downsampled(),
}.items():
    print(f"{name:26} {strategy.blending(LONG, CLASSES)[0] / 1e9:6.2f} GB")

# %% [markdown]
# ## How well it does
#
# The shipped models of these organs, one a strategy. A strategy that has no model of its own borrows the U-Net of the
# sub-volumes, which was not trained for it: then its figures show what happens to a network that meets voxels of
# another size, and say little of the strategy.
#
# The CT is an average of people whose scans the models were trained on. The figures show how a comparison is read;
# those to cite are of a test split, by `medseg3d compare`.

# %%
OWN = {
    "sub-volumes": "headneck_ct_unet",
    "slices": "headneck_ct_fcn_slices",
    "downsampled": "headneck_ct_unet_downsampled",
}
there = {bundle.name: bundle for bundle in shipped_bundles() if (bundle.path / "models" / "model.pt").is_file()}
contenders = [Contender(bundle, name=strategy) for strategy, bundle in OWN.items() if bundle in there]
if OWN["downsampled"] not in there:
    contenders.append(Contender(OWN["sub-volumes"], "downsampled", name="downsampled (borrowed)"))

case = Case("sample", (ms.sample_ct(),), sample_labels(), patient="nobody", split="test")
labels = there[OWN["sub-volumes"]].labels
result = compare(contenders, [case], "comparison", labels, device="cpu", own_process=False)
assert not result.failures, result.failures

# %%
names = [model.name for model in result.models]
dice = result.values("dice")[:, 0]  # models, organs
print(f"{'Dice':16}", *(f"{name:>24}" for name in names))
for n, organ in enumerate(result.organs):
    print(f"{organ:16}", *(f"{value:24.3f}" for value in dice[:, n]))
print(f"{'mean':16}", *(f"{value:24.3f}" for value in dice.mean(axis=1)))
print()
for title, unit in {"windows": "", "gflop": "", "cpu_seconds": " s"}.items():
    print(f"{title:16}", *(f"{result.cost(name, title):22.1f}{unit:2}" for name in names))

# %% [markdown]
# Seconds are the processor's, so that other programs do not count. `comparison/comparison.html` has these figures with
# surface distances, costs and intervals on one page.
#
# Each model's outlines: yellow-green is what it misses of the reference, magenta what it adds.

# %%
(example,) = examples(result)
planes = {row.caption: side_by_side(row.pictures) for row in example.rows}
first, *_, last = planes
print(first)
planes[first]

# %%
print(last)
planes[last]

# %% [markdown]
# ## Which one, then?
#
# - Organs of a few voxels' thickness, fine outlines: **sub-volumes**. It costs most, and a window may take a vertebra
#   for another one, since it does not see which.
# - Where it matters what is where in the body, or time is short: **downsampled**, alone or to find the place for a
#   second look (`medseg3d.inference.CoarseToFine`).
# - Thick slices, little memory, or weights that were trained on photographs: **slices**, best along all three axes.
#
# On your own scans: `medseg3d compare --data datalist.json -m headneck_ct_unet your_bundle --trust -o comparison`.
