"""Memory that runs out in stage 2: batches are halved, the numbers stay, and what cannot be helped is said."""

import numpy as np
import pytest
import torch

from infl_cache import BadInput, Run
from infl_cache.stages import stest as stage
from tests.faults.data import small_task

OPTIONS = {"damping": 0.1, "progress": False, "test_block_rows": 3, "tolerance": 1e-10}


# Exceptions by which memory runs out, and how many samples it holds; where empty, any number.
SHORT = []
# Of the batches that the model was given since memory was short.
SIZES = []


def forward(model, batch):
    """The outputs, unless memory is short and the batch does not fit."""
    if SHORT:
        (kind, most), size = SHORT[0], len(batch[0])
        SIZES.append(size)
        if size > most:
            raise kind("out of memory, it is said")
    return model(batch[0])


@pytest.fixture
def short(monkeypatch):
    """`short(kind, most)`: memory holds `most` samples from the first preparation of a solver on."""
    original = stage._solve

    def from_now_on(kind, most):
        def solve(*given):
            SHORT[:] = [(kind, most)]
            return original(*given)

        monkeypatch.setattr(stage, "_solve", solve)

    yield from_now_on
    SHORT.clear()
    SIZES.clear()


def stest(path, **options):
    """s_test of all test samples."""
    run = Run(path, small_task(forward=forward), **OPTIONS, **options)
    run.grads()
    run.stest()
    return run.s_test(slice(None))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize(
    "system", [{"solver": "cg"}, {"solver": "cg", "curvature": "hessian"}, {"solver": "exact"}, {"solver": "pcg"}],
    ids=lambda each: " ".join(each.values()),
)  # fmt: skip
def test_stage_2_goes_on_with_smaller_batches_and_the_same_numbers(kind, system, tmp_path, short, caplog):
    calm = stest(tmp_path / "calm", **system)
    short(kind, 2)
    found = stest(tmp_path / "run", **system)
    assert "out of memory, going on with batches of at most 12 samples" in caplog.text
    assert max(SIZES) > 2 >= SIZES[-1]
    np.testing.assert_allclose(found, calm, rtol=1e-7, atol=1e-9)


def test_a_single_sample_that_does_not_fit_is_an_error(tmp_path, short):
    short(MemoryError, 0)
    with pytest.raises(MemoryError, match="it is said"):
        stest(tmp_path / "run", solver="cg")


def test_another_error_is_not_taken_for_it(tmp_path, short, caplog):
    short(ZeroDivisionError, 2)
    with pytest.raises(BadInput, match="ZeroDivisionError: out of memory, it is said"):
        stest(tmp_path / "run", solver="cg")
    assert "going on" not in caplog.text
