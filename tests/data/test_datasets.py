"""Lists and folders as people have them become the same cases, and a datalist reads back as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from monai.data import load_decathlon_datalist

from medseg3d.data.datasets import Case, Dataset, read_dataset, with_patients, write_datalist
from medseg3d.data.manifest import dataset_of


@pytest.fixture
def touch(tmp_path):
    def create(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return create


@pytest.fixture
def save(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def files(dataset):
    """(name, names of the images, name of the label) of each case."""
    return [(c.name, [f.name for f in c.images], c.label and c.label.name) for c in dataset.cases]


def test_a_table_in_another_encoding_is_told(tmp_path):
    (tmp_path / "list.csv").write_bytes("image\nHüfte.nii.gz\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.csv is not in UTF-8 .*save it as CSV UTF-8"):
        read_dataset(tmp_path / "list.csv")


def test_a_case_of_nnunet_that_is_no_object_is_told(save, tmp_path):
    save("dataset.json", {"dataset": {"a": "a.nii.gz"}, "labels": {"background": 0}})
    with pytest.raises(ValueError, match=r"a case of \"dataset\" is .*'a' is 'a\.nii\.gz'"):
        read_dataset(tmp_path)


def test_a_number_of_four_digits_may_be_the_cases_own(save, touch, tmp_path):
    numbers = ("0001", "0004", "0005")
    entries = [{"image": f"imagesTr/amos_{n}.nii.gz", "label": f"labelsTr/amos_{n}.nii.gz"} for n in numbers]
    listed = read_dataset(save("list.json", {"training": entries}))
    assert [case.name for case in listed.cases] == [f"amos_{n}" for n in numbers]
    assert [case.patient for case in with_patients(listed, r"(\d+)$").cases] == list(numbers)
    touch(*(file for entry in entries for file in entry.values()), "imagesTs/amos_0008.nii.gz")
    folder = read_dataset(tmp_path)
    assert [(case.name, len(case.images), case.split) for case in folder.cases] == [
        *((f"amos_{n}", 1, "train") for n in numbers),
        ("amos_0008", 1, "test"),
    ]
    assert folder.notes == ()


def test_channels_of_nnunet_are_no_names(save, touch, tmp_path):
    one = [{"image": f"case{n}_0000.nii.gz"} for n in range(2)]
    assert [case.name for case in read_dataset(save("one.json", {"training": one})).cases] == ["case0", "case1"]
    several = [{"image": ["case7_0000.nii.gz", "case7_0001.nii.gz"]}, {"image": ["other_0001.nii.gz"]}]
    assert [case.name for case in read_dataset(save("two.json", {"training": several})).cases] == [
        "case7",
        "other_0001",
    ]


def test_voxels_to_ignore_are_refused(save, tmp_path):
    save("dataset.json", {"labels": {"background": 0, "liver": 1, "ignore": 2}, "file_ending": ".nii.gz"})
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a_0000.nii.gz").touch()
    with pytest.raises(ValueError, match=r"label 'ignore' \(2\) stands for voxels that nobody annotated.*leave such"):
        read_dataset(tmp_path)


def test_patient_0_is_a_patient(save):
    entries = [
        {"image": f"{name}.nii.gz", "patient": patient} for name, patient in zip("abcd", (0, 0, 1, ""), strict=True)
    ]
    assert [case.patient for case in read_dataset(save("list.json", {"training": entries})).cases] == [
        "0",
        "0",
        "1",
        "d",
    ]


class TestDatalist:
    def test_of_monai(self, save, tmp_path):
        document = {
            "name": "livers",
            "labels": {"1": "liver"},
            "training": [
                {"image": "a.nii.gz", "label": "sub/a_seg.nii.gz", "fold": 3, "patient": 7, "contoured": [1]},
                {"image": ["b_t1.nii.gz", "b_t2.nii.gz"], "label": "b_seg.nii.gz", "case": "b"},
            ],
            "validation": [{"image": "/elsewhere/c.nii.gz", "label": "c_seg.nii.gz"}],
            "testing": [{"image": "d.nii.gz"}],
        }
        dataset = read_dataset(save("list.json", document))
        a, b, c, d = dataset.cases
        label = tmp_path / "sub/a_seg.nii.gz"
        assert a == Case("a", (tmp_path / "a.nii.gz",), label, "7", "train", fold=3, annotated=(1,))
        assert b.images == (tmp_path / "b_t1.nii.gz", tmp_path / "b_t2.nii.gz") and b.patient == b.name == "b"
        assert (c.split, c.images) == ("validation", (Path("/elsewhere/c.nii.gz"),))
        assert (d.split, d.label) == ("test", None)
        assert dataset.labels == {0: "background", 1: "liver"} and dataset.name == "livers"

    def test_of_the_decathlon(self, save, touch, tmp_path):
        document = {
            "labels": {"0": "background", "1": "spleen"},
            "training": [{"image": "./imagesTr/spleen_2.nii.gz", "label": "./labelsTr/spleen_2.nii.gz"}],
            "test": ["./imagesTs/spleen_1.nii.gz"],
        }
        save("dataset.json", document)
        dataset = read_dataset(tmp_path)
        assert files(dataset) == [
            ("spleen_2", ["spleen_2.nii.gz"], "spleen_2.nii.gz"),
            ("spleen_1", ["spleen_1.nii.gz"], None),
        ]
        touch("imagesTr/spleen_2_0001.nii.gz", "imagesTr/spleen_2_0000.nii.gz")  # nnU-Net 1 lists them without numbers
        dataset = read_dataset(tmp_path)
        assert files(dataset)[0] == ("spleen_2", ["spleen_2_0000.nii.gz", "spleen_2_0001.nii.gz"], "spleen_2.nii.gz")

    def test_paths_start_from_the_folder_that_is_given(self, save):
        path = save("list.json", {"training": [{"image": "a.nii.gz"}]})
        assert read_dataset(path, "/data").cases[0].images == (Path("/data/a.nii.gz"),)

    def test_names_are_told_apart_by_folders(self, save):
        entries = [{"image": "s1/ct.nii.gz"}, {"image": "s2/ct.nii.gz"}, {"image": "other.nii.gz"}]
        dataset = read_dataset(save("list.json", {"training": entries}))
        assert [case.name for case in dataset.cases] == ["s1_ct", "s2_ct", "other"]
        dataset = read_dataset(save("list.json", {"training": entries[:1] * 2}))
        assert len({case.name for case in dataset.cases}) == 2

    def test_given_names_are_told_apart_by_numbers_that_are_free(self, save):
        entries = [{"image": f"{n}.nii.gz", "case": name} for n, name in enumerate(("a", "a", "a_1", "a_2"))]
        names = [case.name for case in read_dataset(save("list.json", {"training": entries})).cases]
        assert names == ["a_0", "a_3", "a_1", "a_2"]

    def test_a_label_in_a_list_of_its_own_and_a_byte_order_mark(self, save):
        document = {"training": [{"image": ["a.nii.gz"], "label": ["a_seg.nii.gz"]}]}
        dataset = read_dataset(save("list.json", "\ufeff" + json.dumps(document)))
        assert files(dataset) == [("a", ["a.nii.gz"], "a_seg.nii.gz")]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"),
            ([], "holds no JSON object"),
            ({"cases": []}, "is no datalist, it has no list training"),
            ({"training": []}, "lists no case"),
            ({"training": [{"label": "a.nii.gz"}]}, "an entry of a data set has an image"),
            ({"training": [{"image": []}]}, "an entry of a data set has an image"),
            ({"training": [7]}, "an entry of a datalist is"),
            ({"training": [{"image": "a", "label": ["b", "c"]}]}, "merge several masks into one label map"),
            ({"training": [{"image": "a"}], "labels": ["liver"]}, '"labels" maps numbers to names'),
        ],
    )
    def test_errors(self, content, message, save):
        path = save("list.json", content)
        with pytest.raises(ValueError, match=message) as error:
            read_dataset(path)
        assert "list" in str(error.value)


class TestFolder:
    def test_of_nnunet(self, save, touch, tmp_path):
        labels = {"background": 0, "kidney": 1, "tumor": 2}
        save("dataset.json", {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".mha", "numTraining": 2})
        touch("imagesTr/k1_0000.mha", "imagesTr/k1_0001.mha", "imagesTr/k2_0000.mha", "imagesTr/.hidden_0000.mha")
        touch("labelsTr/k1.mha", "labelsTr/k3.mha", "imagesTs/k4_0000.mha", "labelsTs/k4.mha", "imagesTr/notes.txt")
        dataset = read_dataset(tmp_path)
        assert files(dataset) == [
            ("k1", ["k1_0000.mha", "k1_0001.mha"], "k1.mha"),
            ("k2", ["k2_0000.mha"], None),
            ("k4", ["k4_0000.mha"], "k4.mha"),
        ]
        assert [case.split for case in dataset.cases] == ["train", "train", "test"]
        assert dataset.labels == {0: "background", 1: "kidney", 2: "tumor"}
        assert dataset.notes == ("labelsTr/k3.mha has no image in imagesTr",)

    def test_regions_name_the_numbers_within(self, save, touch, tmp_path):
        regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
        save("dataset.json", {"labels": regions, "file_ending": ".nii.gz"})
        touch("imagesTr/a_0000.nii.gz")
        assert read_dataset(tmp_path).labels == {
            0: "background",
            1: "whole 1",
            2: "core 2",
            3: "enhancing",
        }

    def test_cases_listed_by_name(self, save, touch, tmp_path):
        cases = {"a": {"images": ["x/a_0000.png", "x/a_0001.png"], "label": "y/a.png"}}
        save("dataset.json", {"labels": {"background": 0, "road": 1}, "file_ending": ".png", "dataset": cases})
        listed = [("a", ["a_0000.png", "a_0001.png"], "a.png")]
        assert files(read_dataset(tmp_path)) == listed
        touch("imagesTs/t_0000.png", "imagesTs/a_0000.png", "imagesTr/b_0000.png")
        assert files(read_dataset(tmp_path)) == [*listed, ("t", ["t_0000.png"], None)]

    def test_channels_are_counted_as_dataset_json_names_them(self, save, touch, tmp_path):
        """A case without its first channel would count as one of its own."""
        touch("imagesTr/a_0000.mha", "imagesTr/a_0001.mha", "imagesTr/b_0001.mha", "imagesTr/c_0000.mha")
        save("dataset.json", {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".mha"})
        dataset = read_dataset(tmp_path)
        assert files(dataset) == [
            ("a", ["a_0000.mha", "a_0001.mha"], None),
            ("b", ["b_0001.mha"], None),
            ("c", ["c_0000.mha"], None),
        ]
        assert dataset.channels == ("T1", "T2")
        save("dataset.json", {"modality": {"0": "CT"}, "training": [{"image": "a.mha"}]})
        assert read_dataset(tmp_path).channels == ("CT",)
        save("dataset.json", {"modality": "CT", "training": [{"image": "a.mha"}]})
        assert read_dataset(tmp_path).channels == ()

    def test_its_dataset_json_stands_for_the_folder(self, save, touch, tmp_path):
        touch("imagesTr/a_0000.mha", "labelsTr/a.mha")
        path = save("dataset.json", {"labels": {"background": 0, "liver": 1}, "file_ending": ".mha", "source": "us"})
        assert read_dataset(path) == read_dataset(tmp_path) == dataset_of(path)

    def test_without_a_list(self, touch, tmp_path):
        touch("imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/a.nii.gz")
        dataset = read_dataset(tmp_path)
        assert files(dataset) == [("a", ["a.nii.gz"], "a.nii.gz"), ("b", ["b.nii.gz"], None)]
        assert dataset.labels == {} and dataset.name == tmp_path.name

    def test_of_another_kind_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"neither a dataset\.json nor a folder imagesTr; medseg3d reads"):
            read_dataset(tmp_path)


class TestCsv:
    @pytest.mark.parametrize(
        "text",
        [
            "a.nii.gz,a_seg.nii.gz\nb.nii.gz,\n",
            "image,label\na.nii.gz,a_seg.nii.gz\nb.nii.gz,\n",
            "\ufeffLabel;Image\r\na_seg.nii.gz;a.nii.gz\r\n;b.nii.gz\r\n\r\n",
            "image\tlabel\tage\na.nii.gz\ta_seg.nii.gz\t64\nb.nii.gz\n",
        ],
    )
    def test_with_and_without_a_first_line(self, text, save):
        dataset = read_dataset(save("list.csv", text))
        assert files(dataset) == [("a", ["a.nii.gz"], "a_seg.nii.gz"), ("b", ["b.nii.gz"], None)]

    def test_patient_split_and_fold(self, save):
        a, b = read_dataset(save("list.csv", "x/a.mha,x/a_seg.mha,p1\nx/b.mha,x/b_seg.mha,p1\n")).cases
        assert a.patient == b.patient == "p1"
        text = "image,label,split,fold\na.mha,s.mha,val,\nb.mha,s.mha,train,2\nc.mha,,test,\n"
        cases = read_dataset(save("list.csv", text)).cases
        assert [(c.split, c.fold) for c in cases] == [("validation", None), ("train", 2), ("test", None)]

    def test_as_spreadsheets_write_it(self, save):
        (a,) = read_dataset(save("list.csv", "image,label,fold,\na.mha,s.mha,1.0,\n")).cases
        assert a.fold == 1
        (a,) = read_dataset(save("list.csv", "a.mha,s.mha,p1,,\n")).cases
        assert a.patient == "p1"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "lists no case"),
            ("a,b,c,d\n", "a row has the columns image, label, patient, got 4"),
            ("image,split\na,held-out\n", "a split is one of train, validation, test"),
            ("image,fold\na,one\n", "a fold a whole number"),
            ("image,label\n,a_seg.nii.gz\n", "has an image"),
            ("image,image,label\na,b,c\n", "the first line names image more than once"),
            ("scan,mask\na.nii.gz,b.nii.gz\n", r"'scan,mask' is no case, .* must be image,label\[,patient"),
        ],
    )
    def test_errors(self, text, message, save):
        path = save("list.csv", text)
        with pytest.raises(ValueError, match=message):
            read_dataset(path)


def test_other_files_are_refused(save, tmp_path):
    with pytest.raises(ValueError, match="is no data set; medseg3d reads a MONAI or MSD datalist"):
        read_dataset(save("ct.nii.gz", ""))
    with pytest.raises(FileNotFoundError):
        read_dataset(tmp_path / "nowhere.json")


class TestWriting:
    def test_reads_back_as_it_was(self, tmp_path):
        inside, outside = tmp_path / "lists" / "ct", Path("/elsewhere")
        cases = (
            Case("a", (inside / "a.nii.gz",), inside / "a_seg.nii.gz", "p", "train", 4, (1,)),
            Case("b", (outside / "b1.mha", outside / "b2.mha"), outside / "seg.mha", "p", "validation"),
            Case("c", (inside / "c.nii.gz",), None, "c", "test"),
        )
        dataset = Dataset("two organs", tmp_path / "lists", cases, {0: "background", 1: "liver", 5: "Milz"}, True)
        dataset = replace(dataset, channels=("CT", "PET"))
        path = write_datalist(dataset, tmp_path / "lists" / "out.json")
        assert read_dataset(path) == dataset
        document = json.loads(path.read_text())
        assert document["training"][0]["image"] == "ct/a.nii.gz"
        assert document["validation"][0]["image"] == ["/elsewhere/b1.mha", "/elsewhere/b2.mha"]
        entry = load_decathlon_datalist(str(path), True, "training")[0]
        assert Path(entry["image"]) == inside / "a.nii.gz" and entry["fold"] == 4


class TestWhatIsNotRead:
    """Columns, lists and cases that would be lost without a word are told."""

    def test_columns_of_other_names(self, save):
        dataset = read_dataset(save("list.csv", "image,label,subject_id\na.nii.gz,a_seg.nii.gz,7\n"))
        assert dataset.notes == ("the column 'subject_id' is not read: columns are image, label, patient, split, fold",)
        assert read_dataset(save("list.csv", "image,label,patient\na.nii.gz,b.nii.gz,7\n")).notes == ()

    def test_lists_of_other_names(self, save):
        entries = [{"image": "a.nii.gz", "label": "a_seg.nii.gz"}]
        document = {"training": entries, "val": entries, "modalities": ["CT"]}
        (note,) = read_dataset(save("list.json", document)).notes
        assert note == "the list 'val' is not read: lists of cases are training, validation, testing, test"

    def test_a_folder_with_fewer_cases_than_it_says(self, save, touch, tmp_path):
        touch("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/t_0000.nii.gz")
        save("dataset.json", {"labels": {"background": 0, "liver": 1}, "numTraining": 2})
        assert read_dataset(tmp_path).notes == ("numTraining is 2, there are 1 cases to train on",)
        save("dataset.json", {"labels": {"background": 0, "liver": 1}, "numTraining": 1})
        assert read_dataset(tmp_path).notes == ()
        save("dataset.json", {"training": [{"image": "imagesTr/a_0000.nii.gz"}], "numTraining": 2})
        assert read_dataset(tmp_path).notes == ("numTraining is 2, there are 1 cases to train on",)

    def test_files_of_one_name_in_two_formats(self, touch, tmp_path):
        touch("imagesTr/a_0000.nii", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/a.nrrd")
        dataset = read_dataset(tmp_path)
        assert files(dataset) == [("a", ["a_0000.nii"], "a.nii.gz")]
        assert dataset.notes == (
            "labelsTr/a.nrrd is not read: a.nii.gz has that name too",
            "imagesTr/a_0000.nii.gz is not read: a_0000.nii has that name too",
        )


@pytest.mark.parametrize(
    ("entry", "labels", "message"),
    [
        ({"fold": "one"}, {}, "a: a fold is a whole number, 0 or more, got 'one'"),
        ({"fold": 0.5}, {}, "a: a fold is a whole number, 0 or more, got 0.5"),
        ({"contoured": "liver"}, {}, r"a: .contoured. is a list of label numbers, such as \[1, 2\], got 'liver'"),
        ({"contoured": ["liver"]}, {}, "a: a label is a whole number, 0 or more, got 'liver'"),
        ({}, {"liver": "one"}, "the label 'liver' is a whole number, 0 or more, got 'one'"),
    ],
)
def test_a_word_in_the_place_of_a_number(entry, labels, message, save):
    document = {"labels": labels, "training": [{"image": "a.nii.gz", **entry}]}
    with pytest.raises(ValueError, match=f"list.json: {message}"):
        read_dataset(save("list.json", document))


def test_what_lists_no_case(save, touch, tmp_path):
    with pytest.raises(ValueError, match=r"empty.csv lists no case: a row has an image"):
        read_dataset(save("empty.csv", ""))
    with pytest.raises(ValueError, match=r"the first line names columns, and none is image: label, patient"):
        read_dataset(save("no_image.csv", "label,patient\na_seg.nii.gz,a\n"))
    touch("imagesTr/a_0000.nii.gz")
    save("dataset.json", {"labels": {}, "file_ending": ".nrrd"})
    with pytest.raises(ValueError, match=r"imagesTr holds no image that ends in '.nrrd', the file_ending of"):
        read_dataset(tmp_path)
