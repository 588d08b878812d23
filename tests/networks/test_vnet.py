"""V-Net: sizes, and what each argument changes. The numbers themselves are held by tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg3d.networks import VNet

DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


def on_meta(**arguments):
    with torch.device("meta"):
        return VNet(**arguments)


def dropouts(network):
    return {name: (type(m), m.p) for name, m in network.named_modules() if isinstance(m, DROPOUTS)}


@pytest.mark.parametrize(
    ("arguments", "count", "state"),
    [
        ({}, 45_593_892, 150),
        ({"out_channels": 2}, 45_597_898, 150),
        ({"in_channels": 2, "out_channels": 3}, 45_603_906, 150),
        ({"out_channels": 2, "act": "prelu", "bias": True}, 45_603_070, 196),
        ({"spatial_dims": 2, "out_channels": 3}, 9_359_538, 150),
    ],
)
def test_parameters_and_state(arguments, count, state):
    network = on_meta(**arguments)
    assert sum(p.numel() for p in network.parameters()) == count
    assert len(network.state_dict()) == state


def test_the_papers_volume_on_the_meta_device():
    network = on_meta(out_channels=2)
    assert network(torch.empty(1, 1, 128, 128, 64, device="meta")).shape == (1, 2, 128, 128, 64)


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
