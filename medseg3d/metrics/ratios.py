"""Ratios and means in which 0 / 0, nan, means "not defined" and is left out."""

from __future__ import annotations

import math

import numpy as np


def ratio(part: float, whole: float) -> float:
    """``part / whole``, nan where ``whole`` is 0."""
    return part / whole if whole else math.nan


def mean_of_defined(values: np.ndarray) -> float:
    """The mean of the values (any shape) that are not nan; nan where none is defined."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan
