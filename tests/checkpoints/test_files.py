"""Where weights come from: every kind of file is read, or refused in words that say what it is and what to do."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from medseg3d.checkpoints import load_checkpoint
from tests.checkpoints.conftest import assert_same, copy_of, filled


def network():
    return torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.BatchNorm3d(4))


@pytest.fixture
def source():
    return filled(network())


@pytest.fixture
def refused():
    """refused(path, words): loading raises ValueError with all of the words, and changes nothing."""

    def check(path, *words, error=ValueError):
        target = network()
        before = copy_of(target)
        with pytest.raises(error) as caught:
            load_checkpoint(target, path)
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "\n" not in message
        assert_same(target.state_dict(), before)

    return check


def loads(path, source):
    target = network()
    report = load_checkpoint(target, path)
    assert_same(target.state_dict(), source.state_dict())
    assert report.complete and report.used == 1
    return report


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def as_bytes(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a", "a.safetensors"])
def test_the_content_says_what_a_file_is(write, source, name):
    loads(write(source.state_dict(), name), source)
    loads(str(write(source.state_dict(), name)), source)


def test_files_of_pytorch_before_1_6(tmp_path, source):
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    loads(tmp_path / "a.pth", source)


def test_safetensors_of_others(tmp_path, source):
    safetensors.torch.save_file(dict(source.state_dict()), tmp_path / "a.safetensors", metadata={"format": "pt"})
    loads(tmp_path / "a.safetensors", source)
    safetensors.torch.save_file(dict(source.state_dict()), tmp_path / "b.bin")
    loads(tmp_path / "b.bin", source)


def test_mappings(source):
    assert loads(source.state_dict(), source).source == "the given mapping"
    loads({"epoch": 4, "state_dict": source.state_dict()}, source)
    loads(
        {
            "model": torch.nn.ParameterDict(),
            "state_dict": dict(source.named_parameters()) | dict(source.named_buffers()),
        },
        source,
    )


def test_a_zip_with_one_checkpoint(tmp_path, source):
    data = as_bytes({"state_dict": source.state_dict()})
    path = zipped(tmp_path / "fold1.zip", **{"model.pt": data, "__MACOSX/._model.pt": b"x", "readme.txt": b"hello"})
    assert loads(path, source).source == f"{path}/model.pt"
    inner = safetensors.torch.save(dict(source.state_dict()), {"medseg3d": '{"format": 1, "network": "Other"}'})
    report = loads(zipped(tmp_path / "b.zip", **{"w/a.safetensors": inner}), source)
    assert report.notes == ["the file was saved from a Other, the network is a Sequential"]


def test_scores_that_trainers_store_as_numpy_numbers(write, source):
    scores = {"best_acc": np.float64(0.83), "epoch": np.int64(3), "loss": np.float32(0.1), "done": np.bool_(True)}
    loads(write({"state_dict": source.state_dict(), **scores}), source)
    numpy_1 = as_bytes({"state_dict": source.state_dict(), "best_acc": np.float64(0.83)})
    path = write({})
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        renamed = rezipped(numpy_1, lambda data, name=name: data.replace(b"numpy._core.multiarray", name))
        path.write_bytes(renamed)
        loads(path, source)


def rezipped(data, change):
    """A file of torch.save with another pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            new.writestr(member.filename, change(content) if member.filename.endswith("data.pkl") else content)
    return stream.getvalue()


def test_the_weights_among_other_sets_of_tensors(write, source, refused):
    state, other = source.state_dict(), {"a.weight": torch.ones(3)}
    report = loads(write({"state_dict": state, "ema": other}), source)
    assert report.notes == ["the weights are its entry 'state_dict'; it also holds 'ema'"]
    loads(write({"checkpoint": {"model": state, "epoch": torch.tensor(3)}}), source)
    refused(
        write({"teacher": state, "student": other}),
        "several sets of tensors: 'teacher' (7), 'student' (1)",
        "['teacher']",
    )


def test_no_tensors(write, refused):
    refused(write({"epoch": 3, "args": {"lr": 0.1}}), "holds no tensors by name", "'epoch' (int), 'args' (dict)")
    refused(write([torch.ones(3)]), "holds no tensors by name", "it holds a list")
    refused(write(torch.ones(3)), "it holds a Tensor")
    refused({}, "the given mapping holds no tensors", "it holds nothing")


def test_no_file(tmp_path, write, refused):
    refused(tmp_path / "none.pt", "there is no file", "none.pt", error=FileNotFoundError)
    refused(tmp_path, "is a folder", "there is no .pt", error=IsADirectoryError)
    path = write({"a": torch.ones(2)}, "model.pt")
    refused(tmp_path, "is a folder", f"did you mean {path}?", error=IsADirectoryError)
    refused("https://example.org/model.pt", "is an address", "download the file and give its path")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(write, refused):
    path = write({"a": torch.ones(2)})
    path.chmod(0)
    refused(path, error=PermissionError)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty (0 bytes)", "get the file again")),
        (b"<!DOCTYPE html><html><title>Sign in</title></html>", ("is a web page", "get the file again")),
        (b"\n  <html>", ("is a web page",)),
        (b'{"error": "not found"}', ("is text (JSON)",)),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ("is a Git LFS pointer", "`git lfs pull`")),
        (gzip.compress(b"weights"), ("is compressed with gzip: unpack it first",)),
        (b"\x89HDF\r\n\x1a\n", ("is an HDF5 file",)),
        (b"\x7fELF\x02\x01\x01", ("is no file of weights that is known here", "begins with b'\\x7fELF")),
        (b"\x80", ("is a Python pickle",)),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, refused, content, words):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    refused(path, str(path), *words)


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.7, 0.999])
def test_a_file_that_was_cut_short(tmp_path, source, refused, kind, part):
    path = tmp_path / "weights"
    if kind == "safetensors":
        safetensors.torch.save_file(dict(source.state_dict()), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    refused(path, str(path), "is damaged or was cut short", "get the file again")


def test_a_byte_that_changed_on_the_way(write, source, refused):
    """PyTorch does not look at the checksums that it writes."""
    path = write(source.state_dict())
    data = bytearray(path.read_bytes())
    where = data.find(source[0].weight.detach().numpy().tobytes())
    data[where + 5] ^= 0x40
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    refused(path, "is damaged or was cut short", "CRC")


def test_files_without_checksums(write, source):
    torch.serialization.set_crc32_options(False)
    try:
        path = write(source.state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    loads(path, source)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, source, refused, new):
    witness, path = tmp_path / "it_ran", tmp_path / "weights.pt"
    torch.save({"state_dict": source.state_dict(), "x": RunsCode(witness)}, path, _use_new_zipfile_serialization=new)
    refused(
        path,
        "holds code or objects other than tensors",
        "posix.mkdir",
        "nothing of it was read or run",
        "weights_only=False",
    )
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists()  # it would have


def test_whole_networks_and_other_objects_are_refused(write, source, refused):
    refused(write(source), "holds code or objects other than tensors (torch.nn.modules", "content.state_dict()")
    path = write({})
    path.write_bytes(pickle.dumps({"state_dict": RunsCode(path.with_name("never"))}))
    refused(path, "is a Python pickle and none of PyTorch's", "reading one can run code")
    assert not path.with_name("never").exists()


def test_programs_are_refused(tmp_path, source, refused):
    traced = torch.jit.trace(source, torch.ones(1, 1, 4, 4, 4))
    traced.save(tmp_path / "model.ts")
    refused(tmp_path / "model.ts", "is a TorchScript archive", "so it was not read", "torch.jit.load(")
    exported = torch.export.export(source, (torch.ones(1, 1, 4, 4, 4),))
    torch.export.save(exported, tmp_path / "model.pt2")
    refused(tmp_path / "model.pt2", "is an exported program", "torch.export.load(")


def test_zips_without_one_checkpoint(tmp_path, source, refused):
    data = as_bytes(source.state_dict())
    refused(zipped(tmp_path / "a.zip", **{"a.txt": b"", "b.npy": b""}), "a zip with 0 files of weights", "a.txt, b.npy")
    refused(zipped(tmp_path / "b.zip", **{"a.pt": data, "b.pt": data}), "a zip with 2 files of weights", "a.pt, b.pt")
    refused(zipped(tmp_path / "c.zip", **{"a.pt": data[:500]}), "c.zip/a.pt is damaged")


def test_quantised_weights_are_not_guessed(write, source, refused):
    state = {**source.state_dict(), "0.weight": torch.zeros(4, 1, 3, 3, 3, dtype=torch.int8)}
    refused(write(state), "holds 0.weight as torch.int8", "quantised")


def test_files_of_a_later_format_are_refused(write, source, refused):
    record = {"format": 2, "version": "9.0"}
    refused(write({"state_dict": source.state_dict(), "medseg3d": record}), "a later medseg3d (9.0)", "update medseg3d")
