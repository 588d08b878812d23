"""What does not fit is refused with a report that says what and why, and the network stays as it was."""

from __future__ import annotations

import pytest
import torch
from monai.networks import nets

from medseg3d.checkpoints import CheckpointMismatch, load_checkpoint
from medseg3d.checkpoints.report import percent
from medseg3d.networks.unet import UNet
from tests.checkpoints.conftest import SMALL_UNETR, assert_same, copy_of, filled, swin, unetr


def network(classes=2, channels=1):
    layers = {
        "body": torch.nn.Conv3d(channels, 4, 3),
        "norm": torch.nn.BatchNorm3d(4),
        "out": torch.nn.Conv3d(4, classes, 1),
    }
    return torch.nn.ModuleDict(layers)


@pytest.fixture
def state():
    return copy_of(filled(network()))


def refusal(target, source, **arguments):
    """The error, after a check that the network is as it was."""
    before = copy_of(target)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(target, source, **arguments)
    assert_same(target.state_dict(), before)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_file_with_a_part_missing(state):
    del state["norm.weight"], state["norm.running_mean"]
    error = refusal(network(), state)
    assert error.report.missing == {"norm.weight": "", "norm.running_mean": ""}
    values = sum(tensor.numel() for tensor in network().state_dict().values()) - 1  # the counter does not count
    assert error.report.share == error.report.scope_share == 1 - 8 / values
    assert error.report.used == 1
    assert "94.2 % of its parameters find their values" in str(error) and "where at least 100 % must" in str(error)
    assert "Missing in the file: norm.weight, norm.running_mean" in str(error)


def test_a_file_with_more_than_the_network(state):
    """All of the network finds its values, and yet it is another network."""
    state["second.weight"] = torch.ones(100)
    report = refusal(network(), state).report
    assert report.left_over == {"second.weight": ""}
    assert report.share == 1 and 0.5 < report.used < 0.6


def test_renamed_keys(state):
    error = refusal(network(), {key.replace("body", "corpus"): value for key, value in state.items()})
    assert error.report.missing.keys() == {"body.weight", "body.bias"}
    assert error.report.left_over.keys() == {"corpus.weight", "corpus.bias"}
    assert "Left over in the file: corpus.weight, corpus.bias" in str(error)


def test_a_counter_may_be_missing(state):
    del state["norm.num_batches_tracked"]
    report = load_checkpoint(network(), state)
    assert report.complete and list(report.missing.values()) == ["a counter of training steps"]


def test_below_the_threshold_what_fits_may_be_wanted(state, caplog):
    del state["norm.weight"]
    state["other"] = torch.ones(3)
    target = filled(network(), 8)
    before = copy_of(target)
    share = 1 - 4 / (sum(tensor.numel() for tensor in before.values()) - 1)
    refusal(target, state, threshold=share + 1e-6)
    state.pop("other")
    report = load_checkpoint(target, state, threshold=share)
    assert report.share == share and not report.complete
    assert torch.equal(target["norm"].weight, before["norm.weight"])
    assert torch.equal(target["body"].weight, state["body.weight"])
    assert "missing in the file: norm.weight" in caplog.text


def test_nothing_that_fits_is_always_refused():
    error = refusal(network(), {"a.b.weight": torch.ones(3)}, threshold=0)
    assert "these seem to be weights of another network" in str(error).lower()
    assert "a.b.weight" in str(error) and "body.weight" in str(error)
    assert error.report.matched == [] and error.report.share == 0


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_out_of_range(state, threshold):
    with pytest.raises(ValueError, match="threshold is a part of the parameters, from 0 to 1"):
        load_checkpoint(network(), state, threshold=threshold)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(state, value):
    state["body.weight"][0, 0, 1, 2, 0] = value
    error = refusal(network(), state, threshold=0)
    assert error.report.not_finite == ["body.weight"]
    assert "with NaN, infinity or values beyond the network's number format: body.weight" in str(error).lower().replace(
        "nan", "NaN"
    )


def test_values_are_cast_and_must_fit(state):
    target = network().half()
    load_checkpoint(
        target, {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    )
    assert_same(target.state_dict(), {k: v.half() if v.is_floating_point() else v for k, v in state.items()})
    state["norm.weight"][2] = 1e5
    assert refusal(target, state).report.not_finite == ["norm.weight"]


def test_another_number_of_classes(state):
    error = refusal(network(classes=3), state)
    assert [tuple(mismatch) for mismatch in error.report.mismatched] == [
        ("out.weight", (2, 4, 1, 1, 1), (3, 4, 1, 1, 1)),
        ("out.bias", (2,), (3,)),
    ]
    assert "out.weight is (2, 4, 1, 1, 1) in the file and (3, 4, 1, 1, 1) in the network" in str(error)
    assert 'to train a new head pass skip=("out.",)' in str(error)
    target = filled(network(classes=3), 9)
    head = copy_of(target["out"])
    report = load_checkpoint(target, state, skip=("out.",))
    assert report.scope_share == 1 and report.used == 1 and not report.complete
    assert report.skipped == ["out.weight", "out.bias"]
    assert report.left_over == {"out.weight": "skipped as asked", "out.bias": "skipped as asked"}
    assert_same(target["out"].state_dict(), head)
    assert torch.equal(target["body"].weight, state["body.weight"])
    assert load_checkpoint(network(classes=3), state, skip="out.").skipped == report.skipped


def test_one_part_of_a_whole_file(state):
    target = filled(network(), 9)
    before = copy_of(target)
    report = load_checkpoint(target, state, scope="body.", skip=("out.",))
    assert (report.scope, report.scope_share, report.skipped) == ("body.", 1, [])
    assert_same(target.state_dict(), before | {key: value for key, value in state.items() if key.startswith("body.")})


@pytest.mark.parametrize("arguments", [{"scope": "head."}, {"skip": ("body.", "head.")}])
def test_parts_that_are_not_there(state, arguments):
    with pytest.raises(
        ValueError, match=r"no key of ModuleDict begins with 'head\.'; its keys begin with body\., norm\., out\."
    ):
        load_checkpoint(network(), state, **arguments)


def test_an_encoder_is_not_enough_where_the_whole_is_asked_for():
    encoder = {k: v for k, v in filled(swin()).state_dict().items() if k.startswith("swinViT.")}
    assert refusal(swin(), encoder, scope="").report.missing
    assert load_checkpoint(swin(), encoder).scope == "swinViT."
    del encoder["swinViT.layers2.0.blocks.1.attn.qkv.bias"]
    assert refusal(swin(), encoder).report.missing == {"swinViT.layers2.0.blocks.1.attn.qkv.bias": ""}


def test_a_network_without_memory(state):
    with pytest.raises(ValueError, match="no memory for its weights"):
        load_checkpoint(network().to("meta"), state)


ADVICE = {
    "feature size": (
        swin,
        lambda: swin(feature_size=24),
        "feature_size=12 and in_channels=1, this one has 24 and 1",
    ),
    "channels": (swin, lambda: swin(in_channels=4), "feature_size=12 and in_channels=1, this one has 12 and 4"),
    "window": (
        swin,
        lambda: swin(window_size=6),
        "windows of 7 tokens along each of 3 axes, this one has windows of 6 tokens",
    ),
    "version": (lambda: swin(use_v2=True), swin, "version 2 of Swin UNETR: build the network with use_v2=True"),
    "older": (swin, lambda: swin(use_v2=True), "version 1 of Swin UNETR: build the network with use_v2=False"),
    "dimensions": (swin, lambda: swin(spatial_dims=2), "the file is of a 3D network, this one is 2D"),
    "classes": (swin, lambda: swin(out_channels=5), 'pass skip=("out.",)'),
    "perceptron": (
        lambda: unetr(proj_type="perceptron"),
        unetr,
        'a perceptron patch embedding, the network a conv one: build it with proj_type="perceptron"',
    ),
    "conv": (unetr, lambda: unetr(proj_type="perceptron"), 'build it with proj_type="conv"'),
    "positions": (
        unetr,
        lambda: unetr(img_size=48),
        "is for 8 patches, the network's for 27: build it with the file's img_size, or pass interpolate_positions=True",
    ),
}


@pytest.mark.parametrize(("of_file", "of_network", "advice"), ADVICE.values(), ids=ADVICE)
def test_advice(of_file, of_network, advice):
    error = refusal(of_network(), filled(of_file()).state_dict())
    (text,) = error.report.advice
    assert advice in text and text[1:] in str(error)


OTHERS = {
    "swin": swin,
    "unetr": unetr,
    "unet": lambda: UNet(3, 1, 2, (4, 8)),
    "resnet": lambda: nets.SegResNet(init_filters=8),
}


@pytest.mark.parametrize("of_file", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("of_network", OTHERS.values(), ids=OTHERS)
def test_files_of_another_network(of_file, of_network):
    source, target = filled(of_file()), of_network()
    if type(source) is type(target):
        assert load_checkpoint(target, source.state_dict()).complete
    else:
        report = refusal(target, source.state_dict(), threshold=0.6).report
        assert report.share < 0.2 and "weights of another network" in report.advice[0]


def test_a_shortcut_that_was_used_is_no_harmless_extra():
    """A file with residual blocks into a network without: the unused ones keep the number of channels."""
    source = filled(nets.UNETR(**SMALL_UNETR))
    error = refusal(unetr(res_block=False), source.state_dict())
    assert "decoder5.conv_block.conv3.conv.weight" in [key for key, why in error.report.left_over.items() if not why]


def test_index_tables_are_compared_and_never_loaded():
    state = copy_of(filled(swin()))
    key = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    del state["swinViT.layers1.0.blocks.1.attn.relative_position_index"]
    state[key] = state[key].flip(0)
    target = swin()
    own = target.get_buffer(key).clone()
    report = load_checkpoint(target, state)
    assert torch.equal(target.get_buffer(key), own)
    assert report.complete and "the network makes" in report.left_over[key]
    assert any("numbers the positions in a window otherwise" in note for note in report.notes)


@pytest.mark.parametrize(("img_size", "file_grid"), [((32, 32, 32), None), ((64, 32, 48), (4, 2, 3))])
@pytest.mark.parametrize("theirs", [True, False])
def test_position_tables_are_resized_when_asked(img_size, file_grid, theirs):
    source = filled(unetr(img_size=img_size))
    target = nets.UNETR(**{**SMALL_UNETR, "img_size": 48}) if theirs else unetr(img_size=(48, 32, 64))
    report = load_checkpoint(target, source.state_dict(), interpolate_positions=True, position_grid=file_grid)
    table = target.state_dict()["vit.patch_embedding.position_embeddings"]
    grid, old = (3, 3, 3) if theirs else (3, 2, 4), file_grid or (2, 2, 2)
    stored = source.state_dict()["vit.patch_embedding.position_embeddings"]
    expected = torch.nn.functional.interpolate(stored.unflatten(1, old).movedim(-1, 1), size=grid, mode="trilinear")
    torch.testing.assert_close(table, expected.flatten(2).movedim(1, 2))
    assert report.complete and "position_embeddings was interpolated" in report.notes[0]


def test_a_grid_that_cannot_be_told():
    source, target = filled(unetr(img_size=(64, 32, 48))), unetr()
    before = copy_of(target)
    with pytest.raises(
        ValueError, match="has 24 tokens, which are not those of a regular grid of 3 axes: pass position_grid"
    ):
        load_checkpoint(target, source.state_dict(), interpolate_positions=True)
    assert_same(target.state_dict(), before)


def test_the_summary_is_short(state):
    """One line a matter, parts and not keys."""
    source = filled(swin(use_v2=True)).state_dict()
    report = refusal(swin(), {f"module.{key}": value for key, value in source.items()}).report
    lines = str(report).splitlines()
    assert lines[0].startswith("the given mapping -> SwinUNETR: 159 tensors, 100 % of its parameters; ")
    assert "  renamed: 159, such as module.swinViT.patch_embed.proj.weight -> swinViT.patch_embed.proj.weight" in lines
    assert "  left over in the file: module.swinViT (8)" in lines
    assert len(lines) == 4


def test_a_share_is_never_rounded_up():
    assert [percent(share) for share in (1, 0.99999, 0.5, 0.1234, 0)] == ["100 %", "99.9 %", "50 %", "12.3 %", "0 %"]
