"""Whether what a file answers somewhere is what it should."""

from typing import Any

import numpy as np

from bingo_compress.toolchains.place import Outputs

HALF = 0.999  # smallest cosine of what is computed in half precision
# The largest error that passes, of the spread of the golden pictures' outputs: a network may answer nearly the same to
# all, and then a cosine says nothing.
OF_SPREAD, OF_SPREAD_INT8 = 0.1, 1.0


def judged(expected: Outputs, found: Outputs, least: float) -> dict[str, Any]:
    """Verdict and figures of outputs (n, D) against those that are expected: min_cosine, max_difference (of an output's
    largest value) and max_of_spread (the largest error, of the distance of the pictures from their mean) over pictures
    and outputs.

    least: the smallest cosine; as far apart as two vectors of length one at that cosine, relative to the length that is
    expected, may any two vectors be. It is below HALF for int8 alone.
    """
    if any(found[name].shape != values.shape for name, values in expected.items()):
        shapes = ", ".join(f"{name} {list(found[name].shape[1:])}" for name in expected)
        return {"verdict": "wrong", "cause": f"outputs of another shape: {shapes}"}
    if not all(np.isfinite(found[name]).all() for name in expected):
        return {"verdict": "wrong", "cause": "values that are not finite"}
    cosines, differences, errors, of_spread = [], [], [], []
    for name, values in expected.items():
        length = np.maximum(np.linalg.norm(values, axis=1), 1e-12)
        away = found[name] - values
        cosines += list((found[name] * values).sum(1) / length / np.maximum(np.linalg.norm(found[name], axis=1), 1e-12))
        differences.append(np.abs(away).max() / max(np.abs(values).max(), 1e-12))
        lost = np.linalg.norm(away, axis=1)
        errors += list(lost / length)
        spread = np.linalg.norm(values - values.mean(0), axis=1).mean()
        of_spread.append(lost.max() / max(spread, 1e-12))
    near = max(errors) <= (2 * (1 - least)) ** 0.5
    right = near and max(of_spread) <= (OF_SPREAD if least >= HALF else OF_SPREAD_INT8)
    return {
        "verdict": "right" if right else "wrong",
        "min_cosine": float(min(cosines)),
        "max_difference": float(max(differences)),
        "max_of_spread": float(max(of_spread)),
    }
