"""The order of reading: slabs cover every pair once, and the bytes that are reckoned are those that would be read."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.disk.layout import blocks
from infl_cache.maths.capture import Forms, Layer
from infl_cache.maths.params import Parameters
from infl_cache.maths.parts import units, whole
from infl_cache.stages.schedule import Order, Room, Stores, Unit, best_order, order_of_rows, slab_bytes_moved, slabs


def forms_of(sizes, plain):
    """Linear layers without bias of so many inputs and two outputs, each followed by a plain parameter."""
    names, shapes, layers = [], [], []
    for index, (size, beside) in enumerate(itertools.zip_longest(sizes, plain, fillvalue=0)):
        if size:
            names.append(f"w{index}")
            shapes.append((2, size))
            layers.append(
                Layer(f"l{index}", f"l{index}", "linear", {"weight": f"w{index}"}, (1, size), (1, 2), 2 * size)
            )
        if beside:
            names.append(f"p{index}")
            shapes.append((beside,))
    dense = tuple(name for name in names if name.startswith("p"))
    return Forms(Parameters(tuple(names), tuple(shapes)), tuple(layers), mapped=dense)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), max_size=4), st.lists(st.integers(1, 30), max_size=3), st.integers(1, 6),
    st.integers(0, 700), st.integers(1, 7),
)  # fmt: skip
def test_slabs_cover_every_number_of_every_row_once_and_keep_to_their_size(sizes, plain, rows, slab_bytes, chunk):
    if not sizes and not plain:
        return
    forms = forms_of(sizes, plain)
    seen = np.zeros((rows, forms.parameters.size), int)
    for slab in slabs(whole(forms), rows, 4, slab_bytes, chunk):
        for at in slab.part.columns:
            seen[slab.start : slab.stop, at] += 1
        held = 4 * (slab.stop - slab.start) * slab.part.size
        alone = slab.stop - slab.start == 1 or slab.part.size == 1
        assert not slab_bytes or held <= slab_bytes or alone
        if slab.part.start % chunk and slab_bytes // (4 * rows) >= chunk:
            raise AssertionError("a chunk is read twice")
    assert (seen == 1).all()


def read_bytes(order, n_test, n_train, forms, stores):
    """What a loop over tiles and slabs reads, each layer's gradients whenever a slab holds it."""
    total, of_layer = 0, {part.names: unit for part, unit in zip(units(forms), stores.units, strict=True)}
    cut = list(slabs(whole(forms), order.rows, 4, order.slab_bytes))
    parts = {(slab.part.names, slab.part.start) for slab in cut}
    chunks = -(-stores.test_bytes // stores.test_chunk)
    for test in blocks(n_test, order.rows):
        for index, columns in enumerate(blocks(n_train, order.columns)):
            if order.slab_bytes or not index:
                total += test.rows * (stores.test_bytes + (len(parts) - 1) * stores.test_bytes // chunks)
            for slab in cut:
                held = [unit for names, unit in of_layer.items() if set(names) <= set(slab.part.names)]
                total += columns.rows * sum(unit.train_bytes for unit in held)
    return total


def stores_of(forms, train_bytes, test_chunk):
    found = tuple(Unit(4 * part.size, each) for part, each in zip(units(forms), train_bytes, strict=False))
    return Stores(found, test_chunk)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 60), st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.lists(st.integers(1, 90), min_size=5, max_size=5), st.integers(4, 300), st.integers(1, 5000),
    st.integers(8, 20000), st.integers(1, 9),
)  # fmt: skip
def test_the_best_order_reads_what_it_says_fits_and_is_the_best(
    n_test, n_train, sizes, train_bytes, test_chunk, s_test, accumulator, step
):
    forms = forms_of(sizes, [])
    stores, room, step = stores_of(forms, train_bytes, test_chunk), Room(4 * s_test, accumulator), min(step, n_train)
    order = best_order(n_test, n_train, stores, room, step)
    assert order.n_bytes == read_bytes(order, n_test, n_train, forms, stores)
    staying = order_of_rows(n_test, n_train, stores, room, step)
    assert order.n_bytes <= staying.n_bytes
    if order.slab_bytes:
        assert 4 * order.rows * order.columns <= accumulator
        assert order.columns == n_train or order.columns % step == 0
    else:
        assert order == staying
    for tiles in range(1, n_test + 1):
        rows = -(-n_test // tiles)
        for wide in [*range(step, n_train, step), n_train]:
            if 4 * rows * wide <= accumulator:
                assert order.n_bytes <= slab_bytes_moved(n_test, n_train, stores, room, rows, wide)
    assert order.n_bytes >= n_test * stores.test_bytes + n_train * stores.train_bytes


@pytest.mark.parametrize(("chunk", "again"), [(1000, 0), (250, 0), (4000, 9), (3000, 9)])
def test_plain_columns_are_read_once_where_a_slab_holds_whole_chunks(chunk, again):
    """100,000 bytes of s_test a test sample, slabs of 1,000 to 10,000."""
    stores, room = Stores((Unit(10_000, 500, chunk),), test_chunk=100), Room(100 * 1000, 10**9)
    chunks, slab_count = -(-10_000 // chunk), 10
    moved = slab_bytes_moved(100, 7, stores, room, 100, 7)
    assert moved == 100 * (10_000 + 100 * (slab_count - 1)) + 7 * (500 + 500 * again // chunks)


def test_chunks_much_wider_than_slabs_make_rows_stay():
    layers, room = (Unit(400, 4),) * 100, Room(10**6, 10**9)
    assert best_order(500, 1000, Stores(layers, 400), room, 100).slab_bytes
    assert not best_order(500, 1000, Stores(layers, 40_000), room, 100).slab_bytes


def test_where_all_of_s_test_fits_its_rows_stay():
    stores = Stores((Unit(4000, 100), Unit(8000, 50, 1000)), 12_000)
    found = best_order(20, 10**6, stores, Room(10**9, 10**9), 4096)
    assert found == Order(20, 4096, 0, 20 * 12000 + 10**6 * 150)


@pytest.mark.parametrize("n_test", [10_000, 50_000])
def test_a_large_matrix_of_a_deep_network_is_read_in_slabs(n_test):
    """ResNet-50's size: 54 layers of 2 MB of s_test a sample and 20 kB of factors, 8 GB of memory."""
    stores, room = Stores((Unit(2_000_000, 20_000),) * 54, 1_000_000), Room(2 * 10**9, 10**9)
    slabs_first = best_order(n_test, 50_000, stores, room, 4096)
    rows_first = order_of_rows(n_test, 50_000, stores, room, 4096)
    assert slabs_first.slab_bytes
    assert slabs_first.n_bytes < rows_first.n_bytes / 4
