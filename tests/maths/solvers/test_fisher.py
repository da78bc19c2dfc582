"""The solver `fisher` equals a dense float64 solve, however its matrix is cut up, kept, and come back to."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from infl_cache import BadInput
from infl_cache.maths.capture import Forms
from infl_cache.maths.curvature import Curvature, Rows
from infl_cache.maths.curvature.jacobian import Jacobian
from infl_cache.maths.gram import gram
from infl_cache.maths.params import Parameters
from infl_cache.maths.solvers import Fisher, solve
from infl_cache.maths.tiled import InMemory, all_and_there, factorise, fill, matrix_bytes, solved, tile_side
from tests.tasks import logistic, normal
from tests.twins import relative_error

FORMS = {size: Forms(Parameters(("w",), ((size,),))) for size in (12, 15, 80)}


def pieces_of(matrix, size):
    return [Jacobian({}, part.unsqueeze(1)) for part in matrix.split(size)]


def curvature(matrix, damping, size=7, forms=None, weight_decay=0.0, **changes):
    """The Fisher matrix of the rows of `matrix`, read in pieces of `size`."""
    forms = forms or Forms(Parameters(("w",), ((matrix.shape[1],),)))
    rows = Rows(forms, lambda: iter(pieces_of(matrix, size)), matrix.shape[1] * matrix.element_size())
    task = dataclasses.replace(logistic(matrix.dtype), weight_decay=weight_decay)
    return Curvature(
        task=task, parameters=forms.parameters, kind="fisher", batches=list, pick=lambda _: [], n_train=len(matrix),
        damping=damping, dtype=matrix.dtype, rows=rows, **changes,
    )  # fmt: skip


def dense(matrix, shift, rhs):
    matrix, rhs = matrix.double(), rhs.double()
    whole = matrix.T @ matrix / len(matrix) + shift * torch.eye(matrix.shape[1], dtype=torch.float64)
    return torch.linalg.solve(whole, rhs.T).T


@pytest.mark.parametrize("size", [15, 80])
@pytest.mark.parametrize(("damping", "bound"), [(1.0, 1e-13), (1e-2, 1e-12), (1e-4, 1e-10), (1e-8, 1e-6)])
def test_equals_a_dense_solve_over_all_dampings(size, damping, bound):
    matrix, rhs = normal(40, size), normal(5, size, seed=2)
    found = solve(curvature(matrix, damping), rhs, Fisher())
    assert relative_error(found.value, dense(matrix, damping, rhs)) <= bound
    assert found.converged.all()
    assert found.iterations.tolist() == [1] * 5
    assert found.reasons == ("",) * 5


def test_float32_rows_to_what_float32_allows():
    matrix, rhs = normal(40, 80, dtype=torch.float32), normal(5, 80, seed=2, dtype=torch.float32)
    found = solve(curvature(matrix, 0.05), rhs, Fisher())
    assert found.value.dtype == torch.float32
    assert relative_error(found.value, dense(matrix, 0.05, rhs)) <= 1e-5


def test_weight_decay_counts_as_damping():
    matrix, rhs = normal(40, 80), normal(5, 80, seed=2)
    found = solve(curvature(matrix, 0.0, weight_decay=0.3), rhs, Fisher())
    assert relative_error(found.value, dense(matrix, 0.3, rhs)) <= 1e-12


@pytest.mark.parametrize("cut", [(1, 1, 40), (7, 7, 5), (16, 40, 16), (40, 3, 7), (11, 22, 64), (50, 50, 50)])
def test_the_numbers_do_not_depend_on_tiles_panels_or_pieces(cut):
    side, panel, size = cut
    matrix, rhs = normal(40, 80), normal(5, 80, seed=2)
    found = solve(curvature(matrix, 1e-2, size), rhs, Fisher(side=side, panel=panel))
    assert relative_error(found.value, dense(matrix, 1e-2, rhs)) <= 1e-12


class Kept(InMemory):
    """Tiles that outlive the solver, as files do, and count what is put; after `most` of them the power goes."""

    def __init__(self, side, most=10**9):
        super().__init__(side)
        self.puts, self.most = [], most

    def put(self, kind, i, j, tile):
        if len(self.puts) == self.most:
            raise KeyboardInterrupt
        super().put(kind, i, j, tile)
        self.puts.append((kind, i, j))


@pytest.mark.parametrize("stopped", [0, 1, 9, 14, 15, 16, 22, 29])
def test_what_was_interrupted_anywhere_goes_on_and_ends_with_the_same_bits(stopped):
    matrix, rhs = normal(40, 80), normal(5, 80, seed=2)
    calm = solve(curvature(matrix, 1e-2), rhs, Fisher(side=8, panel=16)).value
    tiles = Kept(8, stopped)
    solver = Fisher(side=8, panel=16, memory=1, keep=lambda n, side: tiles)
    with pytest.raises(KeyboardInterrupt):
        solve(curvature(matrix, 1e-2), rhs, solver)
    assert all_and_there(tiles, 40) == (30, stopped)
    tiles.most = 10**9
    assert torch.equal(solve(curvature(matrix, 1e-2), rhs, solver).value, calm)
    assert len(tiles.puts) == len(set(tiles.puts)) == 30
    assert torch.equal(solve(curvature(matrix, 1e-2), rhs, solver).value, calm)
    assert len(tiles.puts) == 30


def test_a_matrix_that_fits_into_memory_needs_no_other_place():
    matrix, rhs = normal(40, 80), normal(2, 80, seed=2)

    def keep(n, side):
        raise AssertionError("asked for a place")

    fits = 3 * matrix_bytes(40, 40)
    assert solve(curvature(matrix, 1.0), rhs, Fisher(memory=fits, keep=keep, side=40)).converged.all()
    with pytest.raises(AssertionError, match="asked for a place"):
        solve(curvature(matrix, 1.0), rhs, Fisher(memory=fits - 1, keep=keep, side=40))


def test_rows_are_read_about_twice_a_panel_and_once_where_they_are_one_panel():
    matrix = normal(96, 12)
    reads = []

    def passes():
        for place, piece in enumerate(pieces_of(matrix, 8)):
            reads.append(place)
            yield piece

    def product(a, b):
        return gram(FORMS[12], a, b)

    fill(InMemory(16), 96, passes, product, 96, lambda: None)
    assert reads == list(range(12))
    reads.clear()
    fill(InMemory(16), 96, passes, product, 32, lambda: None)
    # All of it for the first panel, in case that is remembered; then to the panel's end and to its beginning, and one
    # piece more to see that it is.
    assert len(reads) == 12 + (8 + 1) + (4 + 1) + 12 + (8 + 1)


def test_tiles_hold_the_matrix_then_its_factor():
    matrix, tiles = normal(40, 12), InMemory(16)
    fill(tiles, 40, lambda: pieces_of(matrix, 7), lambda a, b: gram(FORMS[12], a, b), 16, lambda: None)
    whole = matrix @ matrix.T
    torch.testing.assert_close(tiles.get("gram", 2, 1), whole[32:, 16:32])
    torch.testing.assert_close(tiles.get("gram", 1, 1).tril(), whole[16:32, 16:32].tril())
    with pytest.raises(KeyError):
        tiles.get("factor", 2, 1)
    assert factorise(tiles, 40, 0.5, lambda: None)
    lower = torch.linalg.cholesky(whole + 0.5 * torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(tiles.get("factor", 2, 1), lower[32:, 16:32])
    torch.testing.assert_close(tiles.get("factor", 1, 1), lower[16:32, 16:32])
    right = normal(3, 40, seed=4)
    found = solved(tiles, right, lambda: None)
    torch.testing.assert_close(found, torch.cholesky_solve(right.T, lower).T)
    with pytest.raises(KeyError):
        tiles.get("gram", 2, 1)


def test_what_lies_above_the_tolerance_is_refined(monkeypatch):
    matrix, rhs = normal(40, 80), normal(3, 80, seed=2)
    real = torch.linalg.cholesky_ex

    def rough(tile):
        lower, info = real(tile)
        return lower * (1 + 1e-6), info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", rough)
    found = solve(curvature(matrix, 1e-2), rhs, Fisher(tolerance=1e-9))
    assert found.iterations.min() > 1
    assert found.converged.all()
    assert relative_error(found.value, dense(matrix, 1e-2, rhs)) <= 1e-8


def test_a_tolerance_below_rounding_is_given_up_with_words():
    matrix, rhs = normal(40, 80), normal(3, 80, seed=2)
    rhs[1] = 0
    found = solve(curvature(matrix, 1e-6), rhs, Fisher(tolerance=0.0))
    assert found.converged.tolist() == [False, True, False]
    assert "rounding" in found.reasons[0]
    assert found.reasons[1] == ""
    assert relative_error(found.value[::2], dense(matrix, 1e-6, rhs)[::2]) <= 1e-8
    assert not found.value[1].any()
    expected = curvature(matrix, 1e-6)(found.value) - rhs
    torch.testing.assert_close(found.residual[0], expected[0].norm() / rhs[0].norm(), rtol=1e-6, atol=0)


def test_a_side_that_is_not_finite_spoils_no_other():
    matrix, rhs = normal(40, 80), normal(3, 80, seed=2)
    good = solve(curvature(matrix, 1e-2), rhs[[0, 2]], Fisher()).value
    rhs[1, 3] = torch.nan
    found = solve(curvature(matrix, 1e-2), rhs, Fisher())
    assert found.converged.tolist() == [True, False, True]
    assert (found.reasons[1], bool(found.value[1].isnan().all())) == ("not finite", True)
    torch.testing.assert_close(found.value[[0, 2]], good, rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_finite_are_said_not_solved():
    matrix = normal(40, 80)
    matrix[3, 3] = torch.inf
    found = solve(curvature(matrix, 1e-2), normal(3, 80, seed=2), Fisher(side=16))
    assert not found.converged.any()
    assert found.value.isnan().all()
    assert "positive definite" in found.reasons[0]


@pytest.mark.parametrize(("damping", "weight_decay"), [(0.0, 0.0), (-0.2, 0.1)])
def test_without_damping_it_is_refused(damping, weight_decay):
    with pytest.raises(BadInput, match=r"(?s)above zero, found.*\n.*--damping"):
        Fisher().prepare(curvature(normal(4, 12), damping, weight_decay=weight_decay))


def test_it_needs_rows():
    with pytest.raises(TypeError, match="gradient rows"):
        Fisher().prepare(lambda v: v)


def test_a_stop_is_heard_between_tiles():
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 20:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        solve(curvature(normal(40, 80), 1.0, tick=tick), normal(1, 80, seed=2), Fisher(side=8))


def test_the_side_of_a_tile_bounds_what_is_in_memory():
    for n, panel, memory in ((50_000, 10**6, 10**9), (50_000, 100, 10**9), (3, 10, 10), (1, 1, None)):
        side = tile_side(n, panel, memory)
        assert 1 <= side <= n
        assert memory is None or side <= max(256, memory // 4 // (8 * n))
    assert tile_side(50_000, 100, 10**9) == 100
    assert tile_side(50_000, 0, 10**9) == 16
