"""V-Net: sizes, and what each argument changes. The numbers themselves are held by tests/parity."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medseg3d.networks import VNet
from medseg3d.networks.vnet import _BatchNorm, _normalize, milletari_vnet

STAGES = ("in_tr", "down_tr32", "down_tr64", "down_tr128", "down_tr256", "up_tr256", "up_tr128", "up_tr64", "up_tr32")
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


def on_meta(**arguments):
    with torch.device("meta"):
        return VNet(**arguments)


def count(network):
    return sum(p.numel() for p in network.parameters())


def dropouts(network):
    return {name: (type(m), m.p) for name, m in network.named_modules() if isinstance(m, DROPOUTS)}


@pytest.mark.parametrize(
    ("arguments", "parameters", "state"),
    [
        ({}, 45_593_892, 150),
        ({"out_channels": 2}, 45_597_898, 150),
        ({"in_channels": 2, "out_channels": 3}, 45_603_906, 150),
        ({"out_channels": 2, "act": "prelu", "bias": True}, 45_603_070, 196),
        ({"spatial_dims": 2, "out_channels": 3}, 9_359_538, 150),
    ],
)
def test_parameters_and_state(arguments, parameters, state):
    network = on_meta(**arguments)
    assert count(network) == parameters
    assert len(network.state_dict()) == state


def test_the_papers_volume_on_the_meta_device():
    network = on_meta(out_channels=2)
    assert network(torch.empty(1, 1, 128, 128, 64, device="meta")).shape == (1, 2, 128, 128, 64)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("axes", [2, 3])
def test_in_double_precision_it_gives_the_same_without_gradients(axes, published):
    torch.manual_seed(0)
    network, x = VNet(axes, width=4, published=published).eval(), torch.randn(2, 1, *[16] * axes)
    double, y = copy.deepcopy(network).double(), network(x).detach()
    with torch.no_grad():
        exact = double(x.double())
    torch.testing.assert_close(exact, double(x.double()).detach())
    torch.testing.assert_close(exact.float(), y, rtol=1e-4, atol=1e-4)
    assert exact.dtype == torch.float64


def test_dropout_is_in_the_two_deepest_stages_and_on_every_skip():
    network = on_meta(dropout_prob_down=0.1, dropout_prob_up=(0.2, 0.3))
    skips = {f"up_tr{n}.dropout2": (nn.Dropout3d, 0.3) for n in (256, 128, 64, 32)}
    before_up = {f"up_tr{n}.dropout": (nn.Dropout3d, 0.2) for n in (256, 128)}
    down = {f"down_tr{n}.dropout": (nn.Dropout3d, 0.1) for n in (128, 256)}
    assert dropouts(network) == skips | before_up | down


def test_none_is_no_dropout():
    assert dropouts(on_meta(dropout_prob_down=None, dropout_prob_up=(None, None))) == {}


def test_dropout_of_single_voxels():
    assert {kind for kind, _ in dropouts(on_meta(dropout_dim=1)).values()} == {nn.Dropout}


@pytest.mark.parametrize(("spatial_dims", "dropout_dim"), [(2, 2), (2, 3), (3, 2), (3, 3)])
def test_dropout_of_whole_channels_never_drops_a_whole_image(spatial_dims, dropout_dim):
    torch.manual_seed(0)
    dropout = on_meta(spatial_dims=spatial_dims, dropout_dim=dropout_dim).down_tr256.dropout.train()
    kept = dropout(torch.ones(4, 64, *[3] * spatial_dims)).flatten(2)
    assert set(kept.unique().tolist()) == {0, 2}
    assert (kept == kept[..., :1]).all()  # a channel is kept or dropped as a whole
    shares = (kept[..., 0] > 0).float().mean(dim=1)
    assert ((shares > 0.2) & (shares < 0.8)).all()


def test_prelu_learns_one_slope_a_channel_by_its_bare_name_only():
    slopes = {name: p.numel() for name, p in on_meta(act="prelu").named_parameters() if "act_function" in name}
    assert slopes["in_tr.act_function.weight"] == 16 and slopes["up_tr256.act_function2.weight"] == 256
    single = on_meta(act=("prelu", {"init": 0.1})).in_tr.act_function
    assert single.num_parameters == 1


def test_the_input_is_tiled_and_added_in_the_first_stage():
    torch.manual_seed(0)
    stage = VNet(spatial_dims=2, in_channels=2, act="relu").in_tr.eval()
    nn.init.zeros_(stage.conv_block.conv.weight)
    x = torch.rand(1, 2, 16, 16)
    with torch.no_grad():
        assert torch.equal(stage(x), x.repeat(1, 8, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 3}, "in_channels must divide the width 16: 1, 2, 4, 8 or 16, got 3"),
        ({"in_channels": 0}, "in_channels must divide the width 16"),
        ({"in_channels": 5, "width": 12}, "in_channels must divide the width 12: 1, 2, 3, 4, 6 or 12, got 5"),
        ({"width": 7}, "width must be an even number of 2 or more, got 7"),
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"dropout_dim": 4}, r"dropout_dim must be 1 \(voxels\), 2 or 3 \(whole channels\), got 4"),
        ({"act": "step"}, "activation must be one of"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta(**arguments)


def test_sizes_that_are_no_multiple_of_16():
    message = r"multiples of 16, got \(17, 16, 31\); the next size that it takes is \(32, 16, 32\): pad the input to it"
    with pytest.raises(ValueError, match=message):
        on_meta()(torch.empty(1, 1, 17, 16, 31, device="meta"))


# What each part has, in closed arithmetic: kernel^axes * inputs * outputs weights, biases, slopes of PReLU.
def published_parameters(width, axes, inputs, outputs):
    stem = inputs * width * 5**axes + 2 * width

    def convs(channels, number):  # with biases; slopes between them, and after the sum
        return number * (5**axes * channels**2 + channels) + number * channels

    def down(channels, number):
        return 2**axes * channels * channels // 2 + 2 * channels + convs(channels, number)

    def up(channels_in, channels, number):
        return 2**axes * channels_in * channels // 2 + channels + convs(channels, number)

    w = width
    on_the_way_down = down(2 * w, 2) + down(4 * w, 3) + down(8 * w, 3) + down(16 * w, 3)
    on_the_way_up = up(16 * w, 16 * w, 3) + up(16 * w, 8 * w, 3) + up(8 * w, 4 * w, 2) + up(4 * w, 2 * w, 1)
    head = 2 * w * outputs * 5**axes + 2 * outputs + outputs**2 + outputs
    return stem + on_the_way_down + on_the_way_up + head


@pytest.mark.parametrize(("width", "axes", "inputs", "outputs"), [(16, 3, 1, 2), (8, 3, 4, 3), (16, 2, 1, 5)])
def test_parameters_of_the_published_network(width, axes, inputs, outputs):
    with torch.device("meta"):
        network = milletari_vnet(inputs, outputs, spatial_dims=axes, width=width)
    assert count(network) == published_parameters(width, axes, inputs, outputs)


def test_the_published_network_has_no_norm_no_dropout_and_prelu_alone():
    with torch.device("meta"):
        network = milletari_vnet()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert dropouts(network) == {}
    activations = [m for name, m in network.named_modules() if "act_function" in name]
    kinds = [type(m) for m in activations]
    # One for each convolution and up-convolution but those before a sum, one after each sum, one in the head.
    assert kinds.count(nn.PReLU) == 1 + 8 + 20 - 8 + 8 + 1 and kinds.count(nn.Identity) == 8
    assert all(
        "conv.bias" in name or name.endswith("_conv.bias") or "conv2" in name
        for name, _ in network.named_parameters()
        if name.endswith("bias")
    )


def test_a_published_stage_adds_its_input_before_the_activation():
    torch.manual_seed(0)
    stage = milletari_vnet(spatial_dims=2, width=2).down_tr32.eval()
    for block in stage.ops:
        nn.init.zeros_(block.conv_block.conv.weight)
    nn.init.constant_(stage.ops[-1].conv_block.conv.bias, -1.0)
    x = torch.rand(1, 2, 16, 16)
    with torch.no_grad():
        below = stage.act_function1(stage.down_conv(x))
        assert (below < 0.9).all()
        torch.testing.assert_close(stage(x), 0.25 * (below - 1))  # an ELU or PReLU of -1 alone would be another number


def receptive_fields(network):
    """Of each stage's output in voxels, an up-convolution counted as a convolution of its kernel, as in the paper."""
    field, step = 1, 1
    for name in STAGES:
        for module in getattr(network, name).modules():
            if not isinstance(module, nn.modules.conv._ConvNd):
                continue
            up = isinstance(module, nn.modules.conv._ConvTransposeNd)
            step = step // 2 if up else step
            field += (module.kernel_size[0] - 1) * step
            step *= 1 if up else module.stride[0]
        yield field


def test_receptive_fields_of_the_published_network():
    with torch.device("meta"):
        network = milletari_vnet(width=2)
    assert list(receptive_fields(network)) == [5, 22, 72, 172, 372, 476, 528, 546, 551]


def test_receptive_fields_on_the_way_down_as_the_gradient_sees_them():
    network = milletari_vnet(spatial_dims=2, width=2).double()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)  # nothing cancels
    outputs = {}
    for name in STAGES[:5]:
        getattr(network, name).register_forward_hook(lambda _m, _i, y, name=name: outputs.update({name: y}))
    x = torch.rand(1, 1, 800, 16, dtype=torch.double, requires_grad=True)
    network(x)
    extents = []
    for y in outputs.values():
        (gradient,) = torch.autograd.grad(y[:, :, y.shape[2] // 2].sum(), x, retain_graph=True)
        seen = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
        extents.append(int(seen.max() - seen.min()) + 1)
    assert extents == [5, 22, 72, 172, 372]


def test_initial_weights_of_the_published_network_keep_the_variance():
    torch.manual_seed(0)
    network = milletari_vnet(spatial_dims=2)
    conv = network.down_tr256.ops[0].conv_block.conv
    assert conv.weight.std().item() == pytest.approx((1 / (256 * 25)) ** 0.5, rel=0.01)
    assert not conv.bias.any()


@pytest.mark.parametrize(("width", "in_channels"), [(8, 1), (12, 3), (2, 2)])
def test_width_scales_every_stage(width, in_channels):
    network = VNet(2, in_channels, 3, width=width).eval()
    shapes = {}
    for name in STAGES:
        getattr(network, name).register_forward_hook(lambda _m, _i, y, name=name: shapes.update({name: y.shape[1]}))
    assert network(torch.rand(1, in_channels, 32, 16)).shape == (1, 3, 32, 16)
    assert list(shapes.values()) == [width * scale for scale in (1, 2, 4, 8, 16, 16, 8, 4, 2)]


def test_half_the_width_is_a_quarter_of_the_parameters():
    assert count(on_meta(width=8)) / count(on_meta()) == pytest.approx(0.25, abs=0.001)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("arguments", [{}, {"act": "prelu"}, {"published": True}], ids=str)
def test_work_in_place_without_gradients_gives_the_same_numbers(spatial_dims, arguments):
    torch.manual_seed(0)
    network = VNet(spatial_dims, 2, 3, width=4, **arguments).eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    x = torch.randn(2, 2, *[32] * spatial_dims)
    with_gradients = network(x)
    assert with_gradients.requires_grad
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(network(x), with_gradients, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), with_gradients, rtol=1e-4, atol=1e-5)


def test_batch_norm_writes_over_its_input_only_where_that_is_safe():
    norm, conv = _BatchNorm(16), nn.Conv3d(1, 16, 1)
    x = torch.randn(1, 16, 4, 4, 4)
    kept = x.clone()
    _normalize(norm.eval(), x, conv)  # with gradients
    with torch.no_grad():
        _normalize(norm.train(), x, conv)
        norm.eval()
        _normalize(norm, x, nn.Identity())
        handle = conv.register_forward_hook(lambda *_: None)
        expected = _normalize(norm, x, conv)
        handle.remove()
        assert torch.equal(x, kept)
        y = _normalize(norm, x, conv)
    assert y.data_ptr() == x.data_ptr() and not torch.equal(x, kept)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(("spatial_dims", "published"), [(2, False), (3, False), (3, True)])
def test_checkpointing_changes_no_gradient_and_counts_a_batch_once(spatial_dims, published):
    torch.manual_seed(0)
    arguments = {"spatial_dims": spatial_dims, "width": 4, "dropout_prob_up": (0.2, 0.2), "published": published}
    plain = VNet(**arguments).train()
    saving = VNet(**arguments, use_checkpoint=True).train()
    saving.load_state_dict(plain.state_dict())
    calls = []
    saving.up_tr32.ops[0].conv_block.conv.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 1, *[32] * spatial_dims)
    for network in (plain, saving):
        torch.manual_seed(1)
        network(x).square().mean().backward()
    assert len(calls) == 2  # once more in the backward pass
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in saving.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, buffer in saving.named_buffers():
        torch.testing.assert_close(buffer, dict(plain.named_buffers())[name], msg=name)


def test_checkpointing_is_for_training_alone_and_survives_a_copy():
    network = copy.deepcopy(VNet(2, width=2, use_checkpoint=True)).eval()
    twin = VNet(2, width=2).eval()
    twin.load_state_dict(network.state_dict())
    x = torch.randn(1, 1, 32, 32)
    calls = []
    network.in_tr.conv_block.register_forward_hook(lambda *_: calls.append(1))
    network(x).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(network(x), twin(x))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_scripted_network_agrees_in_both_modes(spatial_dims, mode):
    torch.manual_seed(0)
    network = VNet(spatial_dims, 1, 2, width=2, dropout_prob_down=None, dropout_prob_up=(None, None))
    scripted = torch.jit.script(copy.deepcopy(network))
    x = torch.randn(2, 1, *[32] * spatial_dims)
    for either in (network, scripted):
        either.train(mode == "train")
    torch.testing.assert_close(scripted(x), network(x), rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(network.buffers(), scripted.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_compiled_training_step_is_one_graph_and_gives_the_same_gradients(use_checkpoint):
    torch._dynamo.reset()
    torch.manual_seed(0)
    no_dropout = {"dropout_prob_down": None, "dropout_prob_up": (None, None)}
    network = VNet(2, width=2, use_checkpoint=use_checkpoint, **no_dropout).train()
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 1, 32, 32)
    for either in (compiled, twin):
        either(x).square().mean().backward()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_published_network_is_exported_and_traced(spatial_dims, tmp_path):
    torch.manual_seed(0)
    network = milletari_vnet(spatial_dims=spatial_dims, width=2).eval()
    x = torch.randn(1, 1, *[32] * spatial_dims)
    with torch.no_grad():
        y = network(x)
        for other in (
            torch.export.export(network, (x,)).module(),
            torch.jit.trace(network, x),
            torch.jit.script(network),
        ):
            torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-5)


def test_activations_stay_channels_last_on_the_way():
    network = VNet(width=4).eval()
    layouts = {}
    for name in STAGES:
        getattr(network, name).register_forward_hook(lambda _m, _i, y, name=name: layouts.update({name: y}))
    with torch.no_grad():
        y = network(torch.randn(1, 1, 32, 32, 32))
    for name, tensor in [*layouts.items(), ("logits", y)]:
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d), name
