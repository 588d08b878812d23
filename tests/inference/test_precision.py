"""Lower precision is taken where the hardware has it and a window agrees, and never changes the caller's network."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg3d.inference import SubVolumes
from medseg3d.inference.heads import split_head
from medseg3d.inference.precision import (
    InPrecision,
    agreement,
    choose_precision,
    in_precision,
    representative_window,
)
from medseg3d.networks import build

CPU_FEATURES = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth(*shape, seed=0):
    """Regions rather than noise: few voxels lie on a border, where rounding decides."""
    return nn.functional.avg_pool3d(noise(*shape, seed=seed), 5, 1, 2) * 5


@pytest.fixture(name="unet", scope="module")
def unet_fixture():
    torch.manual_seed(0)
    return build("unet", channels=(8, 16, 32), out_channels=3).eval()


@pytest.fixture(name="has_bfloat16")
def has_bfloat16_fixture(monkeypatch):
    monkeypatch.setattr(torch.cpu, CPU_FEATURES[0], lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, CPU_FEATURES[1], lambda: True, raising=False)


class Head(nn.Module):
    """Three classes from one channel; subclasses break in their own ways."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 1)
        nn.init.constant_(self.conv.weight, 1.0)
        self.conv.bias.data = torch.tensor([-1.0, 0.0, 0.5])

    def forward(self, x):
        return self.conv(x) * torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype).view(3, 1, 1, 1)


class Cancels(Head):
    """Lives on digits that bfloat16 does not have."""

    def forward(self, x):
        far = x + 1000.0
        return super().forward((far - 1000.0).to(self.conv.weight.dtype))


class Overflows(Head):
    def forward(self, x):
        return super().forward(x) if x.dtype == torch.float32 else super().forward(x) / 0


class CastsItself(Head):
    """Runs in autocast, but not with weights of another type."""

    def forward(self, x):
        return super().forward(x.float())


class TakesFloat32Only(Head):
    def forward(self, x):
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            raise TypeError("float32 only\nand a long story")
        return super().forward(x)


# The choice


@pytest.mark.usefixtures("has_bfloat16")
def test_a_real_network_that_agrees_runs_in_bfloat16(unet):
    window = smooth(1, 1, 24, 24, 24)
    chosen = choose_precision(unet, window, "cpu", "auto")
    assert chosen.dtype == torch.bfloat16 and not chosen.autocast
    assert chosen.agreement.finite and chosen.agreement.labels >= 0.99 and 0 < chosen.agreement.error < 5e-2
    assert chosen.reason == f"bfloat16: {chosen.agreement}"
    with torch.no_grad():
        found = agreement(in_precision(unet, chosen.dtype, chosen.autocast)(window), unet(window))
    assert found == chosen.agreement


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("limits", [{"min_labels": 1.1}, {"max_error": 1e-9}])
def test_a_window_that_does_not_agree_falls_back(unet, limits):
    chosen = choose_precision(unet, smooth(1, 1, 24, 24, 24), "cpu", "auto", **limits)
    assert chosen.dtype == torch.float32 and chosen.agreement is not None
    assert chosen.reason.startswith("float32: bfloat16 gave ") and "must agree" in chosen.reason


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("network", [Cancels(), Overflows()])
def test_networks_that_are_bad_in_bfloat16_fall_back_to_float32(network):
    class WithoutAutocast(type(network)):
        """Autocast would mend these two, since they hang on the type of their input."""

        def forward(self, x):
            return super().forward(x.bfloat16() if torch.is_autocast_enabled("cpu") else x)

    network.__class__ = WithoutAutocast
    chosen = choose_precision(network, noise(1, 1, 8, 8, 8), "cpu", "auto")
    assert chosen.dtype == torch.float32
    assert chosen.agreement.labels < 0.99 or chosen.agreement.error > 5e-2 or not chosen.agreement.finite
    assert chosen.reason.startswith("float32: bfloat16 gave ")
    asked = choose_precision(network, noise(1, 1, 8, 8, 8), "cpu", "bf16")
    assert asked.dtype == torch.bfloat16 and "as asked for" in asked.reason


@pytest.mark.usefixtures("has_bfloat16")
def test_not_finite_is_never_taken_even_with_the_loosest_limits():
    class Broken(Head):
        def forward(self, x):
            y = super().forward(x)
            return y if x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") else y / 0

    chosen = choose_precision(Broken(), noise(1, 1, 8, 8, 8), "cpu", "auto", min_labels=0.01, max_error=1e9)
    assert chosen.dtype == torch.float32 and not chosen.agreement.finite
    assert "not finite" in chosen.reason


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("network", [Cancels(), Overflows(), CastsItself()])
def test_autocast_is_tried_where_cast_weights_fail(network):
    chosen = choose_precision(network, noise(1, 1, 8, 8, 8), "cpu", "auto")
    assert chosen.dtype == torch.bfloat16 and chosen.autocast
    assert chosen.reason.startswith("bfloat16 by autocast: ")


@pytest.mark.usefixtures("has_bfloat16")
def test_a_network_that_runs_in_float32_only():
    chosen = choose_precision(TakesFloat32Only(), noise(1, 1, 8, 8, 8), "cpu", "auto")
    assert chosen.dtype == torch.float32 and chosen.agreement is None
    assert chosen.reason == "float32: the network does not run in bfloat16: float32 only"
    with pytest.raises(ValueError, match="does not run in bfloat16, take precision 'fp32': float32 only"):
        choose_precision(TakesFloat32Only(), noise(1, 1, 8, 8, 8), "cpu", "bf16")


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("wrap", [torch.jit.script, lambda network: lambda window: network(window)])
def test_torchscript_and_plain_callables_run_in_autocast(unet, wrap):
    network, window = wrap(unet), smooth(1, 1, 24, 24, 24)
    chosen = choose_precision(network, window, "cpu", "auto")
    assert chosen.dtype == torch.bfloat16 and chosen.autocast and "by autocast" in chosen.reason
    with torch.no_grad():
        assert in_precision(network, torch.bfloat16)(window).dtype == torch.bfloat16
        torch.testing.assert_close(in_precision(network, torch.float32)(window), unet(window))


def test_without_the_hardware_nothing_is_tried(monkeypatch):
    def network(window):
        raise AssertionError("the network must not run")

    for name in CPU_FEATURES:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    chosen = choose_precision(network, noise(1, 1, 4, 4, 4), "cpu", "auto")
    assert chosen.dtype == torch.float32 and "neither AMX nor AVX512-BF16" in chosen.reason
    for name in CPU_FEATURES:  # PyTorch may drop its private names
        monkeypatch.delattr(torch.cpu, name)
    assert choose_precision(network, noise(1, 1, 4, 4, 4), "cpu", "auto") == chosen
    assert choose_precision(network, noise(1, 1, 4, 4, 4), "cpu", "fp32").dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wanted", ["auto", "fp16"])
def test_on_a_gpu(unet, wanted):
    network = copy.deepcopy(unet).cuda()
    chosen = choose_precision(network, smooth(1, 1, 24, 24, 24), "cuda", wanted)
    if wanted == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False):
        assert chosen.dtype == (torch.float16 if wanted == "fp16" else torch.bfloat16)
        assert chosen.agreement.labels >= 0.99
    else:
        assert chosen.dtype == torch.float32


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("half", "precision must be one of auto, fp32, bf16, fp16, got 'half'"),
        ("fp16", "precision 'fp16' needs a GPU"),
    ],
)
def test_impossible_wishes(unet, wanted, message):
    with pytest.raises(ValueError, match=message):
        choose_precision(unet, noise(1, 1, 8, 8, 8), "cpu", wanted)


@pytest.mark.usefixtures("has_bfloat16")
def test_the_first_of_several_outputs_is_judged(unet):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = unet

        def forward(self, x):
            return {"logits": (self.network(x), None), "other": x}

    window = smooth(1, 1, 24, 24, 24)
    assert choose_precision(Several(), window).agreement == choose_precision(unet, window).agreement
    with pytest.raises(ValueError, match="judged by a tensor of logits, but the network returns str"):
        choose_precision(lambda x: "logits", window)


@pytest.mark.usefixtures("has_bfloat16")
def test_a_network_that_writes_into_its_input_does_no_harm():
    class Writes(Head):
        def forward(self, x):
            return super().forward(x.add_(3.0))

    window = noise(1, 1, 8, 8, 8)
    before = window.clone()
    assert choose_precision(Writes().eval(), window).dtype == torch.bfloat16
    assert torch.equal(window, before)


# The network in it


def test_the_callers_network_stays_as_it_is(unet):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    addresses = {key: value.data_ptr() for key, value in unet.state_dict().items()}
    network = in_precision(unet, torch.bfloat16)
    with torch.no_grad():
        assert network(noise(1, 1, 8, 8, 8)).dtype == torch.bfloat16
    after = unet.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert {key: value.data_ptr() for key, value in after.items()} == addresses
    assert all(parameter.requires_grad for parameter in unet.parameters())
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert not network.training


def test_weights_are_cast_once_and_tied_weights_stay_tied():
    network = nn.Sequential(nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.BatchNorm3d(2)).eval()
    network[1].weight = network[0].weight
    cast = in_precision(network, torch.bfloat16).network
    assert cast[0].weight is cast[1].weight
    assert cast[2].running_mean.dtype == torch.bfloat16
    assert cast[2].num_batches_tracked.dtype == torch.int64
    assert in_precision(cast, torch.bfloat16).network is cast


def test_float32_costs_nothing(unet):
    assert in_precision(unet, torch.float32) is unet
    half = copy.deepcopy(unet).bfloat16()
    full = in_precision(half, torch.float32)
    assert full(noise(1, 1, 8, 8, 8).bfloat16()).dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_further_arguments_reach_the_network():
    seen = []
    in_precision(lambda *args, **kwargs: seen.append((args[1:], kwargs)), torch.bfloat16)(noise(1, 1, 4), 5, scale=2)
    assert seen == [((5,), {"scale": 2})]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_strategy_gives_float32_and_still_finds_the_head(autocast):
    torch.manual_seed(0)
    unet = build("unet", channels=(4, 8), out_channels=9).eval()
    network, image = in_precision(unet, torch.bfloat16, autocast), smooth(1, 1, 20, 16, 16)
    assert isinstance(network, InPrecision)
    with torch.inference_mode():
        assert split_head(network, image) is not None
        full, low = SubVolumes(8)(image, unet), SubVolumes(8)(image, network)
        labels = SubVolumes(8).label_map(image, network)
    assert low.dtype == torch.float32
    assert (low - full).norm() < 5e-2 * full.norm()
    assert (labels == full.argmax(1, keepdim=True)).float().mean() > 0.97


# The comparison


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(0, 20), st.floats(0.01, 10))
def test_agreement_by_hand(batch, classes, flipped, scale):
    full = nn.functional.one_hot(torch.arange(batch * 20) % classes, classes).float().view(batch, 20, classes)
    full = full.movedim(-1, 1) * scale
    low = full.clone()
    low[0, :, :flipped] = low[0, :, :flipped].roll(1, 0)
    found = agreement(low, full)
    assert found.labels == pytest.approx(1 - flipped / (20 * batch))
    assert found.error == pytest.approx((2 * flipped / (20 * batch)) ** 0.5, rel=1e-5)


def test_agreement_of_a_single_channel_and_of_nothing():
    full = torch.tensor([[[-1.0, 1.0, 2.0, -2.0]]])
    assert agreement(torch.tensor([[[-1.0, -1.0, 2.0, -2.0]]]), full).labels == 0.75
    zeros = torch.zeros(1, 2, 4)
    assert agreement(zeros, zeros).error == 0 and agreement(zeros + 1, zeros).error == float("inf")
    for bad in (float("nan"), float("inf")):
        found = agreement(torch.full((1, 2, 4), bad), zeros)
        assert not found.finite and found.labels == 0


# The window


@pytest.mark.parametrize("shape", [(40, 30, 36), (50, 41)])
def test_the_window_with_tissue_is_found(shape):
    image = torch.zeros(2, 2, *shape)
    corner = tuple(slice(size - 8, size) for size in shape)
    image[(1, slice(None), *corner)] = noise(2, *(8,) * len(shape))
    before = image.clone()
    window = representative_window(image, 8)
    assert torch.equal(window[0], image[(1, slice(None), *corner)])
    window.zero_()
    assert torch.equal(image, before)


def test_a_window_larger_than_the_image_is_padded_on_both_sides():
    image = noise(1, 1, 6, 20, 5)
    window = representative_window(image, (8, None, 8), padding_value=-3.0)
    assert window.shape == (1, 1, 8, 20, 8)
    assert torch.equal(window[:, :, 1:7, :, 1:6], image)
    assert (window == -3).sum() == 8 * 20 * 8 - 6 * 20 * 5


def test_what_is_not_a_number_is_not_preferred():
    image = torch.zeros(1, 1, 30)
    image[..., :10] = float("nan")
    image[..., 20:] = noise(10)
    assert torch.equal(representative_window(image, 10)[0, 0], image[0, 0, 20:])


def test_a_meta_tensor_gives_a_plain_window():
    from monai.data import MetaTensor

    assert type(representative_window(MetaTensor(noise(1, 1, 9, 9, 9)), 4)) is torch.Tensor


def test_a_roi_for_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"roi_size \(4, 4\) is for 2 spatial axes, but the image has 3"):
        representative_window(noise(1, 1, 9, 9, 9), (4, 4))
