"""ViT and its auto-encoder: what each argument changes. The numbers themselves are held by tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg3d.networks.backbones.vit import ViT, ViTAutoEnc

TINY = {"in_channels": 1, "hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(network, **arguments):
    with torch.device("meta"):
        return network(**arguments)


@pytest.mark.parametrize(
    ("network", "count", "state"), [(ViT, 88_359_168, 161), (ViTAutoEnc, 89_146_641, 165)], ids=["ViT", "ViTAutoEnc"]
)
def test_parameters_and_state_of_the_base_size(network, count, state):
    base = on_meta(network, in_channels=1, img_size=96, patch_size=16)
    assert sum(p.numel() for p in base.parameters()) == count
    assert len(base.state_dict()) == state


def test_a_class_token_is_one_more_and_its_output_is_classified():
    network = ViT(**TINY, img_size=(8, 12), patch_size=4, classification=True, num_classes=5, spatial_dims=2).eval()
    with torch.no_grad():
        result, states = network(torch.randn(3, 1, 8, 12))
        expected = network.classification_head(network.norm(states[-1])[:, 0])
    assert result.shape == (3, 5) and result.abs().max() < 1  # a tanh
    assert [tuple(state.shape) for state in states] == [(3, 7, 24)] * 2
    torch.testing.assert_close(result, expected)


def test_any_other_post_activation_is_none():
    plain = {**TINY, "img_size": 8, "patch_size": 4, "classification": True}
    assert isinstance(ViT(**plain, post_activation="none").classification_head, nn.Linear)
    assert isinstance(ViT(**plain).classification_head[1], nn.Tanh)


def test_the_last_hidden_state_is_what_is_normalised():
    network = ViT(**TINY, img_size=8, patch_size=4).eval()
    with torch.no_grad():
        result, states = network(torch.randn(1, 1, 8, 8, 8))
        assert torch.equal(result, network.norm(states[-1]))


@pytest.mark.parametrize("network", [ViT, ViTAutoEnc])
def test_other_sizes_on_request(network):
    arguments = {**TINY, "img_size": (8, 12), "patch_size": 4, "spatial_dims": 2}
    x = torch.randn(2, 1, 16, 4)
    with pytest.raises(ValueError, match=r"inputs of \(8, 12\), got \(16, 4\)"):
        network(**arguments)(x)
    result, states = network(**arguments, interpolate_positions=True)(x)
    assert result.shape == ((2, 4, 24) if network is ViT else (2, 1, 16, 4))
    assert states[0].shape == (2, 4, 24)
    with pytest.raises(ValueError, match=r"the next size that it takes is \(16, 8\)"):
        network(**arguments, interpolate_positions=True)(torch.randn(2, 1, 13, 8))


@pytest.mark.parametrize("network", [ViT, ViTAutoEnc])
def test_recomputation_changes_nothing(network):
    arguments = {**TINY, "img_size": 8, "patch_size": 4}
    plain, recomputing = network(**arguments), network(**arguments, use_checkpoint=True)
    recomputing.load_state_dict(plain.state_dict())
    calls = []
    recomputing.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 1, 8, 8, 8)
    gradients = []
    for model in (plain, recomputing):
        model.train()(x)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (ViT, {"save_attn": True}, "save_attn must be False: the attention is computed without forming its matrix"),
        (ViT, {"dropout_rate": -0.1}, "dropout_rate must lie between 0 and 1, got -0.1"),
        (ViT, {"num_heads": 7}, "hidden_size must be a multiple of num_heads, got 24 and 7"),
        (ViTAutoEnc, {"save_attn": True}, "save_attn must be False"),
        (ViTAutoEnc, {"patch_size": 8}, r"must be square numbers such as 4, 9 and 16, got \(8, 8, 8\)"),
        (ViTAutoEnc, {"img_size": 18}, r"img_size must be a multiple of patch_size \(4, 4, 4\) along each axis"),
    ],
)
def test_arguments_out_of_range(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta(network, **{**TINY, "img_size": 16, "patch_size": 4, **arguments})


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    ("network", "arguments"),
    [(ViT, {}), (ViT, {"classification": True, "proj_type": "perceptron"}), (ViTAutoEnc, {"proj_type": "perceptron"})],
)
def test_scripted(network, arguments, spatial_dims):
    size = (8, 12, 4)[:spatial_dims]
    model = network(**TINY, img_size=size, patch_size=4, spatial_dims=spatial_dims, **arguments).eval()
    x = torch.randn(2, 1, *size)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("network", [ViT, ViTAutoEnc])
def test_exported(network):
    model = network(**TINY, img_size=8, patch_size=4).eval()
    x = torch.randn(2, 1, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
