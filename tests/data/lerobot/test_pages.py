"""Single images out of parquet, however the file was written."""

import itertools

import numpy as np
import pytest

from vla_jax.data import errors
from vla_jax.data.lerobot import pages, parquet_bytes
from vla_jax.data.lerobot.pages import ImagePages

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
KEY = "observation.images.front"


def images(count):
    """Random bytes of many lengths, some absent and some alike."""
    rng = np.random.default_rng(0)
    results: list[bytes | None] = [
             rng.integers(0, 255, rng.integers(1, 3000)).astype(np.uint8).tobytes()
             for _ in range(count)]  # fmt: skip
    results[3] = results[7] = None
    results[11] = results[12] = b"the same"
    return results


def write(path, values, nested=True, **options):
    column = [v and {"bytes": v, "path": None} for v in values] if nested else values
    table = arrow.table({"number": np.arange(len(values)), KEY: arrow.array(column)})
    parquet.write_table(table, path, **options)
    return path


WAYS = [
    {"compression": packed, "use_dictionary": words, "data_page_version": version,
     "row_group_size": rows, "write_page_checksum": checked}
    for packed, words, version, rows, checked in itertools.product(
        ("snappy", "none", "zstd", "gzip"), (True, False), ("1.0", "2.0"), (300, 40), (False, True)
    )
]  # fmt: skip


def test_every_way_to_write_them(tmp_path):
    values = images(300)
    order = np.random.default_rng(1).permutation(300).tolist()
    for number, way in enumerate([*WAYS, {"column_encoding": {KEY: "DELTA_LENGTH_BYTE_ARRAY"},
                                          "use_dictionary": False}]):  # fmt: skip
        path = write(tmp_path / f"{number}.parquet", values, number % 2 == 0 and number < len(WAYS),
                     data_page_size=20_000, **way)  # fmt: skip
        content = ImagePages().read(path, KEY, order)
        assert content == [values[i] for i in order], way


@pytest.mark.parametrize("packed", ["none", "snappy"])
def test_a_row_group_of_a_whole_file_is_not_read_for_one_image(tmp_path, monkeypatch, packed):
    rng = np.random.default_rng(0)
    values: list[bytes | None] = [
              b"\xff\xd8 the same head" + rng.bytes(int(rng.integers(100, 9000)))
              for _ in range(2500)]  # fmt: skip
    values[1500] = None
    path = write(tmp_path / "one.parquet", values, use_dictionary=False, compression=packed)
    assert parquet.ParquetFile(path).metadata.num_row_groups == 1
    reader, read = ImagePages(), []
    original = ImagePages._bytes

    def counted(self, path, at, size, whole=True):
        read.append(size)
        return original(self, path, at, size, whole)

    assert reader.read(path, KEY, range(2500)) == values  # where they lie is known from here on
    monkeypatch.setattr(ImagePages, "_bytes", counted)
    for row in (1000, 0, 2499, 1024, 1500):
        assert reader.read(path, KEY, [row]) == [values[row]]
    assert len(read) == 4
    assert max(read) <= 3 << 16
    assert not reader._bytes_kept


def test_pages_that_are_kept_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "_KEPT", 300_000)
    values = images(2000)
    path = write(tmp_path / "x.parquet", values, compression="zstd", row_group_size=100)
    reader = ImagePages()
    assert reader.read(path, KEY, range(2000)) == values
    assert 0 < reader._bytes_kept <= 300_000


def test_what_is_no_column_of_images(tmp_path):
    path = write(tmp_path / "x.parquet", images(20))
    with pytest.raises(errors.MissingCameraError, match=r"no such column: \['number'"):
        ImagePages().read(path, "other", [0])
    with pytest.raises(errors.MissingCameraError, match="holds int64, not encoded images"):
        ImagePages().read(path, "number", [0])
    with pytest.raises(errors.CorruptRecordError, match="has no row 20"):
        ImagePages().read(path, KEY, [20])


def test_damage_is_noticed_or_harmless(tmp_path):
    values = images(60)
    sound = write(tmp_path / "x.parquet", values, write_page_checksum=True, data_page_size=20_000)
    data, rng, noticed = sound.read_bytes(), np.random.default_rng(2), 0
    for at in rng.integers(4, len(data), 60).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path = tmp_path / "damaged.parquet"
        path.write_bytes(damaged)
        try:
            assert ImagePages().read(path, KEY, range(60)) == values
        except errors.DataError:
            noticed += 1
    assert noticed > 40
    assert parquet_bytes.hybrid(b"\x02\x01", 1, 1).tolist() == [1]
