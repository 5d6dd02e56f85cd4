"""Fits the planner's coefficients to the points that pope2022_split.json names, and writes pope2022_fit.json.

Least squares on the logarithm of predicted over measured seconds of a layer; efficiencies stay in (0, 1], latencies above
0. The scored points are not looked at. usage: python scripts/fit_planner.py
"""

import json
from dataclasses import asdict

import numpy as np
from scipy.optimize import least_squares

from strop.plan.latency import Coefficients
from strop.plan.points import DATA, fitted

LOWEST = np.array([0.05, 0.05, 0.01, 0.05, 1e-8, 1e-8])
HIGHEST = np.array([1.0, 1.0, 1.0, 1.0, 1e-4, 1e-4])
START = np.array([0.8, 0.8, 0.2, 0.8, 2e-6, 2e-6])


def main() -> None:
    points = fitted()

    def misses(logs: np.ndarray) -> np.ndarray:
        coefficients = Coefficients(*np.minimum(np.exp(logs), 1.0).tolist())
        return np.array([np.log(point.predicted_s(coefficients) / point.layer_s) for point in points])

    found = least_squares(misses, np.log(START), bounds=(np.log(LOWEST), np.log(HIGHEST)), xtol=1e-10, ftol=1e-12)
    names = list(asdict(Coefficients()))
    values = {name: float(f"{value:.4g}") for name, value in zip(names, np.exp(found.x), strict=True)}
    rms = float(np.sqrt(np.mean(found.fun**2)))
    document = {"fitted_by": "scripts/fit_planner.py", "num_points": len(points), "rms_log_error": round(rms, 4)}
    (DATA / "pope2022_fit.json").write_text(json.dumps(document | {"coefficients": values}, indent=1) + "\n")
    print(json.dumps(values, indent=1), f"rms {rms:.4f}")


if __name__ == "__main__":
    main()
