"""Tests, intervals and detectable effects against independent versions and published tables."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from dcr_mllm.evaluation.statistics import (
    Resampler,
    centred,
    combine_seed_draws,
    holm,
    interval,
    mcnemar_exact,
    mean_and_std,
    minimum_detectable_effect,
    paired_bootstrap,
    seeds_and_items_bootstrap,
)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (10, 2), (15, 5), (3, 19)])
def test_mcnemar_by_counting(gained, lost):
    base = np.array([0] * gained + [1] * lost + [1, 1, 0])
    tower = np.array([1] * gained + [0] * lost + [1, 1, 0])
    total = gained + lost
    tail = sum(comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    result = mcnemar_exact(base, tower)
    assert (result["gained"], result["lost"]) == (gained, lost)
    assert result["p_value"] == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_smallest_significant_gains():
    # Net gains of 10, 12, 14 and 16 pairs are the first significant ones at 20, 30, 40 and 50 discordant pairs.
    for discordant, net in ((20, 10), (30, 12), (40, 14), (50, 16)):
        p_values = []
        for gain in (net - 2, net):
            gained = (discordant + gain) // 2
            base = np.array([0] * gained + [1] * (discordant - gained))
            p_values.append(mcnemar_exact(base, 1 - base)["p_value"])
        assert p_values[0] > 0.05 >= p_values[1]


def test_mcnemar_refuses_different_units():
    with pytest.raises(ValueError, match="same units"):
        mcnemar_exact([1, 0], [1])


def test_paired_bootstrap_against_a_plain_loop():
    rng = np.random.default_rng(3)
    base = rng.random(120) < 0.4
    tower = rng.random(120) < 0.6
    result = paired_bootstrap(base, tower, num_resamples=4000)
    deltas = tower.astype(float) - base
    means = [deltas[rng.integers(120, size=120)].mean() for _ in range(4000)]
    assert result["difference"] == pytest.approx(deltas.mean())
    assert result["interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_centred_draws_keep_their_spread():
    np.testing.assert_allclose(centred([1.0, 2.0, np.nan, 6.0], 10.0), [8.0, 9.0, np.nan, 13.0])


def test_bootstrap_is_paired_fixed_and_exact_on_equal_models():
    base = np.random.default_rng(0).random(50) < 0.5
    assert paired_bootstrap(base, base)["interval"] == [0.0, 0.0]
    tower = ~base
    assert paired_bootstrap(base, tower) == paired_bootstrap(base, tower)


def test_clusters_widen_the_interval():
    # Ten copies of each of 30 items carry no more information than the 30.
    deltas = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=30)
    copies, names = np.repeat(deltas, 10), np.repeat(np.arange(30), 10)
    widths = []
    for values, clusters in ((deltas, None), (copies, names), (copies, None)):
        low, high = paired_bootstrap(np.zeros(len(values)), values, clusters)["interval"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0])
    assert widths[2] < 0.5 * widths[0]


def test_resampler_weights_and_means_agree_and_skip_nan():
    values = np.random.default_rng(2).random(40)
    values[::3] = np.nan
    resampler = Resampler(40, num_resamples=60)
    weights = resampler.weights()
    assert weights.sum(axis=1).tolist() == [40] * 60
    valid = ~np.isnan(values)
    expected = (weights[:, valid] @ values[valid]) / weights[:, valid].sum(axis=1)
    assert resampler.means(values) == pytest.approx(expected)
    assert (Resampler(40, num_resamples=60).weights() == weights).all()
    assert (resampler.weights(7) == weights[:7]).all()
    clustered = Resampler(4, ["a", "b", "a", "b"], num_resamples=20).weights()
    assert (clustered[:, :2] == clustered[:, 2:]).all() and (clustered.sum(axis=1) == 4).all()


def test_seeds_and_items_bootstrap_against_a_plain_loop():
    rng = np.random.default_rng(5)
    deltas = rng.choice([-1.0, 0.0, 1.0], p=[0.2, 0.5, 0.3], size=(3, 200)) + np.array([[0.0], [0.1], [0.3]])
    result = seeds_and_items_bootstrap(deltas, num_resamples=6000)
    draws = []
    for _ in range(6000):
        items = rng.integers(200, size=200)
        seeds = rng.integers(3, size=3)
        draws.append(deltas[np.ix_(seeds, items)].mean())
    assert result["mean"] == pytest.approx(deltas.mean())
    assert result["interval"] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.015)
    assert result["per_seed"] == pytest.approx(deltas.mean(axis=1))


def test_seed_spread_is_part_of_the_interval():
    deltas = np.repeat([[0.0], [0.1], [0.2]], 500, axis=1)  # no spread over items at all
    low, high = seeds_and_items_bootstrap(deltas)["interval"]
    assert low < 0.05 and high > 0.15
    draws = combine_seed_draws(np.array([[1.0] * 9, [3.0] * 9]))
    assert set(draws) <= {1.0, 2.0, 3.0} and len(set(draws)) > 1


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize(
    ("num_units", "row"),
    [(135, [7.8, 9.8, 11.3, 12.5, 13.8]), (150, [7.5, 9.3, 10.8, 12.0, 13.0]), (300, [5.5, 6.5, 7.5, 8.5, 9.3])],
)
def test_minimum_detectable_effect_against_the_known_table(num_units, row):
    found = [minimum_detectable_effect(num_units, share) for share in (0.10, 0.15, 0.20, 0.25, 0.30)]
    assert found == pytest.approx(row, abs=0.051)


def test_minimum_detectable_effect_by_simulation():
    effect = minimum_detectable_effect(200, 0.2)
    assert effect is not None
    rng = np.random.default_rng(0)
    gain, loss = (0.2 + effect / 100) / 2, (0.2 - effect / 100) / 2
    found = 0
    for _ in range(600):
        gained, lost, _ = rng.multinomial(200, [gain, loss, 0.8])
        base = np.array([0] * gained + [1] * lost)
        found += mcnemar_exact(base, 1 - base)["p_value"] <= 0.05
    assert found / 600 == pytest.approx(0.8, abs=0.06)


def test_minimum_detectable_effect_where_none_is():
    assert minimum_detectable_effect(9, 0.1) is None
    assert minimum_detectable_effect(100, 0.0) is None


def test_small_helpers():
    assert interval(np.arange(101)) == pytest.approx([2.5, 97.5])
    assert mean_and_std([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert mean_and_std([4.0])["std"] == 0.0
