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
# # What attention costs
#
# A transformer cuts a volume into patches and makes a token of each. Every token looks at every other one, so that the
# operations grow with the square of their number. UNETR keeps tokens few: its patches are 16 voxels long. Swin UNETR
# keeps them small, 2 voxels, and lets them look through windows only. What does that save, and what does it cost?
#
# One multiply-add counts as two operations (FLOPs) throughout. Biases, norms and softmax are not counted. This runs in
# seconds, in Jupyter (with jupytext) or as `python notebooks/flops_of_attention.py`; nothing needs a GPU or data.

# %%
import torch

from medseg3d.flops import Attention, PatchEmbedding, count_operations, receptive_field, swin_stages
from medseg3d.networks import UNETR, SwinUNETR, VNet


def table(titles, rows):
    """Columns as wide as they must be, numbers to the right."""
    lines = [list(titles), *([cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def size(numbers):
    return "x".join(map(str, numbers))


def giga(flops):
    return f"{flops / 1e9:,.2f}"


# %% [markdown]
# ## One layer
#
# L tokens of width d: queries, keys, values and the projection of the result are four products with d x d weights,
# $8 d^2 L$. Scores and the sum that they weight are two products of L x L numbers, $4 d L^2$, however many heads share
# them. In windows of M tokens the second part is $4 d L M$: linear in L again.
#
# The exercise: a map of 64 x 64 x 32 with 256 channels, windows of 8 x 8 x 8.

# %%
full, windowed = Attention((64, 64, 32), 256), Attention((64, 64, 32), 256, (8, 8, 8))
table(
    ["", "windows", "tokens in each", "8 d^2 L", "4 d L M", "FLOPs", "scores of a head, GiB"],
    [
        [
            name,
            layer.windows,
            layer.tokens_per_window,
            layer.linear_flops,
            layer.quadratic_flops,
            layer.flops,
            f"{layer.scores_per_head * 4 / 2**30:,.2f}",
        ]
        for name, layer in (("full", full), ("windowed", windowed))
    ],
)
print(f"full / windowed = {full.flops / windowed.flops}; of the second part alone, the number of windows:", end=" ")
print(full.quadratic_flops / windowed.quadratic_flops)
assert full.flops / windowed.flops == 128.5

# %% [markdown]
# ## Growing volumes
#
# One layer for a cube of so many voxels an edge. UNETR's tokens are few enough for full attention. With Swin UNETR's
# patches of 2 full attention is out of reach long before a scan is seen as a whole; windows cost about the same for
# each voxel, whatever the size. Windows of 7 are padded where they do not divide the grid: 64 tokens become 70.

# %%
EDGES = (32, 64, 96, 128, 192, 256, 384)
rows, curves = [], {"UNETR, full": [], "patches of 2, full": [], "patches of 2, windows of 7": []}
for edge in EDGES:
    unetr = PatchEmbedding((edge,) * 3, channels=1, patch=16, width=768)
    swin = PatchEmbedding((edge,) * 3, channels=1, patch=2, width=48)
    layers = [Attention(unetr.grid, 768), Attention(swin.grid, 48), Attention(swin.grid, 48, (7, 7, 7))]
    for curve, layer in zip(curves.values(), layers, strict=True):
        curve.append(layer.flops)
    rows.append([edge, unetr.tokens, swin.tokens, size(layers[2].padded), *(giga(layer.flops) for layer in layers)])
table(["edge", "UNETR tokens", "Swin tokens", "in whole windows", *(f"{name}, GFLOP" for name in curves)], rows)

# %% [markdown]
# The same as a picture, where matplotlib is installed; both axes are logarithmic, so that a power is a straight line.

# %%
try:
    import matplotlib.pyplot as plt
except ImportError:
    print("no matplotlib: no picture")
else:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, curve in curves.items():
        axes.loglog(EDGES, [flops / 1e9 for flops in curve], marker="o", label=name)
    axes.set_xlabel("edge of the volume, voxels")
    axes.set_ylabel("one layer of attention, GFLOP")
    axes.set_xticks(EDGES, [str(edge) for edge in EDGES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    plt.show()

# %% [markdown]
# ## The stages of Swin UNETR
#
# Each stage has half the tokens along each axis and twice the width: an eighth of the tokens, four times the weights.
# A window of 7 covers ever more of the volume: in the last stage all of a cube of 96.

# %%
for edge in (96, 128):
    print(f"\n{edge}^3 voxels")
    rows = [
        [number, size(s.grid), s.width, size(s.padded), s.windows, giga(s.linear_flops), giga(s.quadratic_flops)]
        for number, s in enumerate(swin_stages((edge,) * 3), start=1)
    ]
    table(["stage", "tokens", "width", "padded", "windows", "8 d^2 L, GFLOP", "4 d L M, GFLOP"], rows)

# %% [markdown]
# ## Whole networks
#
# Counted as they run, on tensors that have a shape and no values. Attention is the smaller part of both transformers:
# the convolutions that bring their tokens back to full resolution are what costs. The network of convolutions alone
# pays most of all, with kernels of 5 x 5 x 5, and still sees less than everything.

# %%
SHAPE = (1, 1, 96, 96, 96)
with torch.device("meta"):
    networks = {
        "V-Net": VNet(in_channels=1, out_channels=14),
        "UNETR": UNETR(in_channels=1, out_channels=14, img_size=96),
        "Swin UNETR": SwinUNETR(in_channels=1, out_channels=14, feature_size=48),
    }
rows = []
for name, network in networks.items():
    found, reach = count_operations(network, SHAPE), receptive_field(network, SHAPE)
    attention = sum(part.flops for part in found.by_module(depth=9) if ".attn" in part.name)
    convolutions = found.by_operation["convolution"]
    sees = size(reach.field) if all(reach.field) else "everything"
    rows.append(
        [name, found.parameters, giga(found.flops), giga(found.macs), giga(attention), giga(convolutions), sees]
    )
table(["", "parameters", "GFLOP", "GMAC", "attention", "convolution", "sees"], rows)

# %% [markdown]
# How well each of them segments, and in what time, is another matter: `medseg3d compare`. Fewer operations are no
# promise of less time either, since windows and tokens move through memory more than they compute.
