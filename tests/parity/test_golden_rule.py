"""The seed rule itself, against the worked values that its description gives."""

from __future__ import annotations

import numpy as np

from tests.parity.golden import grid_input, stream, unit


def test_worked_values():
    assert stream(1, "input", 3).tolist() == [13823584567606382312, 7207385648806282099, 10751915886733441872]
    np.testing.assert_allclose(unit(1, "a", (2,)), [0.78390796, 0.66852896], rtol=0, atol=5e-9)
    assert grid_input(7, "input", (4,)).tolist() == [-1.625, 0.703125, -0.703125, -0.859375]
