"""Cases in the folders of nnU-Net and of the Medical Segmentation Decathlon."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medseg3d.data.csv_lists import Entry
from medseg3d.io.formats import KINDS, RASTER_SUFFIXES, split_name

CHANNEL = re.compile(r"_(\d{4})$")


def folder_entries(folder: Path, data: Mapping[str, Any], notes: list[str]) -> list[Entry]:
    """The cases that a dataset.json lists by name, as version 2 may, or those in imagesTr; and those in imagesTs.

    Files that belong to no case, or to one that has them already, go to the notes.
    """
    listed = data.get("dataset")
    tests = _scanned(folder, "Ts", data, notes)
    if isinstance(listed, Mapping):
        for name, entry in listed.items():
            if not isinstance(entry, Mapping):
                raise ValueError(
                    f'{folder / "dataset.json"}: a case of "dataset" is {{"images": [paths], "label": path}}, '
                    f"{name!r} is {entry!r}"
                )
        cases = [{"case": name, "image": e.get("images"), "label": e.get("label")} for name, e in listed.items()]
        tests = [entry for entry in tests if entry["case"] not in listed]
    else:
        cases = _scanned(folder, "Tr", data, notes)
    if not cases and not tests:
        ending = _ending(data)
        which = f"that ends in {ending!r}, the file_ending of dataset.json" if ending else "that medseg3d reads"
        raise ValueError(f"{folder / 'imagesTr'} holds no image {which}")
    return [*(("train", entry) for entry in cases), *(("test", entry) for entry in tests)]


def channel_names(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of "channel_names" (nnU-Net, version 2) or "modality" (version 1, Decathlon), {"0": name}; else empty."""
    named = data.get("channel_names", data.get("modality"))
    return tuple(map(str, named.values())) if isinstance(named, Mapping) else ()


def _scanned(folder: Path, end: str, data: Mapping[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """The cases in images<end> with their files in labels<end>."""
    images: dict[str, list[str]] = {}
    labels = dict(_files(folder, f"labels{end}", data, notes))
    files = dict(_files(folder, f"images{end}", data, notes))
    several = len(channel_names(data)) > 1
    for stem, file in files.items():
        case = CHANNEL.sub("", stem)
        # The number is the case's, not a channel's, where a label has it too, or where nothing begins with channel 0.
        own = stem in labels or not (several or f"{case}_0000" in files)
        images.setdefault(stem if own else case, []).append(file)
    notes += [f"{labels[name]} has no image in images{end}" for name in sorted(labels.keys() - images)]
    return [
        {"case": name, "image": channels} | ({"label": labels[name]} if name in labels else {})
        for name, channels in images.items()
    ]


def _files(folder: Path, part: str, data: Mapping[str, Any], notes: list[str]) -> Iterator[tuple[str, str]]:
    """Stem and path of the images in a part of the folder, sorted, of several of one stem the first.

    The hidden files that some systems leave beside them are none.
    """
    ending = _ending(data)
    known = (ending,) if ending else (*KINDS, *RASTER_SUFFIXES)
    taken: dict[str, str] = {}
    for file in sorted((folder / part).iterdir()) if (folder / part).is_dir() else ():
        if file.name.startswith(".") or not file.name.lower().endswith(known):
            continue
        stem = file.name[: -len(ending)] if ending else split_name(file)[0]
        if stem in taken:
            notes.append(f"{part}/{file.name} is not read: {taken[stem]} has that name too")
        else:
            taken[stem] = file.name
            yield stem, f"{part}/{file.name}"


def _ending(data: Mapping[str, Any]) -> str:
    return str(data.get("file_ending", "")).lower()
