import math

import pytest
import torch

from infl_cache.maths.correlation import error_of_mean, pearson, ranks, slope, spearman


def test_spearman_with_ties_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 10, 200):
        a, b = (torch.randint(max(2, count // 3), (count,), generator=generator).float() for _ in range(2))
        a[0], a[1], b[0], b[1] = 0, 1, 1, 0
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
        assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
        assert slope(a, b) == pytest.approx(stats.linregress(a, b).slope)
        assert ranks(a).tolist() == (stats.rankdata(a) - 1).tolist()


def test_opposite_orders_are_minus_one_whatever_the_distances():
    values = torch.tensor([1e-30, 1.0, 2.0, 1e20])
    assert spearman(values, -values.log()) == -1.0


def test_constants_have_no_correlation_and_no_slope():
    flat, rising = torch.full((7,), 0.1), torch.arange(7.0)
    assert (pearson(flat, rising), spearman(rising, flat)) == (0.0, 0.0)
    assert math.isnan(slope(flat, rising))
    assert slope(rising, flat) == pytest.approx(0)


def test_the_bootstrap_error_is_the_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert error_of_mean(values, 0) == pytest.approx(float(values.std()) / 20, rel=0.1)
    assert error_of_mean(values, 0) == error_of_mean(values, 0)
    assert math.isnan(error_of_mean(values[:1], 0))
