"""Models of pictures: from a file or an array to classes, objects or segments on its own pixels, and to files."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from monai.bundle import run as monai_run
from PIL import Image

from medseg3d import load_model
from medseg3d.catalogue import find_bundle
from medseg3d.io import read_coco, read_image, read_label_image, read_panoptic, write_image
from medseg3d.tasks import Instances, Panoptic, SemanticMap
from tests import tiny_pictures as tiny
from tests.command_line import names


@pytest.fixture(scope="module")
def picture_bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picture bundles")
    kinds = {kind: tiny.write_picture_bundle(folder / f"cells_{kind}", kind) for kind in tiny.NAMES}
    return SimpleNamespace(**kinds, detector=tiny.write_picture_bundle(folder / "cells_detector", "instances", True))


@pytest.fixture(scope="module")
def picture_models(picture_bundles):
    models = {name: load_model(path, "cpu", trust=True) for name, path in vars(picture_bundles).items()}
    return SimpleNamespace(**models)


@pytest.fixture
def file(tmp_path):
    return tiny.write_picture(tmp_path / "in" / "cells.png")


# From a picture to a value


def test_classes(picture_models, file):
    found = picture_models.semantic.predict(file)
    assert isinstance(found.result, SemanticMap) and found.labels == {1: "cell"} and found.warnings == ()
    np.testing.assert_array_equal(found.result.classes, tiny.inside())
    assert {"read", "preprocess", "network", "postprocess"} <= set(found.seconds)


def test_numbered_objects(picture_models, file):
    found = picture_models.instances.predict(file)
    assert isinstance(found.result, Instances) and found.result.categories[1].name == "cell"
    np.testing.assert_array_equal(found.result.label_map(), tiny.numbered())
    assert found.result.scores.tolist() == [1, 1, 1] and found.result.classes.tolist() == [1, 1, 1]


def test_a_detector(picture_models, file):
    found = picture_models.detector.predict(file).result
    assert isinstance(found, Instances) and found.classes.tolist() == [2, 1, 2]
    np.testing.assert_array_equal(found.label_map(), tiny.numbered())
    np.testing.assert_array_equal(found.scores, np.float32(np.bincount(tiny.numbered().ravel())[1:]) / 400)
    assert found.boxes[0].tolist() == found.regions[0].box.tolist()


def test_segments(picture_models, file):
    found = picture_models.panoptic.predict(file).result
    assert isinstance(found, Panoptic)
    assert [segment.category for segment in found.segments.values()] == [1, 1, 1, 2]
    assert [found.is_thing(number) for number in found.segments] == [True, True, True, False]
    expected = np.where(tiny.inside(), tiny.numbered(), 4)
    expected[:, -1] = 0
    np.testing.assert_array_equal(found.ids, expected)


def as_rgb(array):
    return np.stack([array] * 3, axis=-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array,
        as_rgb,
        lambda array: array.astype(np.uint16) * 257,
        lambda array: array.astype(np.float32) / 1000 - 5,
        lambda array: array > 100,
        Image.fromarray,
    ],
)
def test_arrays_of_any_depth_and_colour(change, picture_models):
    image = change(tiny.picture())
    before = np.array(image)
    found = picture_models.instances.predict(image)
    np.testing.assert_array_equal(found.result.label_map(), tiny.numbered())
    np.testing.assert_array_equal(np.array(image), before)
    assert found.source == "picture"


def palette(path):
    picture = Image.fromarray(np.where(tiny.inside(), 3, 7).astype(np.uint8)).convert("P")
    colors = np.zeros((256, 3), np.uint8)
    colors[3], colors[7] = tiny.BRIGHT, tiny.DARK
    picture.putpalette(colors.tobytes())
    picture.save(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("deep.png", lambda path: write_image(path, tiny.picture().astype(np.uint16) * 257)),
        ("deep.tif", lambda path: write_image(path, tiny.picture().astype(np.uint16) * 13)),
        ("palette.png", palette),
        ("color.PNG", lambda path: Image.fromarray(as_rgb(tiny.picture())).save(path)),
        ("photo.jpg", lambda path: Image.fromarray(tiny.picture()).save(path, quality=95)),
        ("old.bmp", lambda path: Image.fromarray(tiny.picture()).save(path)),
        ("bilevel.png", lambda path: Image.fromarray(tiny.inside()).save(path)),
    ],
)
def test_files_of_any_kind(name, write, picture_models, tmp_path):
    write(tmp_path / name)
    found = picture_models.instances.predict(tmp_path / name).result
    np.testing.assert_array_equal(found.label_map(), tiny.numbered())


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_pillow_images_are_what_their_files_are(mode, picture_models, file, tmp_path):
    image = Image.open(file).convert("RGB").quantize(8) if mode == "P" else Image.open(file).convert(mode)
    image.save(tmp_path / "saved.png")
    seen = [picture_models.semantic.read(one).pixels for one in (image, tmp_path / "saved.png")]
    np.testing.assert_array_equal(*seen)


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (5, 3), (25, 24)])
def test_pictures_smaller_than_a_window(shape, picture_models):
    image = np.zeros(shape, np.uint8)
    image[0, 0] = 255
    found = picture_models.instances.predict(image).result
    assert found.shape == shape and len(found) == (1 if image.size > 1 else 0)


def test_nothing_found(picture_models, tmp_path):
    for name, model in vars(picture_models).items():
        found = model.predict(np.zeros((30, 20), np.uint8))
        assert name == "panoptic" or "nothing was found" in found.warnings[0]
        found.save(tmp_path / f"{name}.png")
        found.preview(tmp_path / f"{name}.preview.png")
    picture_models.instances.predict(np.zeros((30, 20), np.uint8)).save(tmp_path / "none.json")
    assert len(read_coco(tmp_path / "none.json").instances(1)) == 0


def test_mirror_images_and_overlap(picture_bundles, file):
    model = load_model(picture_bundles.instances, "cpu", trust=True, mirror=True, overlap=0.25, precision="fp32")
    np.testing.assert_array_equal(model.predict(file).result.label_map(), tiny.numbered())
    assert model.inferer.overlap == 0.25 and model.precision == "float32"


# What is refused


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((0, 5), np.uint8), "has no pixel"),
        (np.zeros((4, 5, 6), np.uint8), "rows, columns.*a scan takes another model"),
        (np.zeros(4, np.uint8), "rows, columns"),
        (np.full((4, 5), np.nan, np.float32), "20 values of the picture are NaN or infinite"),
        (np.array([["a"]]), "must be numbers"),
    ],
)
def test_arrays_that_are_no_picture(image, reason, picture_models):
    with pytest.raises(ValueError, match=reason):
        picture_models.instances.predict(image)


def test_files_that_are_no_picture(picture_models, models, ct_file, file, tmp_path):
    with pytest.raises(FileNotFoundError):
        picture_models.instances.predict(tmp_path / "none.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*empty\.png"):
        picture_models.instances.predict(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"ct\.nii\.gz is no picture, and cells_instances 0\.5\.3 segments pictures"):
        picture_models.instances.predict(ct_file)
    with pytest.raises(ValueError, match=r"cells\.png is a picture, not a scan"):
        models.threshold.predict(file)


@pytest.mark.parametrize("option", ["strategy", "uncertainty", "max_ram", "max_vram", "crop_body"])
def test_options_of_scans(option, picture_bundles):
    with pytest.raises(ValueError, match=f"{option} is for scans, and cells_semantic segments pictures"):
        load_model(picture_bundles.semantic, "cpu", trust=True, **{option: "slices"})


def test_weights_of_another_number_of_classes(tmp_path):
    folder = tiny.write_picture_bundle(tmp_path / "cells_five", "semantic", classes=5)
    with pytest.raises(ValueError, match=r"the weights of cells_five do not fit its Bright.*\(5, 3, 1, 1\)"):
        load_model(folder, "cpu", trust=True)


def test_bundles_that_do_not_say_what_they_do(tmp_path):
    def refused(reason, kind="instances", detector=False, **changes):
        folder = tiny.write_picture_bundle(tmp_path / "cells_wrong", kind, detector, **changes)
        with pytest.raises(ValueError, match=re.escape(reason)):
            load_model(folder, "cpu", trust=True).predict(tiny.picture())

    nothing = {"_target_": "Compose", "transforms": []}
    argmax = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
    enlarged = {"_target_": "Resized", "keys": "pred", "spatial_size": [9, 9], "mode": "nearest"}
    refused("LoadPictured", preprocessing={"_target_": "LoadImaged", "keys": "image"})
    refused("leaves whole numbers (1, rows, columns), got the shape (2, 40, 52)", postprocessing=nothing)
    refused("got fractions", postprocessing={"_target_": "Lambdad", "keys": "pred", "func": "$lambda p: p[:1] + 0.3"})
    refused("leaves whole numbers (1, rows, columns), got dict", "semantic", detector=True, postprocessing=nothing)
    refused("leaves whole numbers (2, rows, columns)", "panoptic", postprocessing=argmax)
    both = {"_target_": "Compose", "transforms": [argmax, enlarged]}
    refused("gives (9, 9), but the picture has (40, 52)", postprocessing=both)
    lacking = {"_target_": "Lambdad", "keys": "pred", "func": "$lambda p: {'masks': p['masks']}"}
    refused("this one lacks boxes, labels, scores", detector=True, postprocessing=lacking)
    numbers = {"_target_": "Lambdad", "keys": "pred", "func": "$lambda p: p['masks'].sum(0)"}
    refused("all of one class, but there are 2", detector=True, postprocessing=numbers)
    refused("must return a tensor", inferer="$lambda image, network: 5")


def test_mirror_images_and_windows_of_a_detector(picture_bundles):
    with pytest.raises(ValueError, match="leave mirror out"):
        load_model(picture_bundles.detector, "cpu", trust=True, mirror=True)
    with pytest.raises(ValueError, match="overlap is of windows, which SimpleInferer does not have"):
        load_model(picture_bundles.detector, "cpu", trust=True, overlap=0.3)


def test_what_a_bundle_makes_of_pictures(picture_bundles, bundles):
    kinds = {name: find_bundle(path).pictures for name, path in vars(picture_bundles).items()}
    assert kinds == {"semantic": "semantic", "instances": "instances", "panoptic": "panoptic", "detector": "instances"}
    assert find_bundle(bundles.zoo).pictures is None and find_bundle("headneck_ct_unet").pictures is None


# Files


def test_save(picture_models, file, tmp_path):
    classes = picture_models.semantic.predict(file)
    np.testing.assert_array_equal(read_label_image(classes.save(tmp_path / "classes.tif")), tiny.inside())
    assert json.loads((tmp_path / "classes.labels.json").read_text())["labels"][0]["name"] == "cell"
    with pytest.raises(ValueError, match="holds objects"):
        classes.save(tmp_path / "classes.json")

    objects = picture_models.detector.predict(file)
    written = read_image(objects.save(tmp_path / "objects.png"))
    assert written.dtype == np.uint16
    np.testing.assert_array_equal(written, tiny.numbered())
    again = read_coco(objects.save(tmp_path / "objects.json")).instances(1)
    np.testing.assert_array_equal(again.masks, objects.result.masks)
    np.testing.assert_array_equal(again.scores, objects.result.scores)
    assert again.classes.tolist() == [2, 1, 2]

    segments = picture_models.panoptic.predict(file)
    segments.save(tmp_path / "segments.png")
    again = read_panoptic(segments.save(tmp_path / "segments.json"), tmp_path).panoptic(1)
    np.testing.assert_array_equal(again.ids, segments.result.ids)
    assert again.segments == segments.result.segments and again.categories == segments.result.categories
    with pytest.raises(ValueError, match="jpg"):
        objects.save(tmp_path / "objects.jpg")


def test_plot_shows_the_objects_and_their_number(picture_models, file):
    found = picture_models.instances.predict(file)
    drawn = np.asarray(found.plot(size=(520, 400)))
    assert drawn.dtype == np.uint8 and drawn.shape[2] == 3
    picture = drawn[60:380:8, 20:436:8][: tiny.SHAPE[0], : tiny.SHAPE[1]]  # each pixel is drawn as 8 x 8
    colored = picture.max(axis=-1).astype(int) - picture.min(axis=-1) > 20
    assert (colored == tiny.inside()).mean() > 0.9


def run_by_monai(bundle, pictures, out):
    config = bundle / "configs" / "inference.json"
    monai_run(config_file=str(config), bundle_root=str(bundle), dataset_dir=str(pictures), output_dir=str(out))


@pytest.mark.parametrize("name", ["semantic", "instances", "panoptic", "detector"])
def test_monais_command_writes_the_same(name, picture_bundles, picture_models, file, tmp_path):
    tiny.write_picture(tmp_path / "in" / "turned.png", as_rgb(tiny.picture()[::-1]))
    run_by_monai(getattr(picture_bundles, name), tmp_path / "in", tmp_path / "monai")
    assert all(r.error is None for r in getattr(picture_models, name).predict_many(tmp_path / "in", tmp_path / "out"))
    written = names(tmp_path / "monai")
    assert len(written) == 4
    for file_name in written:
        assert (tmp_path / "monai" / file_name).read_bytes() == (tmp_path / "out" / file_name).read_bytes()


# Many


@pytest.fixture
def folder(tmp_path):
    """Two good pictures, a damaged one between them, and files that are no pictures of the batch."""
    folder = tmp_path / "pictures"
    tiny.write_picture(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"\xff\xd8 not much of a JPEG")
    tiny.write_picture(folder / "c.tif", tiny.picture()[::-1].copy())
    tiny.write_picture(folder / "a_seg.png")
    tiny.write_picture(folder / "a.preview.png")
    (folder / "notes.txt").write_text("")
    return folder


def test_a_folder(picture_bundles, run, folder, tmp_path):
    out = tmp_path / "out"
    arguments = ("predict", "-i", folder, "-o", out, "-m", picture_bundles.detector, "--trust", "-d", "cpu", "-p")
    code, lines, errors = run(*arguments, "--report")
    assert code == 4 and any("b.jpg" in line and "error" in line for line in errors)
    skipped = {line.split(": ")[0].rpartition("/")[2] for line in errors if line.startswith("skipped")}
    assert skipped == {"a_seg.png", "a.preview.png", "notes.txt"}
    files = [f"{name}{end}" for name in "ac" for end in (".preview.png", "_seg.json", "_seg.png")]
    whole = ["failures.csv", "finished.json", "instances.json", "run.json"]
    assert names(out) == sorted([*files, *whole])
    assert {line.rpartition("/")[2] for line in lines} == {*files, "run.json"}
    np.testing.assert_array_equal(read_label_image(out / "a_seg.png"), tiny.numbered())

    joined = read_coco(out / "instances.json")
    assert {n: image.file_name for n, image in joined.images.items()} == {1: "a.png", 2: "c.tif"}
    for number, name in enumerate("ac", start=1):
        own = read_coco(out / f"{name}_seg.json").instances(1)
        np.testing.assert_array_equal(joined.instances(number).masks, own.masks)
    ids = [entry["id"] for entry in json.loads((out / "instances.json").read_text())["annotations"]]
    assert ids == list(range(1, 7))


def test_the_objects_of_a_folder_are_those_of_all_runs_of_a_model(picture_models, tmp_path):
    for name in "ab":
        tiny.write_picture(tmp_path / f"{name}.png")
        (result,) = picture_models.detector.predict_many(tmp_path / f"{name}.png", tmp_path / "out")
        assert result.error is None
    files = [image.file_name for image in read_coco(tmp_path / "out" / "instances.json").images.values()]
    assert files == ["a.png", "b.png"]
    tiny.write_picture(tmp_path / "c.png")
    list(picture_models.instances.predict_many(tmp_path / "c.png", tmp_path / "out"))  # it has other classes
    (image,) = read_coco(tmp_path / "out" / "instances.json").images.values()
    assert image.file_name == "c.png"


def test_resume(picture_bundles, run, folder, tmp_path):
    out = tmp_path / "out"
    arguments = ("predict", "-i", folder, "-o", out, "-m", picture_bundles.panoptic, "--trust", "-d", "cpu", "--resume")
    assert run(*arguments)[0] == 4
    before = (out / "a_seg.png").stat().st_mtime_ns
    tiny.write_picture(folder / "b.png")
    (folder / "b.jpg").unlink()
    code, _, errors = run(*arguments)
    assert code == 0 and sum("finished by an earlier run" in line for line in errors) == 2
    assert (out / "a_seg.png").stat().st_mtime_ns == before
    joined = read_panoptic(out / "panoptic.json", out)
    assert [image.file_name for image in joined.images.values()] == ["a.png", "b.png", "c.tif"]
    np.testing.assert_array_equal(joined.panoptic(2).ids, joined.panoptic(1).ids)


def test_one_file(picture_bundles, run, file, tmp_path):
    target = tmp_path / "out" / "objects.tif"
    code, lines, _ = run("predict", "-i", file, "-o", target, "-m", picture_bundles.instances, "--trust", "-d", "cpu")
    assert code == 0 and lines == [str(target), str(target.with_suffix(".json"))]
    assert names(target.parent) == ["objects.json", "objects.tif"]


def test_what_is_written_in_part_is_removed(picture_models, file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("medseg3d.pictures.write_named_result", full)
    (outcome,) = picture_models.instances.predict_many(file, tmp_path / "out")
    assert "no space left" in outcome.error and names(tmp_path / "out") == ["failures.csv"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-i", "{ct}", "-o", "out", "-m", "{picture}"), "a scan, but the model segments pictures"),
        (("-i", "{png}", "-o", "out", "-m", "{scan}"), "a picture, but the model segments scans"),
        (("-i", "{png}", "-o", "out", "-m", "{picture}", "{scan}"), "several models at once are for scans"),
        (("-i", "{png}", "-o", "out", "-m", "{picture}", "--crop-body"), "--crop-body is for scans"),
        (("-i", "{png}", "-m", "{picture}", "--plan"), "--plan is for scans"),
        (("-i", "{png}", "-o", "out/a.nii.gz", "-m", "{picture}"), "cannot write .nii.gz"),
        (("-i", "{png}", "-o", "out/a.jpg", "-m", "{picture}"), "cannot write .jpg"),
        (("-i", "{ct}", "-o", "out/a.png", "-m", "{scan}"), "cannot write .png"),
        (("-i", "{png}", "-o", "{png}", "-m", "{picture}"), "is an input"),
    ],
)
def test_combinations_that_make_no_sense(
    arguments, reason, run, picture_bundles, bundles, ct_file, file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    known = {"ct": ct_file, "png": file, "picture": picture_bundles.instances, "scan": bundles.threshold}
    code, lines, errors = run("predict", *(a.format(**known) for a in arguments), "--trust", "-d", "cpu")
    assert (code, lines) == (2, []) and reason in " ".join(errors)
    assert not (tmp_path / "out").exists()


def test_a_relative_folder_is_not_taken_for_a_model_that_ships(picture_bundles, run, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(picture_bundles.instances, tmp_path / "headneck_ct_unet")
    code, lines, _ = run("predict", "-i", file, "-o", "out", "-m", "./headneck_ct_unet", "--trust", "-d", "cpu")
    assert code == 0 and "out/cells_seg.png" in lines
