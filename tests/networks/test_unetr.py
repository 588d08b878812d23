"""UNETR: sizes, and what each argument changes. The numbers themselves are held by tests/parity."""

from __future__ import annotations

import io
import warnings

import pytest
import torch

from medseg3d.layers.positions import interpolate_positions
from medseg3d.networks.unetr import UNETR

TINY = {"in_channels": 1, "out_channels": 2, "feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 3}
STAGES = ("encoder1", "encoder2", "encoder3", "encoder4", "decoder5", "decoder4", "decoder3", "decoder2")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(*arguments, **keywords):
    with torch.device("meta"):
        return UNETR(*arguments, **keywords)


@pytest.mark.parametrize(
    ("arguments", "count", "state"),
    [
        ({"in_channels": 1, "out_channels": 14, "img_size": 96}, 92_802_478, 194),
        ({"in_channels": 1, "out_channels": 14, "img_size": 96, "conv_block": False}, 92_470_702, None),
        ({"in_channels": 4, "out_channels": 3, "img_size": 128}, 102_468_147, 194),
    ],
)
def test_parameters_and_state(arguments, count, state):
    network = on_meta(**arguments)
    assert sum(p.numel() for p in network.parameters()) == count
    assert state is None or len(network.state_dict()) == state
    dead = {name: p.numel() for name, p in network.named_parameters() if not p.requires_grad}
    assert sum(dead.values()) == 18_432 and all("norm_cross_attn" in name for name in dead)


def test_skips_are_what_blocks_4_7_and_10_give():
    network = UNETR(**TINY, img_size=(16, 32), spatial_dims=2).eval()
    seen = {}
    for name in ("encoder2", "encoder3", "encoder4", "decoder5"):
        network.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    x = torch.randn(1, 1, 16, 32)
    with torch.no_grad():
        network(x)
        last, states = network.vit(x)
    taken = {"encoder2": states[3], "encoder3": states[6], "encoder4": states[9], "decoder5": last}
    for name, tokens in taken.items():
        assert torch.equal(seen[name], tokens.transpose(1, 2).reshape(1, 24, 1, 2))
        assert seen[name].is_contiguous(memory_format=torch.channels_last)


def test_the_one_size_that_a_fixed_table_takes():
    network = on_meta(**TINY, img_size=(32, 48, 32))
    message = (
        r"inputs of \(32, 48, 32\), got \(32, 32, 17\); the next size that it takes is \(32, 48, 32\): pad the input "
        r"to it, or build the network with interpolate_positions=True, which takes every multiple of \(16, 16, 16\)"
    )
    with pytest.raises(ValueError, match=message):
        network(torch.empty(1, 1, 32, 32, 17, device="meta"))
    with pytest.raises(ValueError, match=r"it takes \(32, 48, 32\) only: cut the input into windows"):
        network(torch.empty(1, 1, 48, 32, 32, device="meta"))  # as many tokens


def test_interpolated_positions_take_every_multiple_of_16():
    network = on_meta(**TINY, img_size=(32, 48, 32), interpolate_positions=True)
    assert network(torch.empty(1, 1, 16, 64, 32, device="meta")).shape == (1, 2, 16, 64, 32)
    with pytest.raises(ValueError, match=r"got \(40, 48, 33\); the next size that it takes is \(48, 48, 48\): pad"):
        network(torch.empty(1, 1, 40, 48, 33, device="meta"))


def test_interpolating_is_the_same_as_building_with_the_interpolated_table():
    arguments = {**TINY, "spatial_dims": 2}
    network = UNETR(**arguments, img_size=(32, 48), interpolate_positions=True).eval()
    state = network.state_dict()
    key = "vit.patch_embedding.position_embeddings"
    state[key] = interpolate_positions(state[key], (2, 3), (3, 2))
    other = UNETR(**arguments, img_size=(48, 32)).eval()
    other.load_state_dict(state)
    x = torch.randn(1, 1, 48, 32)
    with torch.no_grad():
        assert torch.equal(network(x), other(x))
        assert network(torch.randn(1, 1, 32, 48)).shape == (1, 2, 32, 48)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_recomputation_in_training_changes_nothing_but_memory(spatial_dims):
    size = (32, 16, 16)[:spatial_dims]
    arguments = {**TINY, "img_size": size, "spatial_dims": spatial_dims}
    plain, recomputing = UNETR(**arguments), UNETR(**arguments, use_checkpoint=True)
    recomputing.load_state_dict(plain.state_dict())
    x, cotangent = torch.randn(1, 1, *size), torch.randn(1, 2, *size)
    gradients, saved = [], []
    for network in (plain.train(), recomputing.train()):
        bytes_kept = []

        def keep(tensor, bytes_kept=bytes_kept):
            bytes_kept.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = network(x)
        saved.append(sum(bytes_kept))
        (y * cotangent).sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert saved[1] < saved[0] / 4


def test_every_stage_is_recomputed_in_training_only():
    network = UNETR(**TINY, img_size=(32, 16), spatial_dims=2, use_checkpoint=True)
    parts = {name: network.get_submodule(name) for name in STAGES}
    parts.update({f"block {i}": block for i, block in enumerate(network.vit.blocks)})
    counts = dict.fromkeys(parts, 0)
    for name, part in parts.items():
        # Something inside: the part itself is called once.
        inside = next(m for m in part.modules() if not list(m.children()) and list(m.parameters()))
        inside.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    x = torch.randn(1, 1, 32, 16)
    network.train()(x).sum().backward()
    assert counts == dict.fromkeys(parts, 2)
    network.eval()(x).sum().backward()
    assert counts == dict.fromkeys(parts, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": (32, 40, 32)}, r"img_size must be a multiple of 16 along each axis, got \(32, 40, 32\)"),
        ({"img_size": 8}, r"img_size must hold a patch of \(16, 16, 16\), got \(8, 8, 8\)"),
        ({"img_size": (32, 32)}, "img_size needs one number for each of 3 axes"),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads, got 24 and 5"),
        ({"dropout_rate": 1.5}, "dropout_rate must lie between 0 and 1, got 1.5"),
        ({"proj_type": "mlp"}, "proj_type must be 'conv' or 'perceptron', got 'mlp'"),
        ({"save_attn": True}, "save_attn must be False"),
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"norm_name": "layer"}, "norm must be None, 'batch', 'instance' or 'group', got 'layer'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta(**{**TINY, "img_size": 32, **arguments})


# What compiles, traces and exports with the table as it is, tests/networks/test_contract.py holds.


@pytest.fixture
def interpolating():
    """A network that interpolates its positions, an input of two images and the output."""
    network = UNETR(**TINY, img_size=(16, 32, 16), proj_type="perceptron", interpolate_positions=True).eval()
    x = torch.randn(2, 1, 32, 16, 16)
    with torch.no_grad():
        return network, x, network(x)


@pytest.mark.parametrize("gradients", [False, True])
def test_interpolating_compiled_without_a_graph_break(interpolating, gradients):
    network, x, y = interpolating
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(compiled(x).detach(), y, rtol=1e-4, atol=1e-5)


def test_recomputing_compiled_without_a_graph_break():
    torch._dynamo.reset()
    network = UNETR(**TINY, img_size=(32, 16), spatial_dims=2, use_checkpoint=True).train()
    x = torch.randn(1, 1, 32, 16)
    y = torch.compile(network, fullgraph=True, backend="eager")(x)
    y.sum().backward()
    assert network.vit.blocks[0].mlp.linear1.weight.grad.any()
    torch.testing.assert_close(y, network(x), rtol=1e-4, atol=1e-5)


def test_interpolating_traced(interpolating):
    network, x, y = interpolating
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(network, x[:1])
        torch.testing.assert_close(traced(x), y, rtol=1e-4, atol=1e-5)


def test_interpolating_as_onnx(interpolating):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    network, x, y = interpolating
    with torch.no_grad():
        program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    [output] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), y, rtol=1e-4, atol=1e-4)
