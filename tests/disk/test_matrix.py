"""`influence.npy`: what NumPy reads is what was written, and a file that is not what it says is refused."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.disk import matrix as disk_matrix
from infl_cache.disk.layout import blocks
from infl_cache.disk.matrix import MatrixFile, create_matrix
from infl_cache.errors import DamagedStore

SHAPE = (7, 11)
VALUES = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    create_matrix(tmp_path / "influence.npy", SHAPE)
    return tmp_path / "influence.npy"


def fill(path, values=VALUES):
    matrix = MatrixFile(path, writable=True)
    matrix.write(0, 0, values)
    matrix.sync()
    matrix.close()


@given(st.integers(1, 9), st.integers(1, 13), st.permutations(range(100)))
@settings(max_examples=30, deadline=None)
def test_tiles_in_any_order_make_the_matrix_that_numpy_reads(tmp_path_factory, tile_rows, tile_columns, order):
    path = tmp_path_factory.getbasetemp() / "tiles.npy"
    create_matrix(path, SHAPE)
    tiles = [(rows, columns) for rows in blocks(SHAPE[0], tile_rows) for columns in blocks(SHAPE[1], tile_columns)]
    matrix = MatrixFile(path, writable=True)
    for index in sorted(range(len(tiles)), key=order.index):
        rows, columns = tiles[index]
        matrix.write(rows.start, columns.start, VALUES[rows.start : rows.stop, columns.start : columns.stop])
    for rows, columns in tiles:
        read = matrix.read(rows.start, rows.stop, columns.start, columns.rows)
        np.testing.assert_array_equal(read, VALUES[rows.start : rows.stop, columns.start : columns.stop], strict=True)
    matrix.close()
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(mapped, VALUES, strict=True)


def test_a_tile_of_other_layout_or_type_is_stored_as_its_float32_rows(path):
    fill(path, np.asfortranarray(VALUES.astype(np.float64)))
    np.testing.assert_array_equal(np.load(path), VALUES, strict=True)
    fill(path, VALUES[::-1])
    np.testing.assert_array_equal(np.load(path), VALUES[::-1], strict=True)


def test_nan_and_infinity_are_kept_bit_by_bit(path):
    values = VALUES.copy()
    values[0, :3] = np.nan, np.inf, -0.0
    fill(path, values)
    np.testing.assert_array_equal(np.load(path).view(np.uint32), values.view(np.uint32))


def test_rows_are_read_from_a_column_to_the_end_by_default(path):
    fill(path)
    matrix = MatrixFile(path)
    np.testing.assert_array_equal(matrix.read(2, 5, 4), VALUES[2:5, 4:])
    assert matrix.shape == SHAPE
    matrix.close()


def test_a_matrix_opened_for_reading_cannot_be_written(path):
    fill(path)
    matrix = MatrixFile(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        matrix.write(0, 0, np.zeros(SHAPE, np.float32))
    matrix.close()
    np.testing.assert_array_equal(np.load(path), VALUES)


def test_a_write_that_the_system_cuts_short_is_carried_on_or_an_error(path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 2)], offset))
    try:
        fill(path)
    except OSError:
        return
    np.testing.assert_array_equal(np.load(path), VALUES)


def test_sync_reaches_the_disk(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    matrix = MatrixFile(path, writable=True)
    matrix.sync()
    matrix.close()
    assert synced == [path.stat().st_ino]


def test_a_new_matrix_has_its_whole_size_and_is_synced_with_its_folder(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
    )
    path = tmp_path / "influence.npy"
    create_matrix(path, SHAPE)
    assert path.stat().st_size == np.load(path).nbytes + 128
    assert synced[0] == (path.stat().st_ino, path.stat().st_size)
    assert synced[1][0] == tmp_path.stat().st_ino


@pytest.mark.parametrize("size", [0, 1, 5, 9, 64, 127, 128, -1, -4])
def test_a_truncated_file_is_refused(path, size):
    fill(path)
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(DamagedStore, match=r"influence\.npy: expected .*found"):
        MatrixFile(path)


def test_a_file_with_more_bytes_than_its_shape_is_refused(path):
    fill(path)
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    with pytest.raises(DamagedStore, match=r"expected 436 bytes, found 440"):
        MatrixFile(path)


def test_a_file_cut_while_it_is_open_is_refused(path):
    fill(path)
    matrix = MatrixFile(path)
    os.truncate(path, path.stat().st_size - 4)
    np.testing.assert_array_equal(matrix.read(0, 6), VALUES[:6])
    with pytest.raises(DamagedStore, match="row 6 ends early"):
        matrix.read(5, 7)
    matrix.close()


@pytest.mark.parametrize(
    "array",
    [VALUES.astype(np.float64), VALUES.astype(">f4"), np.asfortranarray(VALUES), VALUES[0], VALUES.astype(np.int32)],
    ids=["float64", "big-endian", "fortran", "one axis", "int32"],
)
def test_another_kind_of_array_is_refused(path, array):
    np.save(path, array)
    with pytest.raises(DamagedStore, match="expected float32 rows in two axes, found"):
        MatrixFile(path)


def test_pickled_objects_are_refused_and_not_run(path, tmp_path):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    np.save(path, np.array([[Touch()]], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedStore, match="expected float32"):
        MatrixFile(path)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DamagedStore, match=r"influence\.npy: expected a NumPy file"):
        MatrixFile(tmp_path / "influence.npy")


@given(st.integers(0, 127), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_of_the_header_is_refused_or_changes_nothing(tmp_path_factory, position, change):
    path = tmp_path_factory.getbasetemp() / "header.npy"
    create_matrix(path, SHAPE)
    data = bytearray(path.read_bytes())
    data[position] ^= change
    path.write_bytes(data)
    try:
        matrix = MatrixFile(path)
    except DamagedStore:
        return
    matrix.close()
    assert matrix.shape == SHAPE


def test_no_descriptor_is_left_open_by_a_refused_file(path):
    fill(path)
    os.truncate(path, 200)
    before = os.listdir("/dev/fd")
    with pytest.raises(DamagedStore):
        MatrixFile(path)
    assert len(os.listdir("/dev/fd")) == len(before)


def test_rows_by_their_names_in_any_order(path):
    matrix = MatrixFile(path, writable=True)
    rows = [4, 5, 1, 0]
    matrix.write_rows(rows, 2, VALUES[:4, :3])
    assert np.array_equal(matrix.read_rows(rows, 2, 3), VALUES[:4, :3])
    assert np.array_equal(matrix.read_rows([1])[0, 2:5], VALUES[2, :3])
    matrix.close()


def test_rows_are_counted_through_leading_axes(tmp_path):
    path = tmp_path / "layers.npy"
    create_matrix(path, (3, *SHAPE), [8, 20])
    matrix = MatrixFile(path, writable=True, leading=(3,))
    assert matrix.shape == (21, 11)
    matrix.write_rows([7, 13, 14], 2, VALUES[:3, :4])
    assert np.array_equal(matrix.read_rows([13, 14], 2, 4), VALUES[1:3, :4])
    matrix.close()
    found = np.load(path)
    assert found.shape == (3, 7, 11)
    assert np.array_equal(found[1, [0, 6], 2:6], VALUES[:2, :4])
    assert np.array_equal(found[2, 0, 2:6], VALUES[2, :4])
    assert np.argwhere(np.isnan(found).all(2)).tolist() == [[1, 1], [2, 6]]


@pytest.mark.parametrize(("shape", "leading"), [((21, 11), (3,)), ((7, 3, 11), (3,)), ((3, 7, 11), ()), ((231,), (3,))])
def test_axes_of_other_sizes_are_refused(shape, leading, tmp_path):
    np.save(tmp_path / "m.npy", np.zeros(shape, np.float32))
    words = "in axes of 3 and two more" if leading else "in two axes"
    with pytest.raises(DamagedStore, match=f"expected float32 rows {words}, found"):
        MatrixFile(tmp_path / "m.npy", leading=leading)


def test_rows_of_no_tile_are_nan_and_never_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_matrix, "PIECE", 5)
    create_matrix(tmp_path / "m.npy", SHAPE, [0, 3, 4])
    found = np.load(tmp_path / "m.npy")
    assert found.shape == SHAPE
    assert np.flatnonzero(np.isnan(found).all(1)).tolist() == [0, 3, 4]
    assert not found[[row for row in range(SHAPE[0]) if row not in (0, 3, 4)]].any()
