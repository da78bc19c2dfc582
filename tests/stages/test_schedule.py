"""The order of reading: slabs cover every pair once, and the bytes that are reckoned are those that would be read."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.disk.layout import blocks
from infl_cache.maths.capture import Forms, Layer
from infl_cache.maths.params import Parameters
from infl_cache.maths.parts import whole
from infl_cache.stages.schedule import Order, Room, Unit, best_order, order_of_rows, slab_bytes_moved, slabs


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


def read_bytes(order, n_test, n_train, units, room):
    """What a loop over tiles and slabs reads, counted one read after the other."""
    total = 0
    for test in blocks(n_test, order.rows):
        held = None
        for columns in blocks(n_train, order.columns):
            if not order.slab_bytes:
                if held != test:
                    total += test.rows * sum(unit.test_bytes for unit in units)
                    held = test
                total += columns.rows * sum(unit.train_bytes for unit in units)
                continue
            for unit in units:
                total += test.rows * unit.test_bytes
                # All tiles are reckoned as high as the first.
                times = 1 if unit.divisible else max(1, -(-order.rows * unit.test_bytes // room.s_test))
                total += times * columns.rows * unit.train_bytes
    return total


units_lists = st.lists(st.builds(Unit, st.integers(1, 400), st.integers(1, 90), st.booleans()), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 60), units_lists, st.integers(1, 20000), st.integers(8, 20000), st.integers(1, 9)
)
def test_the_best_order_reads_what_it_says_fits_and_is_the_best(n_test, n_train, units, s_test, accumulator, step):
    room, step = Room(s_test, accumulator), min(step, n_train)
    order = best_order(n_test, n_train, units, room, step)
    assert order.n_bytes == read_bytes(order, n_test, n_train, units, room)
    staying = order_of_rows(n_test, n_train, units, room, step)
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
                moved = slab_bytes_moved(n_test, n_train, units, room, rows, wide)
                assert order.n_bytes <= moved
    minimum = n_test * sum(unit.test_bytes for unit in units) + n_train * sum(unit.train_bytes for unit in units)
    assert order.n_bytes >= minimum
    if 4 * n_test * n_train <= accumulator and all(unit.divisible for unit in units):
        assert order.n_bytes == minimum, "each store is read once where the accumulator holds the matrix"


def test_where_all_of_s_test_fits_its_rows_stay():
    units = [Unit(4000, 100, False), Unit(8000, 50, True)]
    found = best_order(20, 10**6, units, Room(10**9, 10**9), 4096)
    assert found == Order(20, 4096, 0, 20 * 12000 + 10**6 * 150)


@pytest.mark.parametrize("n_test", [10_000, 50_000])
def test_a_large_matrix_of_a_deep_network_is_read_in_slabs(n_test):
    """ResNet-50's size: 54 layers of 2 MB of s_test a sample and 20 kB of factors, 8 GB of memory."""
    units, room = [Unit(2_000_000, 20_000, False)] * 54, Room(2 * 10**9, 10**9)
    slabs_first = best_order(n_test, 50_000, units, room, 4096)
    rows_first = order_of_rows(n_test, 50_000, units, room, 4096)
    assert slabs_first.slab_bytes
    assert slabs_first.n_bytes < rows_first.n_bytes / 4
