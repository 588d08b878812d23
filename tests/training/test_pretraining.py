"""Self-supervised steps: what the network and the loss see, that it learns, and that its encoder starts Swin UNETR."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from medseg3d.checkpoints import load_checkpoint
from medseg3d.losses import PretrainingLoss
from medseg3d.networks import SSLHead, SSLReconstruction, SwinUNETR
from medseg3d.training import PretrainingIteration, PretrainingValidation

SMALL = {"feature_size": 12, "spatial_dims": 2, "window_size": 4}


def network_of(seed=0, **arguments):
    torch.manual_seed(seed)
    return SSLHead(**SMALL, **arguments)


def engine_of(network, loss=None, rate=1e-3):
    return SimpleNamespace(
        state=SimpleNamespace(device="cpu", iteration=1),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=rate),
        loss_function=loss or PretrainingLoss(),
    )


def batch_of(images=2, seed=0):
    """Noisy pictures of which each corner has a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(2, -2, 64)[:, None] + torch.linspace(0.5, -0.5, 64)
    return {"image": ramp + 0.2 * torch.randn(images, 1, 64, 64, generator=generator)}


def test_the_loss_sees_turned_images_and_the_network_cut_ones():
    seen = {}
    network = network_of()
    network.register_forward_pre_hook(lambda module, inputs: seen.update(views=inputs[0]))

    def loss(output, turns, images):
        seen.update(output=output, turns=turns, images=images)
        return PretrainingLoss()(output, turns, images)

    batch = batch_of()
    before = batch["image"].clone()
    torch.manual_seed(4)
    result = PretrainingIteration(share=0.2, dtype=torch.float32)(engine_of(network, loss), batch)
    assert torch.equal(batch["image"], before)
    for i, n in enumerate(seen["turns"].tolist()):  # both first views, then both second ones
        assert torch.equal(torch.rot90(seen["images"][i], -n, (1, 2)), before[i % 2])
    cut = (seen["views"] != seen["images"]).float().mean(dim=(1, 2, 3))
    assert ((cut >= 0.2) & (cut < 0.5)).all()
    assert not torch.equal(*(seen["views"] == seen["images"]).chunk(2))  # each view is cut on its own
    assert [tuple(one.shape) for one in seen["output"]] == [(4, 4), (4, 512), (4, 1, 64, 64)]
    assert result.keys() == {"loss", "rotation", "contrastive", "reconstruction"}
    assert result["loss"].item() == pytest.approx(
        sum(v.item() for name, v in result.items() if name != "loss"), rel=1e-6
    )


def test_validation_is_the_same_every_time_and_changes_nothing():
    network = network_of()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    engine, validation = engine_of(network), PretrainingValidation(PretrainingLoss(), dtype=torch.float32)
    first, again = (validation(engine, batch_of()) for _ in range(2))
    torch.randn(7)
    assert first == again == validation(engine, batch_of())
    engine.state.iteration = 2
    assert validation(engine, batch_of()) != first  # the next batch has other views
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_a_few_steps_learn_all_three_tasks():
    network = network_of()
    engine, step = engine_of(network, rate=5e-3), PretrainingIteration(dtype=torch.float32)
    validation = PretrainingValidation(PretrainingLoss(), dtype=torch.float32)
    before = validation(engine, batch_of(4, seed=99))
    torch.manual_seed(0)
    for n in range(40):
        step(engine, batch_of(4, seed=n))
    after = validation(engine, batch_of(4, seed=99))
    assert after["rotation"] < 0.7 * before["rotation"]
    assert after["reconstruction"] < 0.6 * before["reconstruction"]
    assert after["contrastive"] < before["contrastive"]


def test_a_diverged_step_leaves_the_weights():
    network = network_of()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(RuntimeError, match="the loss became nan at iteration 1"):
        PretrainingIteration()(engine_of(network, PretrainingLoss(rotation=float("nan"))), batch_of())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_one_sub_volume_has_nothing_to_be_told_from():
    with pytest.raises(ValueError, match="use a batch of 2 or more"):
        PretrainingIteration()(engine_of(network_of()), batch_of(1))


@pytest.mark.parametrize("order", ["merging", "legacy"])
def test_the_encoder_starts_swin_unetr(order, tmp_path):
    """Also in the order in which it merged patches, which the file tells."""
    solid = SMALL | {"spatial_dims": 3}  # in 2D there is but one order
    pretrained = SSLHead(**solid, downsample=order)
    torch.save(pretrained.state_dict(), tmp_path / "model.pt")
    network = SwinUNETR(in_channels=1, out_channels=3, **solid)
    head = {key: value.clone() for key, value in network.state_dict().items() if not key.startswith("swinViT.")}
    load_checkpoint(network, tmp_path / "model.pt")
    state = network.state_dict()
    encoder = {key: value for key, value in pretrained.state_dict().items() if key.startswith("swinViT.")}
    assert len(encoder) > 50 and all(torch.equal(state[key], value) for key, value in encoder.items())
    assert all(torch.equal(state[key], value) for key, value in head.items())
    assert network.merging_order == order


def test_the_reconstruction_alone_has_the_keys_and_numbers_of_the_whole():
    whole, alone = network_of().eval(), SSLReconstruction(**SMALL).eval()
    alone.load_state_dict(whole.state_dict(), strict=True)
    x = batch_of(1)["image"]
    with torch.no_grad():
        assert torch.equal(alone(x), whole(x).reconstruction)
    with pytest.raises(ValueError, match="multiples of 32"):
        alone(x[..., :40])
