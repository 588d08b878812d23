"""Several networks as one, and several label maps as one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg3d.inference import SubVolumes
from medseg3d.inference.ensemble import Ensemble, merge_label_maps
from medseg3d.io import LabelTable


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed, classes=3):
    weights = noise(classes, 1, 3, 3, 3, seed=seed)
    return lambda window: torch.nn.functional.conv3d(window, weights.to(window.dtype), padding=1)


# The mean


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("weights", [None, (1, 1, 1), (3, 1, 0.5)])
def test_the_weighted_mean_by_hand(average, weights):
    networks = [network(seed) for seed in range(3)]
    window = noise(2, 1, 5, 6, 7, seed=9)
    shares = torch.tensor(weights or (1, 1, 1), dtype=torch.float32).view(3, 1, 1, 1, 1, 1)
    shares = shares / shares.sum()
    answers = torch.stack([net(window) for net in networks])
    result = Ensemble(networks, weights, average)(window)
    if average == "logits":
        torch.testing.assert_close(result, (shares * answers).sum(0))
    else:
        torch.testing.assert_close(result.softmax(1), (shares * answers.softmax(2)).sum(0))


def test_an_ensemble_of_one_network_is_that_network():
    window = noise(1, 1, 5, 5, 5)
    torch.testing.assert_close(Ensemble([network(1)], [7], "logits")(window), network(1)(window))
    torch.testing.assert_close(Ensemble([network(1)] * 4)(window).softmax(1), network(1)(window).softmax(1))


def test_a_sure_network_outvotes_by_logits_and_not_by_probabilities():
    sure = torch.tensor([[[9.0], [0.0]]])
    others = torch.tensor([[[0.0], [1.0]]])
    networks = [lambda x: sure, lambda x: others, lambda x: others, lambda x: others]
    assert Ensemble(networks, average="logits")(noise(1, 1, 1)).argmax(1) == 0
    assert Ensemble(networks, average="probabilities")(noise(1, 1, 1)).argmax(1) == 1


def test_it_is_one_network_to_a_strategy():
    image = noise(1, 1, 11, 9, 10)
    strategy = SubVolumes(6, 0.5, batch_size=2)
    ensemble = Ensemble([network(1), network(2)], average="logits")
    alone = [strategy(image, network(seed)) for seed in (1, 2)]
    torch.testing.assert_close(strategy(image, ensemble), (alone[0] + alone[1]) / 2)
    assert torch.equal(strategy.label_map(image, ensemble), sum(alone).argmax(1, keepdim=True))


def test_what_networks_return_stays_and_so_does_its_type():
    answers = [noise(1, 3, 4, 4, seed=s).to(torch.bfloat16) for s in (1, 2)]
    kept = [answer.clone() for answer in answers]
    result = Ensemble([lambda x: answers[0], lambda x: answers[1]], average="logits")(noise(1, 1, 4, 4))
    assert result.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(answers, kept, strict=True))


def test_a_network_that_writes_into_its_input_does_no_harm():
    window = noise(1, 1, 4, 4, 4)
    before = window.clone()
    result = Ensemble([lambda x: network(1)(x.mul_(2)), network(2)], average="logits")(window)
    assert torch.equal(window, before)
    torch.testing.assert_close(result, (2 * network(1)(window) + network(2)(window)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "needs a network or more"),
        (([abs], [1, 2]), r"each of the 1 networks, got \(1.0, 2.0\)"),
        (([abs, abs], [1, 0]), "a number above 0"),
        (([abs, abs], [1, float("nan")]), "a number above 0"),
        (([abs], None, "votes"), "average must be one of logits, probabilities"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(*arguments)


def test_networks_of_different_classes_are_refused():
    with pytest.raises(ValueError, match=r"got \(1, 4, 5, 5, 5\) after \(1, 3, 5, 5, 5\): every network"):
        Ensemble([network(1), network(2, classes=4)])(noise(1, 1, 5, 5, 5))


# The label map


def table(**labels):
    return LabelTable({number: name for name, number in labels.items()})


def test_the_earlier_map_has_the_voxel_and_background_covers_nothing():
    organs = np.array([[0, 1, 1, 2]], np.uint8)
    tumours = np.array([[1, 0, 1, 0]], np.uint8)
    merged, names = merge_label_maps([tumours, organs], [table(tumour=1), table(liver=1, spleen=2)])
    assert dict(names.names) == {1: "tumour", 2: "spleen", 3: "liver"}
    np.testing.assert_array_equal(merged, [[1, 3, 1, 2]])
    merged, names = merge_label_maps([organs, tumours], [table(liver=1, spleen=2), table(tumour=1)])
    assert dict(names.names) == {1: "liver", 2: "spleen", 3: "tumour"}
    np.testing.assert_array_equal(merged, [[3, 1, 1, 2]])


maps = st.integers(1, 4).flatmap(
    lambda count: st.lists(
        st.lists(st.sampled_from([0, 0, 1, 2, 5, 255, 256, 40000]), min_size=24, max_size=24),
        min_size=count,
        max_size=count,
    )
)


@settings(max_examples=50, deadline=None)
@given(maps)
def test_every_voxel_has_the_name_of_the_first_map_that_names_it(values):
    label_maps = [np.array(v, np.uint16).reshape(4, 3, 2) for v in values]
    tables = [LabelTable({n: f"map {m} label {n}" for n in np.unique(a) if n}) for m, a in enumerate(label_maps)]
    before = [a.copy() for a in label_maps]
    merged, names = merge_label_maps(label_maps, tables)
    assert merged.dtype == (np.uint8 if max(names.names, default=0) <= 255 else np.uint16)
    assert sorted(names.names.values()) == sorted(n for t in tables for n in t.names.values())
    for place in np.ndindex(merged.shape):
        named = [tables[m].names[a[place]] for m, a in enumerate(label_maps) if a[place]]
        assert ({0: None, **names.names}[int(merged[place])]) == (named[0] if named else None)
    assert all((a == b).all() for a, b in zip(label_maps, before, strict=True))


def test_labels_of_one_name_are_refused_or_united():
    a, b = np.array([[1, 0, 0]], np.uint8), np.array([[0, 7, 3]], np.uint8)
    tables = [table(liver=1), table(liver=7, spleen=3)]
    with pytest.raises(ValueError, match=r"'liver' is a label of table 1 and a label before it: rename .* or unite"):
        merge_label_maps([a, b], tables)
    merged, names = merge_label_maps([a, b], tables, unite=True)
    assert dict(names.names) == {1: "liver", 3: "spleen"}
    np.testing.assert_array_equal(merged, [[1, 1, 3]])


def test_colours_travel_and_defaults_follow_the_new_number():
    own = LabelTable({1: "vein", 2: "artery"}, {1: (1, 2, 3)})
    _, names = merge_label_maps([np.zeros((1, 1), np.uint8)] * 2, [table(liver=1, spleen=2), own])
    assert names.names[3] == "vein" and names.colors[3] == (1, 2, 3)
    assert names.colors[4] == LabelTable({4: "artery"}).colors[4]


def test_uint8_and_uint16_go_together():
    merged, names = merge_label_maps(
        [np.array([[0, 9]], np.uint8), np.array([[300, 300]], np.uint16)], [table(a=9), table(b=300)]
    )
    assert merged.dtype == np.uint16 and merged.tolist() == [[300, 9]] and dict(names.names) == {9: "a", 300: "b"}


@pytest.mark.parametrize(
    ("label_maps", "tables", "message"),
    [
        ([], [], "each label map needs a table, got 0"),
        ([np.zeros((2, 2), np.uint8)], [], "got 1 label maps and 0 tables"),
        ([np.zeros((2, 2), np.int32)], [table(a=1)], "must be uint8 or uint16, got int32"),
        ([np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)], [table(a=1), table(b=1)], "on one grid"),
        ([np.full((2, 2), 4, np.uint8)], [table(a=1)], r"label map 0 has labels \[4\] that its table does not name"),
        ([np.zeros((2, 2), np.uint16)] * 2, [table(a=65535), table(b=65535)], "ends at 65535"),
    ],
)
def test_what_cannot_be_merged_is_told(label_maps, tables, message):
    with pytest.raises(ValueError, match=message):
        merge_label_maps(label_maps, tables)
