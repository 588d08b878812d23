"""U-Net against the figures of its two papers; on the meta device, where neither weights nor voxels exist."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from medseg3d.layers.convolution import centre_crop
from medseg3d.layers.layout import channels_last
from medseg3d.networks import UNet, cicek_unet, ronneberger_unet


def on_meta(builder, *arguments, **keywords):
    with torch.device("meta"):
        return builder(*arguments, **keywords)


def output_shape(network, *shape):
    return tuple(network(torch.empty(shape, device="meta")).shape)


def parameters(network, norms=True):
    own = [p for m in network.modules() for p in m.parameters(recurse=False) if norms or not _is_norm(m)]
    return sum(p.numel() for p in own)


def _is_norm(module):
    return isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)


def conv(kernel, inputs, outputs, bias=True):
    return kernel * inputs * outputs + bias * outputs


def test_ronneberger_figure_1():
    network = on_meta(ronneberger_unet, padding="valid")
    assert output_shape(network, 1, 1, 572, 572) == (1, 2, 388, 388)
    down = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 1024)]
    down.append((1024, 1024))
    up = [(1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64)]
    upconvs = [(1024, 512), (512, 256), (256, 128), (128, 64)]
    expected = sum(conv(9, *io) for io in down + up) + sum(conv(4, *io) for io in upconvs) + conv(1, 64, 2)
    assert expected == 31_030_658
    assert parameters(network) == expected
    assert sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in network.modules()) == 23  # section 2


def test_stored_sizes_and_parameters_of_ronneberger_s_network(shared):
    stored = json.loads(shared("golden", "2d", "equations", "unet_sizes.json").read_text())
    network = on_meta(ronneberger_unet, padding="valid")
    counts = {io: parameters(on_meta(ronneberger_unet, *map(int, io.split("->")))) for io in stored["n_params_by_io"]}
    sizes = {str(n): size for n in range(180, 1021) if (size := network.output_size(n)) is not None}
    assert sizes == stored["valid_sizes_in_out"]
    assert counts == stored["n_params_by_io"] and counts["1->2"] == stored["n_params_paper_layout"]


def test_cicek_figure_2():
    network = on_meta(cicek_unet, padding="valid")
    assert output_shape(network, 1, 3, 132, 132, 116) == (1, 3, 44, 44, 28)
    down = [(3, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    up = [(256 + 512, 256), (256, 256), (128 + 256, 128), (128, 128), (64 + 128, 64), (64, 64)]
    upconvs = [(512, 512), (256, 256), (128, 128)]
    expected = sum(conv(27, *io) for io in down + up) + sum(conv(8, *io, bias=False) for io in upconvs) + conv(1, 64, 3)
    assert expected == 19_069_955  # the paper's number, which leaves the scale and shift of batch norm out
    assert parameters(network, norms=False) == expected


def test_cicek_network_with_padding():
    """Against the paper's: one channel in, two out, and batch norm's scale and shift counted."""
    network = on_meta(cicek_unet, in_channels=1, out_channels=2)
    widths = (32, 64, 64, 128, 128, 256, 256, 512, 256, 256, 128, 128, 64, 64)
    assert parameters(network) == 19_069_955 - 27 * 2 * 32 - (64 + 1) + 2 * sum(widths) == 19_072_834
    assert output_shape(network, 1, 1, 128, 128, 64) == (1, 2, 128, 128, 64)
    assert parameters(on_meta(cicek_unet, 1, 2, upconv_bias=True)) == 19_073_730


def test_overrides_reach_the_network():
    assert parameters(on_meta(ronneberger_unet, channels=(8, 16), dropout=0.0)) < 10_000
    assert not any(_is_norm(m) for m in on_meta(cicek_unet, norm=None).modules())


@pytest.mark.parametrize(
    ("strides", "good", "bad", "next_good"),
    [
        ([(1, 2, 2), (1, 2, 2)], (5, 8, 12), (5, 9, 12), (5, 12, 12)),
        ([(1, 2, 2), (2, 2, 2)], (6, 8, 4), (3, 8, 4), (4, 8, 4)),
        ([(2, 1, 1), (4, 3, 1)], (16, 9, 7), (9, 8, 7), (16, 9, 7)),
        ([3, 2], (6, 12, 18), (6, 8, 18), (6, 12, 18)),
    ],
)
def test_strides_that_differ_by_axis(strides, good, bad, next_good):
    network = on_meta(UNet, channels=(4, 8, 16), strides=strides)
    assert output_shape(network, 2, 1, *good) == (2, 2, *good)
    with pytest.raises(ValueError, match="the next size that it takes is") as error:
        output_shape(network, 1, 1, *bad)
    assert str(next_good) in str(error.value)


def test_output_size_is_what_forward_gives():
    network = on_meta(UNet, 2, channels=(4, 4, 4), strides=[2, (3, 2)], padding="valid")
    sizes = [(size, network.output_size(size, axis=0)) for size in range(1, 120)]
    taken = [(size, out) for size, out in sizes if out is not None]
    assert len(taken) >= 8
    other = next(size for size in range(1, 120) if network.output_size(size, axis=1))
    for size, out in taken:
        assert output_shape(network, 1, 1, size, other) == (1, 2, out, network.output_size(other, axis=1))
    for size in sorted(set(range(1, 120)) - {size for size, _ in taken}):
        with pytest.raises(ValueError, match="valid convolutions cannot take"):
            output_shape(network, 1, 1, size, other)


def test_centre_crop_drops_the_extra_voxel_at_the_end():
    x = torch.arange(7.0).expand(1, 1, 5, 7)
    assert centre_crop(x, torch.empty(1, 3, 5, 4))[0, 0, 0].tolist() == [1, 2, 3, 4]
    assert centre_crop(x, x) is x


def test_valid_convolutions_see_what_padded_ones_see_in_the_middle():
    """Far from the border both forms compute the same: the skips are cropped in register."""
    torch.manual_seed(0)
    padded = UNet(2, 1, 2, channels=(4, 8), norm=None).eval()
    valid = UNet(2, 1, 2, channels=(4, 8), norm=None, padding="valid").eval()
    valid.load_state_dict(padded.state_dict())
    x = torch.randn(1, 1, 40, 44)
    with torch.no_grad():
        inner = valid(x)
        full = padded(x)
    offset = (40 - inner.shape[2]) // 2
    assert (44 - inner.shape[3]) // 2 == offset
    cropped = full[..., offset : offset + inner.shape[2], offset : offset + inner.shape[3]]
    torch.testing.assert_close(inner, cropped, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    network = UNet(2, channels=(4, 8), norm=None, dropout=0.9)
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert not torch.equal(network.train()(x), network.train()(x))
        assert torch.equal(network.eval()(x), network.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": (8,)}, "channels needs two or more levels and strides one entry fewer, got 1 and 0"),
        ({"channels": (8, 8), "strides": (2, 2)}, "got 2 and 2"),
        ({"padding": "full"}, "padding must be 'same' or 'valid', got 'full'"),
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"strides": [2, 2, (2, 2)]}, r"strides needs one number for each of 3 axes, got \(2, 2\)"),
        ({"norm": "layer"}, "norm must be None, 'batch', 'instance' or 'group', got 'layer'"),
        ({"act": "step"}, "activation must be one of elu, gelu, leakyrelu, prelu, relu, got 'step'"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta(UNet, **arguments)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_checkpointing_changes_no_gradient_and_counts_a_batch_once(norm):
    arguments = {"spatial_dims": 2, "channels": (4, 8), "norm": (norm, {"num_groups": 2} if norm == "group" else {})}
    torch.manual_seed(0)
    plain, saving = UNet(**arguments).train(), UNet(**arguments, use_checkpoint=True).train()
    saving.load_state_dict(plain.state_dict())
    calls = []
    saving.decoder[0][0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 1, 16, 16)
    for network in (plain, saving):
        network(x).square().mean().backward()
    assert len(calls) == 2  # once more in the backward pass
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, ours), theirs in zip(saving.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    with torch.no_grad():
        assert torch.equal(saving.eval()(x), plain.eval()(x)) and len(calls) == 3


@pytest.mark.parametrize("norm", [None, "batch", "instance", "group"])
@pytest.mark.parametrize("act", ["relu", "leakyrelu", "elu"])
def test_without_gradients_the_result_is_the_same_and_the_input_too(norm, act):
    torch.manual_seed(0)
    network = UNet(3, 1, 2, (8, 16), norm=norm, act=act).eval()
    x = channels_last(torch.randn(2, 1, 8, 12, 16))
    before, with_gradients = x.clone(), network(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(network(x), with_gradients, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


def test_a_million_voxels_cost_group_norm_no_digits():
    torch.manual_seed(0)
    network = UNet(3, 1, 2, (8, 16), norm="group", act="leakyrelu").eval()
    x = torch.randn(1, 1, 64, 128, 128) + 3
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(x.double())
        ours = network(channels_last(x))
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()  # PyTorch's own sums: 1e-4
