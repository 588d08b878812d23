"""Label tables: which number is which organ, in which colour, and how that travels with a segmentation."""

from __future__ import annotations

import colorsys
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from medseg3d.io.formats import split_name

Color = tuple[int, int, int]

# Light and saturated, so that neighbours stay apart on grey CT, in an outline too.
_PALETTE: tuple[Color, ...] = (
    (239, 83, 80),
    (66, 165, 245),
    (255, 202, 40),
    (102, 187, 106),
    (171, 71, 188),
    (255, 138, 76),
    (38, 198, 218),
    (236, 107, 168),
    (174, 213, 75),
    (121, 134, 245),
    (191, 144, 96),
    (38, 166, 140),
)
_TONES = ((0.55, 1.0), (0.80, 0.80), (0.40, 0.90))  # saturation and value of the colours after those
_ROUNDING = 1e-3  # from a whole number, of labels in floating point and with a scale factor
_GOLDEN = 0.618034  # of a turn of hue from one colour to the next


def default_color(label: int) -> Color:
    """The colour (red, green, blue; 0 to 255) of a label that has none of its own; the same in every run."""
    if label <= len(_PALETTE):
        return _PALETTE[label - 1]
    saturation, value = _TONES[label % len(_TONES)]
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def plain_name(name: str) -> str:
    """A label's name without capitals and punctuation, by which names that mean one organ are the same."""
    return " ".join(re.split(r"[\W_]+", name.casefold())).strip()


@dataclass(frozen=True)
class LabelTable:
    """Names and colours of the labels of a segmentation, in ascending order of the label.

    `names` maps a label (1 to 65535) to its name; a background at 0 is dropped. `colors` maps it to (red, green, blue),
    0 to 255, and is completed from a fixed palette. Raises ValueError for a label, name or colour outside these rules.
    """

    names: Mapping[int, str]
    colors: Mapping[int, Color] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {int(label): str(name).strip() for label, name in sorted(self.names.items()) if int(label) != 0}
        for label, name in names.items():
            if not 0 < label <= 65535:
                raise ValueError(f"labels are whole numbers from 1 to 65535, got {label} ({name!r})")
            if not name or not name.isprintable():
                raise ValueError(f"the name of a label must be printable text, label {label} has {name!r}")
        colors = {label: _color(self.colors.get(label, default_color(label))) for label in names}
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "colors", colors)

    def to_json(self) -> list[dict[str, Any]]:
        """[{"id": 1, "name": "brainstem", "color": [239, 83, 80]}, ...]."""
        return [{"id": n, "name": name, "color": list(self.colors[n])} for n, name in self.names.items()]

    @classmethod
    def from_json(cls, data: Any) -> LabelTable:
        """From `to_json`, or from a plain {"1": "brainstem", ...} or nnU-Net's {"brainstem": 1, ...}.

        A document may hold either under "labels". Raises ValueError for anything else.
        """
        try:
            labels = data.get("labels", data) if isinstance(data, Mapping) else data
            if isinstance(labels, Mapping):
                return cls(label_names(labels))
            colors = {int(entry["id"]): entry["color"] for entry in labels if "color" in entry}
            return cls({int(entry["id"]): entry["name"] for entry in labels}, colors)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError('not a label table: it is {"1": "name", ...} or {"labels": [{"id", "name"}]}') from error

    @classmethod
    def read_json(cls, path: str | Path) -> LabelTable:
        """From a file that `from_json` takes; ValueError where it does and if the file is not JSON."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_xml(self) -> bytes:
        """A Caret XML LabelTable, as TotalSegmentator and Connectome Workbench put it in a NIfTI header extension."""
        root = ET.Element("CaretExtension")
        volume = ET.SubElement(root, "VolumeInformation", Index="0")
        table = ET.SubElement(volume, "LabelTable")
        for label, name in self.names.items():
            red, green, blue = (f"{channel / 255:.6f}" for channel in self.colors[label])
            entry = ET.SubElement(table, "Label", Key=str(label), Red=red, Green=green, Blue=blue, Alpha="1")
            entry.text = name
        ET.SubElement(volume, "StudyMetaDataLinkSet")
        ET.SubElement(volume, "VolumeType").text = "Label"
        return ET.tostring(root, encoding="UTF-8", xml_declaration=True)

    @classmethod
    def from_xml(cls, xml: bytes) -> LabelTable:
        """From the LabelTable in a Caret XML document; ValueError if it is damaged."""
        names, colors = {}, {}
        try:
            for entry in ET.fromstring(xml.strip(b"\0 \n")).findall(".//LabelTable/Label"):
                label = int(entry.attrib["Key"])
                names[label] = entry.text or f"label {label}"
                colors[label] = parse_color(entry.get(channel, "") for channel in ("Red", "Green", "Blue"))
        except (ET.ParseError, KeyError, ValueError) as error:
            raise ValueError(f"not a label table: its XML is damaged ({error})") from error
        return cls(names, colors)


def label_names(labels: Any) -> dict[int, str]:
    """Number -> name from {"1": "liver"} (MONAI, MSD) or {"liver": 1} (nnU-Net version 2, also with regions [1, 2]).

    Background is 0 if there is any label. Raises ValueError for anything else.
    """
    if not isinstance(labels, Mapping):
        raise ValueError(f'"labels" maps numbers to names or names to numbers, got {labels!r}')
    if all(str(key).isdecimal() for key in labels):
        names = {int(number): str(name) for number, name in labels.items()}
        return {0: "background", **dict(sorted(names.items()))} if names else {}
    if "ignore" in labels:
        raise ValueError(
            f"nnU-Net's label 'ignore' ({labels['ignore']}) stands for voxels that nobody annotated, and medseg3d can "
            'leave out whole organs of a case only ("contoured"): leave such cases out, or make it background'
        )
    found: dict[int, tuple[int, str]] = {}  # number -> size of the smallest region that holds it, and its name
    for name, numbers in labels.items():
        region = [whole_number(n, f"the label {name!r}") for n in (numbers if isinstance(numbers, list) else [numbers])]
        for n in region:
            named = name if len(region) == 1 else f"{name} {n}"
            found[n] = min(found.get(n, (len(region), named)), (len(region), named))
    return {0: "background"} | {n: found[n][1] for n in sorted(found)}


def whole_number(value: Any, what: str) -> int:
    """A whole number of at least 0, which a file may have as text; ValueError for anything else."""
    if isinstance(value, int | float | str) and str(value).removesuffix(".0").isdecimal():
        return int(float(value))
    raise ValueError(f"{what} is a whole number, 0 or more, got {value!r}")


def unnamed_labels(array: np.ndarray, names: Mapping[int, str]) -> set[int]:
    """The labels but 0 in an array of integers that have no name.

    A label map whose names have no gaps takes one look at its greatest label. Else voxels are counted.

    Raises:
        ValueError: a label below 0 or above 65535.
    """
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ValueError(f"labels are 0 to 65535, got {low} to {high}")
    unnamed = set(range(low, high + 1)) - {0, *names}
    if unnamed:
        unnamed.intersection_update(count_labels(array))
    return unnamed


def count_labels(array: np.ndarray) -> dict[int, int]:
    """The numbers in an array of integers and how many voxels have each; quick where all are 0 to 65535.

    Slab by slab, since a count over the whole needs eight bytes a voxel.
    """
    high = int(array.max())
    if array.min() < 0 or high > 65535:
        numbers, counts = np.unique(array, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    total = np.zeros(high + 1, dtype=np.int64)
    for slab in np.moveaxis(array, -1, 0):
        total += np.bincount(slab.ravel(order="K").astype(np.intp), minlength=high + 1)
    return {n: int(total[n]) for n in np.flatnonzero(total).tolist()}


def whole_numbers(array: np.ndarray, name: object) -> np.ndarray:
    """The array in integers: what is stored as floating point counts as the whole number within 1e-3 of it.

    Raises:
        ValueError: there are fractions, NaN or infinite numbers.
    """
    if array.dtype.kind != "f":
        return array
    whole = np.rint(array)
    with np.errstate(invalid="ignore"):  # infinite less infinite
        wrong = ~(np.abs(array - whole) <= _ROUNDING)
    if wrong.any():
        raise ValueError(
            f"{name} is no label map: it holds fractions such as {array[wrong][0]!s}, as probabilities, images and "
            "files with a scale factor do; write its whole numbers as an integer type without scaling"
        )
    return whole.astype(np.int32)


def label_numbers(array: np.ndarray, name: object) -> np.ndarray:
    """`whole_numbers`, of which none is below 0; ValueError if one is."""
    array = whole_numbers(array, name)
    if array.min(initial=0) < 0:
        raise ValueError(
            f"{name} is no label map: it holds numbers below 0 such as {array.min()}, as a CT does; give the "
            "segmentation of it"
        )
    return array


def sidecar_path(path: str | Path) -> Path:
    """`<stem>.labels.json` beside a segmentation."""
    return Path(path).with_name(f"{split_name(path)[0]}.labels.json")


def sidecar_text(table: LabelTable, path: Path, source: str | None) -> str:
    """What the sidecar of the segmentation `path` holds. File names only: a folder may name a patient or a hospital."""
    document = {"segmentation": path.name, "source": source and Path(source).name, "labels": table.to_json()}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def parse_color(channels: Iterable[str]) -> Color:
    """(red, green, blue), 0 to 255, from three numbers of 0 to 1 as text."""
    red, green, blue = (round(float(channel) * 255) for channel in channels)
    return red, green, blue


def _color(value: Any) -> Color:
    channels = [int(channel) for channel in value]
    if len(channels) != 3 or min(channels) < 0 or max(channels) > 255:
        raise ValueError(f"a colour is (red, green, blue), each 0 to 255, got {value!r}")
    return channels[0], channels[1], channels[2]
