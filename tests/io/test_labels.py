import json
from itertools import combinations

import numpy as np
import pytest

from medseg3d.io.labels import LabelTable, default_color, sidecar_path, sidecar_text, unnamed_labels, whole_numbers

TABLE = LabelTable({3: "parotid gland, left", 1: "brainstem <& \"quoted\" 'é'>"}, {3: (1, 2, 3)})


def test_names_are_sorted_and_colours_completed():
    assert list(TABLE.names) == [1, 3]
    assert TABLE.colors == {1: default_color(1), 3: (1, 2, 3)}


def test_background_is_dropped_and_text_keys_are_numbers():
    assert LabelTable({"0": "background", "2": "liver"}).names == {2: "liver"}


@pytest.mark.parametrize(
    ("names", "colors", "message"),
    [
        ({-1: "a"}, {}, "1 to 65535, got -1"),
        ({70000: "a"}, {}, "1 to 65535, got 70000"),
        ({1: "  "}, {}, "must be printable text"),
        ({1: "a\nb"}, {}, "must be printable text"),
        ({1: "a"}, {1: (0, 0, 256)}, "each 0 to 255"),
        ({1: "a"}, {1: (0, 0)}, "each 0 to 255"),
    ],
)
def test_bad_tables_are_refused(names, colors, message):
    with pytest.raises(ValueError, match=message):
        LabelTable(names, colors)


def test_default_colours_are_distinct_and_never_grey():
    colors = [default_color(label) for label in range(1, 256)]
    assert len(set(colors)) == 255
    assert min(max(color) - min(color) for color in colors) >= 60
    nearest = min(
        sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) ** 0.5 for one, two in combinations(colors[:12], 2)
    )
    assert nearest > 40


def test_json_round_trip():
    assert LabelTable.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE
    assert LabelTable.from_json({"labels": TABLE.to_json()}) == TABLE


def test_plain_json_of_other_tools(tmp_path):
    path = tmp_path / "labels.json"
    for text in ('{"0": "background", "1": "spleen"}', '\ufeff{"labels": {"background": 0, "spleen": 1}}'):
        path.write_text(text, encoding="utf-8")
        assert LabelTable.read_json(path) == LabelTable({1: "spleen"})


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"labels": 3}', '{"a": "b"}', '[{"id": 1}]', "3"])
def test_bad_json_names_the_file(tmp_path, text):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"labels\.json: "):
        LabelTable.read_json(path)


def test_xml_round_trip_with_padding():
    assert LabelTable.from_xml(TABLE.to_xml() + b"   \0\0\0") == TABLE


@pytest.mark.parametrize("xml", [b"<LabelTable>", b"<a/>x", b'<a><LabelTable><Label Key="x"/></LabelTable></a>'])
def test_bad_xml_is_refused(xml):
    with pytest.raises(ValueError, match="not a label table"):
        LabelTable.from_xml(xml)


def test_xml_has_the_form_other_readers_expect():
    """TotalSegmentator walks CaretExtension/VolumeInformation/LabelTable/Label and takes Key and the text."""
    from xml.etree import ElementTree

    root = ElementTree.fromstring(TABLE.to_xml())
    assert root.tag == "CaretExtension"
    labels = root.findall("VolumeInformation/LabelTable/Label")
    assert {int(label.attrib["Key"]): label.text for label in labels} == TABLE.names


def test_sidecar_holds_file_names_only(tmp_path):
    path = tmp_path / "seg.nii.gz"
    text = sidecar_text(TABLE, path, "/clinic/Jane Doe/ct.nii.gz")
    assert sidecar_path(path) == tmp_path / "seg.labels.json"
    assert json.loads(text)["source"] == "ct.nii.gz" and json.loads(text)["segmentation"] == "seg.nii.gz"
    assert "clinic" not in text and str(tmp_path) not in text


# Labels in use


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
@pytest.mark.parametrize(
    ("used", "named", "unnamed"),
    [
        ([0, 1, 2], [1, 2], set()),
        ([0, 2], [1, 2, 3], set()),
        ([1, 4], [1, 4], set()),  # 2 and 3 have no name and are not used
        ([0, 3, 5, 9], [3, 7], {5, 9}),
        ([0], [], set()),
    ],
)
def test_unnamed_labels(dtype, used, named, unnamed):
    array = np.resize(np.array(used, dtype), (4, 5, 6))
    assert unnamed_labels(array, dict.fromkeys(named, "organ")) == unnamed


def test_every_label_up_to_65535_may_be_used():
    array = np.array([0, 255, 256, 65535]).reshape(2, 2, 1)
    assert unnamed_labels(array, {255: "a", 65535: "b"}) == {256}
    assert unnamed_labels(array > 0, {}) == {1}
    for wrong in (-1, 65536):
        with pytest.raises(ValueError, match=rf"0 to 65535, got .*{wrong}"):
            unnamed_labels(np.full((2, 2, 2), wrong), {})


def test_numbers_within_a_thousandth_of_a_whole_one_are_labels():
    near = np.array([0, 0.99999994, 2.0005, 3], np.float32)
    assert whole_numbers(near, "a").tolist() == [0, 1, 2, 3] and whole_numbers(near, "a").dtype.kind == "i"
    for wrong in (0.9985, np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"^a.nii is no label map: it holds fractions such as {wrong}, as prob"):
            whole_numbers(np.array([0, wrong, 1], np.float32), "a.nii")
