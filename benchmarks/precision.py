"""Do bfloat16 weights give the labels of float32? Asked of networks that have learned something, on a real CT window.

    python benchmarks/precision.py CT LABELS [--networks vnet unetr swin_unetr] [--size 96] [--steps 60]
    python benchmarks/precision.py            # the sample CT that ships with medseg3d

Each network is trained for a few minutes on random windows of one CT, in float32, but for one end of its longest axis.
There lies the window that it is then asked for, in float32 and in bfloat16. Agreement is the share of voxels with the
same label, over all voxels and over those that either side calls an organ. The training proves nothing about the
networks; it gives them margins, without which labels of random weights flip at the slightest rounding.
"""

from __future__ import annotations

import argparse
import time
from importlib import resources

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.io import read_volume
from medseg3d.networks import build

NETWORKS = {
    "vnet": {"width": 8},
    "unetr": {"in_channels": 1, "feature_size": 16, "hidden_size": 384, "mlp_dim": 1536, "num_heads": 6},
    "swin_unetr": {"in_channels": 1, "feature_size": 48},
}
HU_WINDOW = (-175.0, 250.0)


def sample() -> tuple[str, str]:
    folder = resources.files("medseg3d.data.sample")
    return str(folder / "headneck_template_ct.nii.gz"), str(folder / "headneck_template_seg.nii.gz")


def load(ct: str, labels: str) -> tuple[torch.Tensor, ...]:
    """(D, H, W) in 0..1 and (D, H, W) labels 0..n, renumbered without gaps; the longest axis comes last."""
    image, label_map = (np.asarray(read_volume(path).array) for path in (ct, labels))
    low, high = HU_WINDOW
    scaled = (np.clip(image.astype(np.float32), low, high) - low) / (high - low)
    _, numbers = np.unique(label_map, return_inverse=True)
    longest = int(np.argmax(image.shape))
    label_map = numbers.reshape(label_map.shape)
    return tuple(torch.from_numpy(array).movedim(longest, -1) for array in (scaled, label_map))


def train(network: nn.Module, image: torch.Tensor, labels: torch.Tensor, size: int, steps: int) -> float:
    """Windows centred on a random organ voxel; the last loss."""
    generator = np.random.default_rng(0)
    organ = np.argwhere(labels.numpy() > 0)
    # Rare labels count more, or the first minutes teach nothing but background.
    weight = torch.bincount(labels.flatten()).double().clamp(min=1).rsqrt().float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-4, weight_decay=1e-5)
    network.train()
    for _ in range(steps):
        centre = organ[generator.integers(len(organ))]
        starts = [int(np.clip(c - size // 2, 0, n - size)) for c, n in zip(centre, labels.shape, strict=True)]
        window = tuple(slice(start, start + size) for start in starts)
        logits = network(image[window][None, None])
        loss = F.cross_entropy(logits.float(), labels[window][None], weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    network.eval()
    return float(loss)


def compare(network: nn.Module, window: torch.Tensor) -> str:
    with torch.inference_mode():
        exact = network(window[None, None])
        half = network.bfloat16()(window[None, None].bfloat16()).float()
    error = float((half - exact).norm() / exact.norm())
    one, other = exact.argmax(1), half.argmax(1)
    organ = (one > 0) | (other > 0)
    everywhere, in_organs = (float((one == other)[where].double().mean()) for where in (torch.ones_like(organ), organ))
    return f"{error:.1e} | {everywhere:.3%} | {in_organs:.3%} | {int(organ.sum())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ct", nargs="?", default=sample()[0])
    parser.add_argument("labels", nargs="?", default=sample()[1])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    size = arguments.size
    image, labels = load(arguments.ct, arguments.labels)
    shape = labels.shape
    if min(shape) < size or shape[2] < 2 * size:
        parser.error(f"the CT needs {size} voxels along each axis and twice as many along one, got {tuple(shape)}")
    print(
        "| network | relative error | same label | of organ voxels | organ voxels | last loss | minutes of training |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in arguments.networks:
        torch.manual_seed(0)
        more = {"img_size": size} if name == "unetr" else {}
        network = build(name, out_channels=int(labels.max()) + 1, **NETWORKS[name], **more)
        start = time.perf_counter()
        loss = train(network, image[..., size:], labels[..., size:], size, arguments.steps)
        minutes = (time.perf_counter() - start) / 60
        middle = [(n - size) // 2 for n in shape[:2]]
        window = image[middle[0] : middle[0] + size, middle[1] : middle[1] + size, :size]
        print(f"| {name} | {compare(network, window)} | {loss:.3f} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
