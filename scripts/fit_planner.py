"""Fits the planner's coefficients to the points that pope2022_split.json names, and writes pope2022_fit.json.

Least squares on the logarithm of predicted over measured seconds of a layer; efficiencies stay in (0, 1], latencies
above 0. The scored points are not looked at.

usage: python scripts/fit_planner.py           fits and writes
       python scripts/fit_planner.py --thirds  fits to each third of all points in turn, and prints errors on the rest
"""

import json
import sys
from dataclasses import asdict
from statistics import median

import numpy as np
from scipy.optimize import least_squares

from strop.plan.latency import Coefficients
from strop.plan.points import DATA, Point, fitted, points

LOWEST = np.array([0.05, 0.05, 0.01, 0.05, 1e-8, 1e-8])
HIGHEST = np.array([1.0, 1.0, 1.0, 1.0, 1e-4, 1e-4])
START = np.array([0.8, 0.8, 0.2, 0.8, 2e-6, 2e-6])


def fit(chosen: list[Point]) -> tuple[dict[str, float], float]:
    """The coefficients, to four digits, and the root mean square of the logarithms."""

    def misses(logs: np.ndarray) -> np.ndarray:
        coefficients = Coefficients(*np.minimum(np.exp(logs), 1.0).tolist())
        return np.array([np.log(point.predicted_s(coefficients) / point.layer_s) for point in chosen])

    found = least_squares(misses, np.log(START), bounds=(np.log(LOWEST), np.log(HIGHEST)), xtol=1e-10, ftol=1e-12)
    values = np.exp(found.x)
    rms = float(np.sqrt(np.mean(found.fun**2)))
    return {name: float(f"{value:.4g}") for name, value in zip(asdict(Coefficients()), values, strict=True)}, rms


def print_thirds() -> None:
    for first in range(3):
        coefficients, _ = fit([point for n, point in enumerate(points()) if n % 3 == first])
        rest = [point for n, point in enumerate(points()) if n % 3 != first]
        errors = [abs(point.predicted_s(Coefficients(**coefficients)) / point.layer_s - 1) for point in rest]
        print(f"fitted to points {first}, {first + 3}, ...: {coefficients}")
        print(f"  the rest is off by {100 * median(errors):.1f} % (median), {100 * max(errors):.1f} % (worst)")


def main() -> None:
    if sys.argv[1:] == ["--thirds"]:
        print_thirds()
        return
    coefficients, rms = fit(fitted())
    document = {"fitted_by": "scripts/fit_planner.py", "num_points": len(fitted()), "rms_log_error": round(rms, 4)}
    text = json.dumps(document | {"coefficients": coefficients}, indent=1) + "\n"
    (DATA / "pope2022_fit.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
