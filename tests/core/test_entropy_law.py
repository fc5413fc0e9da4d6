"""R = -a exp(H) + b: the fit finds the law, and says nothing where there is none to find."""

from __future__ import annotations

import math

import pytest

from retool.entropy_law import EntropyLaw, fit, fit_run


def test_t3c_law_and_ceiling() -> None:
    law = EntropyLaw(0.2, 0.6, 1.0, 3)
    assert law.reward(1.0) == pytest.approx(0.056344, abs=1e-6)
    assert law.reward(0.0) == pytest.approx(0.4) and law.ceiling == pytest.approx(0.4)


def test_the_fit_recovers_the_law() -> None:
    entropies = [1.2, 1.0, 0.7, 0.4, 0.1]
    law = fit(entropies, [-0.2 * math.exp(h) + 0.6 for h in entropies])
    assert law is not None
    assert (law.a, law.b, law.r2, law.n) == pytest.approx((0.2, 0.6, 1.0, 5))
    noisy = fit(entropies, [0.1, 0.0, 0.5, 0.2, 0.6])
    assert noisy is not None and 0 < noisy.r2 < 1


def test_no_law_without_points_or_change() -> None:
    assert fit([1.0, 0.5], [0.0, 0.1]) is None
    assert fit([0.5] * 4, [0.1, 0.2, 0.3, 0.4]) is None
    assert fit([1.0, 0.5, math.nan, 0.2], [0.1, 0.2, 0.3, math.inf]) is None
    with pytest.raises(ValueError, match=r"shorter|longer"):
        fit([1.0], [])


def test_a_run_is_fitted_over_the_steps_that_have_both() -> None:
    metrics = [{"entropy": h, "rollout/accuracy": 0.9 - 0.1 * math.exp(h)} for h in (2.0, 1.5, 1.0)]
    law = fit_run([*metrics, {"rollout/accuracy": 0.5}, {"entropy": 0.1}])
    assert law is not None and law.n == 3 and law.a == pytest.approx(0.1) and law.b == pytest.approx(0.9)
