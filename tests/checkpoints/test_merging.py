"""The order of patch merging, which no key tells: weights of older releases come out right, or do not load."""

from __future__ import annotations

import pytest
import torch
from monai.networks import nets

from medseg3d.checkpoints import CheckpointMismatch, load_checkpoint, save_checkpoint
from medseg3d.checkpoints.merging import mergings, settle_order
from medseg3d.layers.patches import PatchMerging
from medseg3d.networks.backbones.swin import SwinTransformer
from tests.checkpoints.conftest import assert_same, copy_of, filled, swin
from tests.parity.golden import GoldenModel


def monai_swin(**arguments):
    return nets.SwinUNETR(**{"in_channels": 1, "out_channels": 2, "feature_size": 12, **arguments}).eval()


@pytest.fixture
def public_file(write):
    """Weights in MONAI's keys, with nothing that says which release trained them."""
    return write({"state_dict": filled(monai_swin()).state_dict()}, "swin_unetr.pt")


def test_the_keys_that_weights_fill_are_gone_through_once():
    class Keys(dict):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    network = swin()
    keys = Keys(network.state_dict())
    assert len(mergings(network)) > 1 and settle_order(network, keys, {}, "auto", None).name == "legacy"
    assert keys.passes == 1


def test_weights_that_monai_loads_silently_wrong_come_out_right(write, shared):
    """The stored output is that of MONAI 0.9 to 1.4; MONAI from 1.5 on gives another with the same file."""
    golden = GoldenModel(shared("golden", "3d", "models"), "swin_f12_legacy")
    theirs = golden.prepare(monai_swin())
    file = write({"state_dict": theirs.state_dict()})
    ours = swin()
    assert ours.merging_order == "merging"
    report = load_checkpoint(ours, file)
    with torch.no_grad():
        golden.check_output("y", ours(golden.input()))
        with pytest.raises(AssertionError):
            golden.check_output("y", theirs(golden.input()))
    assert (report.merging_order, ours.merging_order) == ("legacy", "legacy")
    assert 'patch merging order "legacy"' in str(report)
    assert "if MONAI 1.5 or later trained these weights, pass merging_order='merging'" in str(report)


def test_weights_of_monai_1_5_come_out_right_when_told(write, shared):
    golden = GoldenModel(shared("golden", "3d", "models"), "swin_f12_merging")
    file = write(golden.prepare(monai_swin()).state_dict())
    ours = swin(downsample="legacy")
    load_checkpoint(ours, file, monai_version="1.5.0")
    assert ours.merging_order == "merging"
    with torch.no_grad():
        golden.check_output("y", ours(golden.input()))


@pytest.mark.parametrize(
    ("built", "told", "order", "reason"),
    [
        ("merging", {}, "legacy", "the file does not tell"),
        ("legacy", {}, "legacy", "the file does not tell"),
        ("mergingv2", {}, "mergingv2", "as the network was built"),
        ("merging", {"merging_order": "merging"}, "merging", "as asked"),
        ("mergingv2", {"merging_order": "legacy"}, "legacy", "as asked"),
        ("merging", {"monai_version": "1.4.0"}, "legacy", "that of MONAI 1.4"),
        ("legacy", {"monai_version": "1.5.1"}, "merging", "that of MONAI 1.5"),
        ("legacy", {"monai_version": "2.0"}, "merging", "that of MONAI 2.0"),
        ("mergingv2", {"monai_version": "1.3.2"}, "mergingv2", "as the network was built"),
        ("merging", {"monai_version": "1.5", "merging_order": "legacy"}, "legacy", "as asked"),
    ],
)
def test_what_is_known_decides(public_file, caplog, built, told, order, reason):
    network = swin(downsample=built)
    report = load_checkpoint(network, public_file, **told)
    assert network.merging_order == report.merging_order == order
    assert any(f'patch merging order "{order}": {reason}' in note for note in report.notes)
    assert bool(caplog.records) == (not told)  # a guess is a warning, knowledge is not


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("order", ["legacy", "merging", "mergingv2"])
def test_own_files_record_it(tmp_path, order, suffix):
    path = save_checkpoint(filled(swin(downsample=order)), tmp_path / f"weights.{suffix}")
    network = swin()
    report = load_checkpoint(network, path, monai_version="1.2")
    assert network.merging_order == order
    assert f'patch merging order "{order}": as the file records' in report.notes
    report = load_checkpoint(network, path, merging_order="mergingv2")
    assert network.merging_order == "mergingv2"
    assert (f"though the file records {order!r}" in str(report)) == (order != "mergingv2")


def test_a_plain_state_dict_may_carry_it(write):
    """In the metadata that PyTorch keeps beside every state_dict and that torch.save and MONAI's handlers store."""
    state = filled(swin()).state_dict()
    for path, local in state._metadata.items():
        if path.endswith("downsample"):
            local["merging_order"] = "merging"
    network = swin(downsample="legacy")
    report = load_checkpoint(network, write({"network": state}))
    assert network.merging_order == "merging" and "as the file records" in str(report)


def test_every_network_with_swin_s_encoder_is_set(public_file):
    encoder = SwinTransformer(1, 12, 7, 2, (2, 2, 2, 2), (3, 6, 12, 24))
    load_checkpoint(encoder, public_file)
    holder = torch.nn.ModuleDict({"net": torch.compile(swin())})
    assert load_checkpoint(holder, public_file).merging_order == "legacy"
    orders = [layer.order for part in (encoder, holder) for layer in part.modules() if isinstance(layer, PatchMerging)]
    assert orders == ["legacy"] * 8


@pytest.mark.parametrize("wish", ["auto", "legacy", "mergingv2"])
def test_monai_s_network_refuses_what_it_would_get_wrong(public_file, wish):
    network = monai_swin()
    before = copy_of(network)
    with pytest.raises(
        CheckpointMismatch, match=r"PatchMerging of this SwinUNETR merges them in the order 'merging'"
    ) as caught:
        load_checkpoint(network, public_file, merging_order=wish)
    assert "medseg3d.networks.SwinUNETR" in str(caught.value)
    assert caught.value.report.matched
    assert_same(network.state_dict(), before)


def test_monai_s_network_takes_what_it_gets_right(public_file, tmp_path):
    network = monai_swin()
    assert load_checkpoint(network, public_file, merging_order="merging").merging_order == "merging"
    assert load_checkpoint(network, public_file, monai_version="1.5").complete
    own = save_checkpoint(network, tmp_path / "own.pt")  # MONAI's class, whose order is known
    ours = swin()
    load_checkpoint(ours, own)
    assert ours.merging_order == "merging"
    v2 = monai_swin(downsample="mergingv2")
    assert load_checkpoint(v2, public_file).merging_order == "mergingv2"
    with pytest.raises(CheckpointMismatch, match="need patches merged in the order 'merging'"):
        load_checkpoint(v2, own)


def test_a_merging_of_unknown_order_needs_the_caller_s_word(public_file):
    class Unknown(nets.swin_unetr.PatchMerging):
        pass

    network = monai_swin(downsample=Unknown)
    with pytest.raises(CheckpointMismatch, match="in the order 'unknown'"):
        load_checkpoint(network, public_file)
    assert load_checkpoint(network, public_file, merging_order="legacy").complete


def test_in_2d_there_is_one_order_and_nothing_to_say(write):
    file = write(filled(monai_swin(spatial_dims=2)).state_dict())
    for network in (swin(spatial_dims=2), monai_swin(spatial_dims=2)):
        report = load_checkpoint(network, file)
        assert report.merging_order is None and not report.notes


def test_an_encoder_that_is_skipped_keeps_its_order(public_file):
    network = swin()
    load_checkpoint(network, public_file, skip=("swinViT.",))
    assert network.merging_order == "merging"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"merging_order": "old"}, "merging_order must be 'auto' or one of legacy, merging, mergingv2, got 'old'"),
        ({"monai_version": "new"}, "monai_version must be a release such as '1.3.2', got 'new'"),
    ],
)
def test_unknown_orders_and_versions(public_file, told, words):
    network = swin()
    before = copy_of(network)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(network, public_file, **told)
    assert_same(network.state_dict(), before)


def test_mergingv2_of_monai_0_9_was_another(public_file):
    with pytest.raises(CheckpointMismatch, match=r"MONAI 0\.9 had another 'mergingv2'"):
        load_checkpoint(swin(downsample="mergingv2"), public_file, monai_version="0.9.1")


def test_an_order_of_a_later_release_is_refused(write):
    state = filled(swin()).state_dict()
    with pytest.raises(CheckpointMismatch, match="the file records 'mergingv3'"):
        load_checkpoint(swin(), write({"state_dict": state, "medseg3d": {"format": 1, "merging_order": "mergingv3"}}))
