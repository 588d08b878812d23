"""A head is taken off a network only where nothing can tell."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from medseg3d.inference import SubVolumes
from medseg3d.inference.augmentation import Flips
from medseg3d.inference.averaging import Mean
from medseg3d.inference.downsampled import factored
from medseg3d.inference.ensemble import Ensemble
from medseg3d.inference.grid_map import edge_to_edge
from medseg3d.inference.heads import split_head
from medseg3d.inference.onto_grid import labels_onto
from medseg3d.inference.precision import in_precision
from medseg3d.inference.slabs import Slab
from medseg3d.inference.uncertainty import label_map_with_uncertainty


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Headed(nn.Module):
    def __init__(self, features=4, classes=9):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv3d(1, features, 3, padding=1)
        self.head = nn.Conv3d(features, classes, 1)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


class Indexes(Headed):
    def forward(self, x):
        y = super().forward(x)
        return torch.stack([y[:, k] for k in range(9)], 1)


class Asserts(Headed):
    def forward(self, x):
        y = super().forward(x)
        assert y.shape[1] == 9
        return y


class Scaled(Headed):
    def forward(self, x):
        return super().forward(x) * (1 + x)


class Clamped(Headed):
    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


class Locked(Headed):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_head_is_found():
    network, window = Headed().eval(), noise(1, 1, 6, 6, 6)
    with torch.no_grad():
        body, head = split_head(network, window)
        torch.testing.assert_close(head(body(window)[0].flatten(1)), network(window)[0].flatten(1))
    assert body.body.weight is network.body.weight and type(network.head) is nn.Conv3d


class MadeBefore(Headed):
    """After the head layers were made that run before it, or not at all."""

    def __init__(self):
        super().__init__()
        self.expand, self.shrink = nn.Conv3d(4, 12, 1), nn.Conv3d(12, 4, 1)
        self.auxiliary = nn.Conv3d(4, 9, 3, padding=1)

    def forward(self, x):
        return self.head(self.shrink(self.expand(self.body(x))))


def test_a_head_is_found_by_its_classes_wherever_it_was_made():
    network, image = MadeBefore().eval(), noise(1, 1, 9, 9, 9)
    with torch.no_grad():
        body, head = split_head(network, image)
        assert body.head is not network.head and len(head.weight) == 9
        logits = network(image)[0]
        values, again = factored(logits, network)
        assert len(values) == 4
        torch.testing.assert_close(again(values.flatten(1)), logits.flatten(1))


def test_a_network_whose_head_widens_nothing_is_neither_copied_nor_run_often(monkeypatch):
    """Though its first layers widen: such as the residual connection at a SwinUNETR's entry."""

    class Entry(Headed):
        def __init__(self):
            super().__init__(16, 8)
            self.residual = nn.Conv3d(1, 16, 1)

        def forward(self, x):
            runs.append(tuple(x.shape[2:]))
            return self.head(self.body(x) + self.residual(x))

    runs, copied = [], []
    monkeypatch.setattr("medseg3d.inference.heads._without", lambda *given: copied.append(given))
    with torch.no_grad():
        assert split_head(Entry().eval(), noise(1, 1, 40, 40, 40)) is None
    assert runs == [(32, 32, 32)] and not copied


@pytest.mark.parametrize("network", [Indexes(), Asserts(), Scaled(), Clamped(), Locked(), Headed(9, 4)])
def test_what_is_no_head_stays(network):
    """Also where the image begins with air, in which much cannot be told apart."""
    image = noise(1, 1, 24, 9, 9) * 5
    image[:, :, :8] = 0
    network.eval()
    strategy = SubVolumes(6, 0.5)
    with torch.no_grad():
        assert all(slab.head is None for slab in strategy.slabs(image, network))
        assert torch.equal(strategy.label_map(image, network), strategy(image, network).argmax(1, keepdim=True))


@pytest.mark.parametrize("made_of", [lambda one: one, lambda one: Flips(one, (0,)), lambda one: Ensemble([one])])
@pytest.mark.parametrize("part", ["", "head", "body"])
def test_a_hook_sees_the_logits_that_it_would_see_without_a_strategy(part, made_of):
    network, image, shapes = Headed().eval(), noise(1, 1, 14, 9, 8), []
    whole = made_of(network)
    hooked = network.get_submodule(part) if part else whole
    hooked.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape)))
    strategy = SubVolumes(6, 0.5)
    with torch.no_grad():
        labels = strategy.label_map(image, whole)
        assert set(shapes) == {(1, 4 if part == "body" else 9, 6, 6, 6)}
        assert len(shapes) == strategy.count(image.shape[2:]) * (2 if part and isinstance(whole, Flips) else 1)
        hooked._forward_hooks.clear()
        assert torch.equal(labels, strategy(image, whole).argmax(1, keepdim=True))


@pytest.mark.parametrize("classes", [4, 9])
def test_labels_where_gradients_are_on(classes):
    labels = SubVolumes(6).label_map(noise(1, 1, 8, 8, 8), Headed(5, classes).eval())
    assert not labels.requires_grad


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_blocks_are_parts_of_the_slab(axis, last, monkeypatch):
    monkeypatch.setattr("medseg3d.inference.slabs.BLOCK", 100)
    full = noise(20, 21, 22, 5).movedim(-1, 0) if last else noise(5, 20, 21, 22)
    slab = Slab(axis, 3, full.narrow(1 + axis, 3, 7))
    together = torch.cat([logits for _, logits in slab.blocks()], 1)
    assert torch.equal(together, slab.values.flatten(1))
    assert max(logits.shape[1] for _, logits in slab.blocks()) <= 100
    assert torch.equal(slab.labels().long(), slab.values.argmax(0))


# Networks that are made of others


def headed(seed=0, features=3, classes=13):
    torch.manual_seed(seed)
    network = Headed(features, classes).eval()
    nn.init.normal_(network.head.weight, std=2, generator=torch.Generator().manual_seed(seed))
    return network.requires_grad_(False)


def opaque(network):
    """The same, but nobody can see its layers."""
    return lambda window: network(window)


PAIRS = [(4, 10), (6, 11)]
FLIPS = {
    "one axis": ({"axes": (0,), "pairs": PAIRS}, 6),
    "no pairs": ({"axes": (0, 1)}, 3),
    "pairs that no mirror exchanges": ({"axes": (1, 2), "pairs": PAIRS}, 3),
    "three axes at once": ({"axes": (0, 1, 2), "pairs": PAIRS, "laterality_axis": 1, "batched": True}, 6),
}


@pytest.mark.parametrize("name", FLIPS)
def test_mirror_images_blend_features_and_give_the_mean_of_logits(name):
    options, channels = FLIPS[name]
    network, image, strategy = headed(), noise(1, 1, 14, 9, 8), SubVolumes(6, 0.5, batch_size=3)
    slabs = list(strategy.slabs(image, Flips(network, **options)))
    assert all(len(slab.values) == channels and slab.head.linear for slab in slabs)
    seen = Flips(opaque(network), **options)
    expected = strategy(image, seen)
    assert all(slab.head is None for slab in strategy.slabs(image, seen))
    found = torch.cat([slab.logits() for slab in strategy.slabs(image, Flips(network, **options))], 1 + slabs[0].axis)
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(strategy(image, Flips(network, **options)), expected)
    assert torch.equal(strategy.label_map(image, Flips(network, **options)), expected.argmax(1, keepdim=True))


def test_exchanged_sides_are_not_lost_in_features():
    """With and without pairs the features are the same, the labels are not."""
    network, image, strategy = headed(), noise(1, 1, 14, 9, 8), SubVolumes(6, 0.5)
    labels = [strategy.label_map(image, Flips(network, (0,), pairs)) for pairs in ([], PAIRS)]
    assert not torch.equal(*labels)


@pytest.mark.parametrize("weights", [None, (3, 1)])
def test_an_ensemble_blends_features_and_gives_the_mean_of_logits(weights):
    networks, image, strategy = [headed(0), headed(1, features=4)], noise(1, 1, 14, 9, 8), SubVolumes(6, 0.5)
    ensemble = Ensemble(networks, weights, "logits")
    assert all(len(slab.values) == 7 for slab in strategy.slabs(image, ensemble))
    shares = weights or (1, 1)
    expected = sum(w * strategy(image, one) for w, one in zip(shares, networks, strict=True)) / sum(shares)
    found = torch.cat([slab.logits() for slab in strategy.slabs(image, ensemble)], 1)
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(strategy.label_map(image, ensemble), expected.argmax(1, keepdim=True))


@pytest.mark.parametrize("kind", ["flips", "ensemble"])
def test_probabilities_are_averaged_after_blending(kind):
    """Each pass over the whole image by itself, then the mean of their probabilities: labels, logits, uncertainty."""
    image, strategy = noise(2, 1, 14, 9, 8), SubVolumes(6, 0.5)
    mean = Mean("probabilities")
    if kind == "flips":
        one = headed()
        network = Flips(one, (0,), PAIRS, average="probabilities")
        order = [0, 1, 2, 3, 10, 5, 11, 7, 8, 9, 4, 6, 12]
        mean.add(strategy(image, one))
        mean.add(strategy(image, lambda window: one(window.flip(2)).flip(2)[:, order]))
    else:
        members = [headed(0), headed(1)]
        network = Ensemble(members, (2, 1))
        for weight, member in zip((2, 1), members, strict=True):
            mean.add(strategy(image, member), weight)
    expected = mean.result()
    assert all(len(slab.values) == 6 for slab in strategy.slabs(image[:1], network))
    torch.testing.assert_close(strategy(image, network), expected, rtol=1e-4, atol=1e-4)
    labels, entropy = label_map_with_uncertainty(strategy, image, network, dtype=torch.float32)
    assert torch.equal(labels, expected.argmax(1, keepdim=True))
    shares = expected.softmax(1)
    wanted = -(shares * shares.log()).sum(1, keepdim=True) / torch.log(torch.tensor(13.0))
    torch.testing.assert_close(entropy, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("softmax", [False, True])
def test_labels_on_another_grid_are_those_of_all_classes(average, softmax):
    image, strategy = noise(1, 1, 14, 9, 8), SubVolumes(6, 0.5)
    ensemble = Ensemble([headed(0), headed(1)], average=average)
    maps = edge_to_edge((14, 9, 8), (23, 15, 17))
    plain = [Slab(0, 0, strategy(image, ensemble)[0])]
    heads = strategy.slabs(image, ensemble)
    assert (labels_onto(heads, maps, softmax) == labels_onto(plain, maps, softmax)).mean() > 0.9995


def nested():
    """Mirror images of a mean in half precision, as a bundle of several files runs."""
    members = [in_precision(headed(seed), torch.bfloat16) for seed in (0, 1)]
    return Flips(Ensemble(members, average="logits"), (1,), PAIRS)


def test_what_is_made_of_what_is_made_of_others():
    image, strategy = noise(1, 1, 14, 9, 8), SubVolumes(6, 0.5)
    slabs = strategy.slabs(image, nested())
    assert all(len(slab.values) == 6 for slab in slabs)
    found = strategy.label_map(image, nested())
    assert (found == strategy(image, nested()).argmax(1, keepdim=True)).float().mean() > 0.97  # bfloat16


@pytest.mark.parametrize(
    "network",
    [
        Ensemble([headed(0, 7), headed(1, 7)], average="logits"),  # as many features as classes, and more
        Ensemble([headed(0, classes=9), Scaled().eval()], average="logits"),
        Ensemble([headed(0), opaque(headed(1))]),
        Ensemble([Ensemble([headed(0), headed(1)]), headed(2)], average="logits"),
        Flips(headed(0, 7), (0,), PAIRS),
        Flips(Ensemble([headed(0), headed(1)]), (1,)),
        Flips(Clamped().eval(), (0,)),
    ],
)
def test_where_heads_do_not_go_together_all_classes_are_blended(network):
    image, strategy = noise(1, 1, 14, 9, 8), SubVolumes(6, 0.5)
    with torch.no_grad():
        assert all(slab.head is None for slab in strategy.slabs(image, network))
        assert torch.equal(strategy.label_map(image, network), strategy(image, network).argmax(1, keepdim=True))


def test_other_classes_are_refused_with_heads_too():
    with pytest.raises(ValueError, match="every network must give the same classes"):
        SubVolumes(6).label_map(noise(1, 1, 14, 9, 8), Ensemble([headed(0), headed(1, classes=12)]))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_progress_and_history_stay(average):
    from monai.data import MetaTensor
    from monai.transforms import Flip

    image = Flip(0)(MetaTensor(noise(1, 14, 9, 8), affine=torch.diag(torch.tensor([2.0, 1.5, 3.0, 1.0]))))[None]
    told = []
    strategy = SubVolumes(6, 0.5, progress=lambda done, total: told.append((done, total)))
    network = Flips(headed(), (0,), PAIRS, average=average)
    for result in (strategy(image, network), strategy.label_map(image, network)):
        assert isinstance(result, MetaTensor) and len(result.applied_operations) == 1
        torch.testing.assert_close(result.affine, image.affine)
    windows = strategy.count(image.shape[2:])
    assert told == [(n, windows) for _ in range(2) for n in range(1, windows + 1)]
