"""Cases that are prepared once, kept in memory as far as it is free, and on disk for the next run."""

from __future__ import annotations

import importlib
import linecache
import logging
import os
import sys

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Lambdad, MapTransform, RandShiftIntensityd

from medseg3d.data import cache
from medseg3d.data.cache import CachedCases
from medseg3d.data.transforms import ToModelGridd

LOGGER = "medseg3d.data.cache"
prepared = []  # the files that `Read` read, in the order in which it did


class Read(MapTransform):
    """The number in a text file, so often that the tensor is not small, times ``factor``."""

    def __init__(self, keys, factor=1.0, meta=False, size=100):
        super().__init__(keys)
        self.factor, self.meta, self.size = factor, meta, size

    def __call__(self, data):
        path = data["image"]
        prepared.append(os.path.basename(path))
        with open(path) as file:
            image = torch.full((1, self.size), float(file.read())) * self.factor
        return {**data, "image": MetaTensor(image) if self.meta else image}


@pytest.fixture
def cases(tmp_path):
    prepared.clear()
    for number in range(4):
        (tmp_path / f"case{number}.txt").write_text(str(number))
    return [{"image": str(tmp_path / f"case{number}.txt"), "annotated": [1, 0]} for number in range(4)]


def values(dataset):
    return [item["image"].unique().tolist() for item in dataset]


def only(*transforms):
    return Compose(list(transforms))


def test_each_case_is_prepared_once_and_in_the_next_run_not_at_all(cases, tmp_path):
    for _ in range(2):
        dataset = CachedCases(cases, only(Read("image")), tmp_path / "cache")
        assert values(dataset) == values(dataset) == [[0], [1], [2], [3]]
        assert dataset[-1]["annotated"] == [1, 0] and len(dataset) == 4
        assert sorted(prepared) == [f"case{number}.txt" for number in range(4)]


def test_what_changed_is_prepared_anew(cases, tmp_path):
    CachedCases(cases, only(Read("image")), tmp_path / "cache")
    (tmp_path / "case2.txt").write_text("20")
    prepared.clear()
    assert values(CachedCases(cases, only(Read("image")), tmp_path / "cache"))[2] == [20]
    assert prepared == ["case2.txt"]
    assert values(CachedCases(cases, only(Read("image", factor=2)), tmp_path / "cache"))[3] == [6]
    cases[1]["annotated"] = [1, 1]
    assert CachedCases(cases, only(Read("image")), tmp_path / "cache")[1]["annotated"] == [1, 1]


def test_another_version_prepares_anew(cases, tmp_path, monkeypatch):
    CachedCases(cases, only(Read("image")), tmp_path / "cache")
    monkeypatch.setattr(cache, "__version__", "another")
    prepared.clear()
    CachedCases(cases, only(Read("image")), tmp_path / "cache")
    assert len(prepared) == 4


@pytest.mark.parametrize("folder", [None, "cache"])
def test_memory_is_not_filled_beyond_its_share(folder, cases, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "free_memory", lambda device: 1700)  # bytes; a case takes 400
    folder = None if folder is None else tmp_path / folder
    with caplog.at_level(logging.INFO, LOGGER):
        dataset = CachedCases(cases, only(Read("image")), folder, memory=0.5)
    assert "2 of 4 cases are kept in memory" in caplog.text
    prepared.clear()
    assert values(dataset) == [[0], [1], [2], [3]]
    assert prepared == ([] if folder else ["case2.txt", "case3.txt"])


def test_processes_of_a_machine_share_its_memory(cases, monkeypatch, caplog):
    monkeypatch.setattr(cache, "free_memory", lambda device: 1700)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with caplog.at_level(logging.INFO, LOGGER):
        CachedCases(cases, only(Read("image")), memory=0.5)
    assert "1 of 4 cases are kept in memory" in caplog.text


def test_without_memory_and_folder_nothing_is_prepared_before_it_is_asked_for(cases):
    dataset = CachedCases(cases, only(Read("image")), memory=0)
    assert prepared == []
    assert values(dataset) == [[0], [1], [2], [3]]


def test_a_damaged_file_is_written_again(cases, tmp_path):
    read = only(Read("image", size=20_000))
    CachedCases(cases, read, tmp_path / "cache")
    files = sorted((tmp_path / "cache").iterdir())
    content = files[0].read_bytes()
    half = len(content) // 2
    for n, damaged in enumerate((content[:half], content[:-40], content[:half] + bytes(len(content) - half), b"")):
        files[n].write_bytes(damaged)
    prepared.clear()
    for _ in range(2):
        assert values(CachedCases(cases, read, tmp_path / "cache")) == [[0], [1], [2], [3]]
    assert len(prepared) == 4
    assert sorted((tmp_path / "cache").iterdir()) == files


def test_a_case_that_is_listed_twice_is_written_whole(cases, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        dataset = CachedCases(cases[:1] * 8, only(Read("image", size=300_000)), tmp_path / "cache", threads=4)
    assert values(dataset) == [[0]] * 8 and caplog.text == ""
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("named", "changed"), [("series", "series/deep/2.dcm"), ("ct.mhd", "ct.raw"), ("ct.nhdr", "ct.raw.gz")]
)
def test_a_file_within_a_scan_that_a_case_names_may_change_too(named, changed, cases, tmp_path):
    (tmp_path / "series" / "deep").mkdir(parents=True)
    (tmp_path / named if "." in named else tmp_path / named / "1.dcm").write_text("a part")
    cases = [{**cases[0], "series": tmp_path / named}]
    CachedCases(cases, only(Read("image"), Lambdad("series", str, track_meta=False)), tmp_path / "cache")
    (tmp_path / changed).write_text("another one")
    prepared.clear()
    CachedCases(cases, only(Read("image"), Lambdad("series", str, track_meta=False)), tmp_path / "cache")
    assert prepared == ["case0.txt"]


def test_arrays_of_any_type_are_kept(cases, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda device: 1000)
    cases = [{**case, "description": np.array(b"as a header has it")} for case in cases]
    dataset = CachedCases(cases, only(Read("image")), memory=0.9)
    assert dataset[0]["description"] == b"as a header has it"
    assert list(dataset._kept) == [0, 1]  # of 400 bytes and 18


def test_tensors_with_a_history_stay_in_memory_alone(cases, tmp_path):
    dataset = CachedCases(cases, only(Read("image", meta=True)), tmp_path / "cache")
    assert isinstance(dataset[0]["image"], MetaTensor) and len(prepared) == 4
    assert not (tmp_path / "cache").exists()


def test_whoever_writes_into_a_case_has_their_own_copy(cases):
    dataset = CachedCases(cases, only(Read("image")))
    dataset[1]["image"] += 5
    assert dataset[1]["image"].unique() == 1
    shared = CachedCases(cases, only(Read("image")), copy=False)
    assert shared[1]["image"] is shared[1]["image"]


def test_random_transforms_run_at_each_access(cases, tmp_path):
    shift = RandShiftIntensityd("image", offsets=10.0, prob=1.0)
    dataset = CachedCases(cases, only(Read("image"), shift), tmp_path / "cache", copy=False)
    first, second = (dataset[0]["image"][0, 0].item() for _ in range(2))
    assert first != second and len(prepared) == 4


def test_a_part_of_a_larger_tensor_is_kept_without_the_rest(cases, tmp_path):
    part = Lambdad("image", _first_ten, track_meta=False)
    dataset = CachedCases(cases, only(Read("image", size=100_000), part), tmp_path / "cache")
    assert dataset[0]["image"].untyped_storage().nbytes() == 40
    assert max(file.stat().st_size for file in (tmp_path / "cache").iterdir()) < 10_000


def _first_ten(image):
    return image[:, :10]


def test_settings_of_transforms_keep_their_order_from_run_to_run():
    """A set of words has another order in each process, and the files of the cache would have other names."""
    both = ToModelGridd(["image", "label", "weights"], ["label", "weights"])
    assert not any(isinstance(setting, set) for setting in vars(both).values())


def test_transforms_that_cannot_be_told_apart_are_not_kept_on_disk(cases, tmp_path, caplog):
    twice = Lambdad("image", lambda image: image * 2)
    with caplog.at_level(logging.WARNING, LOGGER):
        dataset = CachedCases(cases, only(Read("image"), twice), tmp_path / "cache")
    assert values(dataset) == [[0], [2], [4], [6]] and len(prepared) == 4
    assert "cannot be pickled" in caplog.text and not (tmp_path / "cache").exists()


def test_a_full_disk_stops_no_training(cases, tmp_path, monkeypatch, caplog):
    def full(item, path):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with caplog.at_level(logging.WARNING, LOGGER):
        dataset = CachedCases(cases, only(Read("image")), tmp_path / "cache")
    assert values(dataset) == [[0], [1], [2], [3]]
    assert "no space left" in caplog.text and list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_nothing_and_all(share, cases):
    with pytest.raises(ValueError, match=f"0 to 1, got {share}"):
        CachedCases(cases, only(Read("image")), memory=share)


def test_the_code_of_ones_own_transform_may_change(cases, tmp_path, monkeypatch):
    file = tmp_path / "own_transforms.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for factor in (2, 5):
        file.write_text(
            "from monai.transforms import MapTransform\n"
            "class Times(MapTransform):\n"
            f"    def __call__(self, data):\n        return {{**data, 'image': data['image'] * {factor}}}\n"
        )
        sys.modules.pop("own_transforms", None)
        linecache.clearcache()
        own = importlib.import_module("own_transforms").Times("image")
        dataset = CachedCases(cases, only(Read("image"), own), tmp_path / "cache")
        assert values(dataset) == [[0], [factor], [2 * factor], [3 * factor]]
    sys.modules.pop("own_transforms")
