import gzip
import itertools
import threading
import zlib

import numpy as np
import pytest

from medseg3d.io import gz, read_volume
from tests.conftest import ROOT

SIZES = [0, 1, gz._PIECE - 1, gz._PIECE, gz._PIECE + 1, 3 * gz._PIECE + 5]


def some(size, seed=0):
    return memoryview(np.random.default_rng(seed).integers(0, 40, size, dtype=np.uint8))


def sample_ct():
    array = read_volume(ROOT / "medseg3d" / "data" / "sample" / "headneck_template_ct.nii.gz").array
    return array.ravel(order="F").view(np.uint8).data


# Deflating


@pytest.mark.parametrize("sizes", [*itertools.product(SIZES, [0, 3]), (352, SIZES[-1], 7)])
def test_parts_become_one_member(sizes):
    parts = [some(size, seed) for seed, size in enumerate(sizes)]
    content = b"".join(gz.deflated(parts))
    stream = zlib.decompressobj(31)  # unlike gzip.decompress it stops where the first member ends
    assert stream.decompress(content) + stream.flush() == b"".join(parts)
    assert stream.eof and stream.unused_data == b""
    assert gzip.decompress(content) == b"".join(parts)  # compares checksum and length


def test_the_number_of_threads_does_not_show(monkeypatch):
    made = []
    for threads in (1, 3):
        monkeypatch.setattr(gz, "_THREADS", threads)
        made.append(b"".join(gz.deflated([some(352), some(5 * gz._PIECE)])))
    assert made[0] == made[1]


def test_a_ct_takes_no_more_room_than_with_zlib():
    ct = sample_ct()
    assert sum(map(len, gz.deflated([ct]))) <= len(gzip.compress(ct, 1))


def test_threads_end_with_whoever_stops_early():
    before = threading.active_count()
    pieces = gz.deflated([some(5 * gz._PIECE)])
    next(pieces), next(pieces)
    assert threading.active_count() > before
    pieces.close()
    assert threading.active_count() == before


# Inflating


@pytest.mark.parametrize("name", ["a.gz", "a"])
@pytest.mark.parametrize("compressed", [True, False])
def test_files_are_opened_by_content(tmp_path, name, compressed):
    data = bytes(some(3 * gz._PIECE + 5))
    path = tmp_path / name
    path.write_bytes(gzip.compress(data[:1000], 1) + gzip.compress(data[1000:], 1) if compressed else data)
    assert gz.is_compressed(path) == compressed
    with gz.opened(path) as file:
        assert file.read(10) == data[:10]
        file.seek(4)
        buffer = bytearray(len(data) + 10)
        assert gz.read_into(file, memoryview(buffer)) == len(data) - 4
    assert buffer == data[4:] + bytes(14)


def test_a_checksum_beyond_what_is_wanted_counts(tmp_path):
    content = bytearray(gzip.compress(some(3 * gz._PIECE), 1))
    content[-8] ^= 1
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gz is damaged"), gz.opened(tmp_path / "a.gz") as file:
        gz.read_into(file, memoryview(bytearray(gz._PIECE)))
        gz.read_to_end(file)


def test_no_file_inflates_to_more_than_the_ratio(tmp_path):
    zeros = bytes(20 << 20)
    assert len(zeros) / gz.GREATEST_RATIO <= len(zlib.compress(zeros, 9)) < 1.01 * len(zeros) / gz.GREATEST_RATIO


# Sums


def test_a_sum_is_of_all_bytes_and_of_their_order(tmp_path):
    data = bytes(some(2 * gz._PIECE + 9))
    (tmp_path / "a").write_bytes(data)
    whole = gz.Sum.of_file(tmp_path / "a")
    assert whole == gz.Sum(len(data), zlib.crc32(data))
    assert whole == gz.Sum().with_more(data[:100]).with_more(memoryview(data)[100:])
    for other in (data[:-1], data + b"\0", data[:-1] + bytes([data[-1] ^ 1]), data[1:] + data[:1]):
        (tmp_path / "b").write_bytes(other)
        assert gz.Sum.of_file(tmp_path / "b") != whole
