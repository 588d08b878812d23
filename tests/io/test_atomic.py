import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medseg3d.io import write_atomic


def fill(path):
    return path.write_bytes(b"whole")


def test_a_file_appears_with_missing_folders_and_its_suffix(tmp_path):
    seen = []
    target = write_atomic(tmp_path / "new" / "seg.nii.gz", fill, check=lambda *given: seen.extend(given))
    assert target.read_bytes() == b"whole"
    path, written = seen
    assert path.name.endswith(".nii.gz") and path.parent == target.parent and path != target
    assert written == len(b"whole")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
@pytest.mark.parametrize("where", ["write", "check"])
def test_an_exception_leaves_the_older_file_and_nothing_else(tmp_path, error, where):
    target = tmp_path / "seg.nii.gz"
    target.write_bytes(b"older")

    def fail(path, *written):
        path.write_bytes(b"half")
        raise error("stopped")

    with pytest.raises(error):
        write_atomic(target, *((fail,) if where == "write" else (fill, fail)))
    assert [(path, path.read_bytes()) for path in tmp_path.iterdir()] == [(target, b"older")]


def test_a_killed_run_leaves_no_file_of_that_name(tmp_path):
    target = tmp_path / "seg.nii.gz"
    code = f"""
from medseg3d.io import write_atomic
def slow(path):
    path.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
write_atomic({str(target)!r}, slow)
"""
    root = Path(__file__).parents[2]
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    assert run.stdout.readline() == b"writing\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not target.exists()
    assert all(path.name.startswith(".") and ".partial" in path.name for path in tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        assert write_atomic(tmp_path / "a.txt", fill).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_full_disk_is_named_with_what_to_do(tmp_path):
    def full(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(
        OSError, match=r"cannot write .*seg\.nii\.gz: no space left on device; free some space"
    ) as caught:
        write_atomic(tmp_path / "seg.nii.gz", full)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match=r"cannot write .*out.*choose another folder"):
        write_atomic(tmp_path / "out" / "seg.nii.gz", fill)


def test_a_name_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "seg.nii.gz").mkdir()
    with pytest.raises(IsADirectoryError, match=r"seg\.nii\.gz: is a directory; choose another name"):
        write_atomic(tmp_path / "seg.nii.gz", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["seg.nii.gz"]


def test_the_longest_names_can_be_written(tmp_path):
    assert write_atomic(tmp_path / f"{'n' * 248}.nii.gz", fill).exists()
