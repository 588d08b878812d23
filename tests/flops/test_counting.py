"""Counts of whole networks, against the golden file, PyTorch's own counter and figures worked by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from math import prod

import monai.networks.nets as monai_nets
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from medseg3d.flops import Attention, Convolution, count_operations, swin_stages
from medseg3d.flops.counting import Watch
from medseg3d.flops.counting import on_meta as without_values
from medseg3d.layers.deformable import DeformConv2d
from medseg3d.networks import FCN, NETWORKS, UNETR, MaskRCNN, SwinUNETR, UNet, VNet, cicek_unet

OWN = {"VNet": VNet, "UNETR": UNETR, "SwinUNETR": SwinUNETR}


def on_meta(builder, *arguments, **keywords):
    with torch.device("meta"):
        return builder(*arguments, **keywords)


def counted_by_torch(network, shape):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name",
    [
        *("VNet_1to2_128x128x64", "UNETR_btcv_96", "UNETR_course_4ch_128", "SwinUNETR_f48_btcv_96"),
        *("SwinUNETR_f48_v2_btcv_96", "SwinUNETR_f48_brats_128", "UNet_spleen_96"),
    ],
)
def test_golden_networks(name, shared):
    """MONAI's networks and ours give the same number, and PyTorch's counter gives it of MONAI's."""
    case = json.loads(shared("golden", "3d", "flops", "flops.json").read_text())["networks"][name]
    if case["class"] == "VNet":
        case["kwargs"].setdefault("in_channels", 1)
    theirs = without_values(getattr(monai_nets, case["class"])(**case["kwargs"]))
    found = count_operations(theirs, case["input"])
    assert (found.flops, found.parameters) == (case["flops"], case["params"])
    assert found.by_operation == case["by_operator"]
    assert counted_by_torch(theirs, case["input"]) == case["flops"]
    if case["class"] in OWN:
        own = count_operations(on_meta(OWN[case["class"]], **case["kwargs"]), case["input"])
        assert (own.flops, own.macs, own.parameters) == (case["flops"], case["flops"] // 2, case["params"])


def test_whoever_watches_sees_and_changes_nothing():
    network = nn.Sequential(nn.Linear(3, 2))
    inputs = torch.rand(1, 3)
    expected = network(inputs)
    with Watch(network) as watch:
        assert torch.equal(network(inputs), expected)
    assert [(one.module, one.macs) for one in watch.operations] == [("0", 6)]


def test_u_net_by_hand():
    """Each convolution of Cicek et al.'s figure 2 at its own size, padded."""
    size, half, quarter, eighth = 64**3, 32**3, 16**3, 8**3
    down = [(1, 32, size), (32, 64, size), (64, 64, half), (64, 128, half), (128, 128, quarter), (128, 256, quarter)]
    bottom = [(256, 256, eighth), (256, 512, eighth)]
    up = [(768, 256, quarter), (256, 256, quarter), (384, 128, half), (128, 128, half), (192, 64, size), (64, 64, size)]
    macs = sum(27 * i * o * n for i, o, n in down + bottom + up)
    macs += sum(8 * width**2 * n for width, n in [(512, eighth), (256, quarter), (128, half)])  # at input positions
    found = count_operations(on_meta(cicek_unet, 1, 2), (1, 1, 64, 64, 64))
    assert found.macs == macs + 64 * 2 * size
    assert found.activations == (
        sum(o * n for _, o, n in down + bottom + up)
        + sum(w * 8 * n for w, n in [(512, eighth), (256, quarter), (128, half)])
        + 2 * size
    )


def test_v_net_by_hand():
    def conv(i, o, n):
        return 5**3 * i * o * n

    n = [prod((128 // 2**k, 128 // 2**k, 64 // 2**k)) for k in range(5)]
    macs = conv(1, 16, n[0])
    for k, convs in zip((1, 2, 3, 4), (1, 2, 3, 2), strict=True):
        width = 16 * 2**k
        macs += 8 * width // 2 * width * n[k] + convs * conv(width, width, n[k])
    for k, inputs, width, convs in ((3, 256, 256, 2), (2, 256, 128, 2), (1, 128, 64, 1), (0, 64, 32, 1)):
        macs += 8 * inputs * width // 2 * n[k + 1] + convs * conv(width, width, n[k])
    macs += conv(32, 2, n[0]) + 4 * n[0]
    assert count_operations(on_meta(VNet, 3, 1, 2), (1, 1, 128, 128, 64)).macs == macs == 731528560640 // 2


def test_transformers_are_their_closed_forms():
    """UNETR's blocks are attention and a perceptron of 4 times the width; so are Swin UNETR's, in windows."""
    unetr = count_operations(on_meta(UNETR, 1, 14, 96), (1, 1, 96, 96, 96))
    rows = {row.name: row for row in unetr.by_module(3)}
    assert rows["vit.blocks.0"].flops == Attention((216,), 768).flops + 2 * 2 * 216 * 768 * 3072
    swin = count_operations(on_meta(SwinUNETR, 1, 14, feature_size=48), (1, 1, 96, 96, 96))
    rows = {row.name: row for row in swin.by_module(6)}
    for number, stage in enumerate(swin_stages((96,) * 3), start=1):
        blocks = [
            rows[name] for name in rows if name.startswith(f"swinViT.layers{number}.0.blocks.") and "attn" in name
        ]
        assert [sum(row.flops for row in blocks if f"blocks.{i}." in row.name) for i in (0, 1)] == [stage.flops] * 2


class Mixture(nn.Module):
    """Everything that multiplies, by module and by function."""

    def __init__(self):
        super().__init__()
        self.transposed = nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, groups=4, bias=False)
        self.linear = nn.Linear(8, 6)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = F.relu(self.norm(self.dilated(self.transposed(x)))).flatten(2).transpose(1, 2)
        x = F.scaled_dot_product_attention(x, x, x)
        return torch.einsum("bni,oi->bno", x, self.linear.weight) @ self.linear.weight


def test_every_kind_of_product():
    network = Mixture()
    found = count_operations(network, (2, 4, 9, 9))
    tokens = 15 * 15
    transposed = Convolution(4, 8, (3, 3), (9, 9), 2, groups=2, transposed=True)
    dilated = Convolution(8, 8, (3, 3), (19, 19), dilation=2, groups=4)
    assert (transposed.output_size, dilated.output_size) == ((19, 19), (15, 15))
    products = 2 * (2 * tokens**2 * 8 + 2 * tokens * 8 * 6)
    assert found.macs == 2 * (transposed.macs + dilated.macs) + products
    assert found.flops == counted_by_torch(on_meta(Mixture), (2, 4, 9, 9))
    by_module = {row.name: row for row in found.by_module()}
    assert by_module["transposed"].macs == 2 * transposed.macs and by_module["dilated"].macs == 2 * dilated.macs
    assert by_module[""].macs == products
    assert by_module["norm"].macs == 0 and by_module["norm"].parameters == 16


def test_deformable_convolution_is_a_convolution():
    class Deformable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DeformConv2d(6, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x, x.new_zeros(1, 18, *x.shape[2:]))

    found = count_operations(Deformable(), (1, 6, 12, 10))
    assert found.macs == Convolution(6, 4, (3, 3), (12, 10), padding=1).macs


def test_fast_ways_on_the_cpu_do_not_count_less():
    """Where values are needed the network runs on the CPU, without Winograd's tiles, merged or fused kernels."""

    class Careful(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            x.sum().nonzero()  # has no answer without values
            return self.network(x)

    for network, shape in (
        (SwinUNETR(1, 2, feature_size=12), (1, 1, 64, 64, 64)),
        (UNETR(1, 2, 32, hidden_size=96, mlp_dim=96, num_heads=4), (1, 1, 32, 32, 32)),
        (VNet(3, 1, 2, width=8), (1, 1, 32, 32, 32)),
    ):
        plain, careful = count_operations(network, shape), count_operations(Careful(network), shape)
        assert (plain.on_meta, careful.on_meta) == (True, False)
        assert plain.flops == careful.flops


def test_detectors_are_counted_by_running():
    torch.manual_seed(0)
    network = MaskRCNN("resnet18", num_classes=2, min_size=64, max_size=64, rpn_pre_nms_top_n_test=20)
    found = count_operations(network, (1, 3, 64, 64))
    assert not found.on_meta and found.parameters == sum(p.numel() for p in network.parameters())
    assert sum(row.macs for row in found.by_module()) == found.macs > 1e8


def test_parts_sum_up_and_the_network_stays_as_it_was():
    network = FCN(backbone="alexnet", width=1 / 8).train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():
        found = count_operations(network, (1, 3, 64, 64))
    for depth in range(4):
        rows = found.by_module(depth)
        assert sum(row.macs for row in rows) == found.macs and sum(row.flops for row in rows) == found.flops
        assert sum(row.parameters for row in rows) == found.parameters
        assert sum(row.activations for row in rows) == found.activations
    assert len(found.by_module(0)) == 1
    assert network.training and not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    torch.testing.assert_close(network.state_dict(), state)


SMALL = {
    "fcn": {"width": 1 / 8},
    "deconvnet": {"width": 1 / 16},
    "unet": {"spatial_dims": 2},
    "vnet": {"spatial_dims": 2},
    "unetr": {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "img_size": 224},
    "swin_unetr": {"spatial_dims": 2, "in_channels": 1, "out_channels": 2},
}


@pytest.mark.parametrize("name", sorted({*NETWORKS} - {"mask_rcnn", "upsnet"}))
def test_nothing_that_multiplies_goes_uncounted(name):
    """Whatever runs and has a name that sounds like a product is noted."""
    ran = Counter()

    class Everything(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    network = on_meta(NETWORKS[name], **SMALL.get(name, {})).eval()
    channels = 1 if "in_channels" in SMALL.get(name, {}) or name in ("unet", "vnet") else 3
    shape = (1, channels, 224, 224)
    with torch.no_grad(), Everything():
        network(torch.empty(shape, device="meta"))
    products = {op: times for op, times in ran.items() if re.search("conv|mm|mv|dot|attention|linear|einsum", op)}
    products = {op: times for op, times in products.items() if not op.startswith("upsample")}
    assert products and products == Counter(operation.name for operation in count_operations(network, shape).operations)


def test_shared_weights_are_counted_once_and_used_twice():
    layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    found = count_operations(nn.Sequential(layer, nn.ReLU(), layer), (1, 3, 8, 8))
    assert found.parameters == 81 and found.macs == 2 * 81 * 64


def test_sizes_that_do_not_fit():
    network = on_meta(UNet, channels=(4, 8, 16))
    with pytest.raises(ValueError, match=r"the next size that it takes is \(12, 12, 12\)"):
        count_operations(network, (1, 1, 10, 12, 12))
    with pytest.raises(ValueError, match=r"UNet takes images \(batch, 1, ...\), 1 channels, got \(1, 3, 8, 8, 8\)"):
        count_operations(network, (1, 3, 8, 8, 8))
    with pytest.raises(ValueError, match="depth must be 0 or more"):
        count_operations(nn.Identity(), (1, 1)).by_module(-1)


class Reading(nn.Module):
    """Reads a value, as its ``way`` has it."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.way = nn.Conv2d(3, 4, 3, padding=1), way

    def forward(self, x):
        if self.way == "branch":
            return self.conv(x) if x.sum() > 0 else x
        return self.conv(x) * float(x.max()) if self.way == "item" else self.conv(x + torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("way", ["branch", "item", "a tensor of its own"])
def test_a_network_that_reads_a_value_is_counted_by_running(way):
    found = count_operations(Reading(way), (1, 3, 8, 8))
    assert not found.on_meta and found.macs == 4 * 27 * 64
    with pytest.raises(ValueError, match=r"Reading does not take an input of \(1, 2, 8, 8\)"):
        count_operations(Reading("item"), (1, 2, 8, 8))
