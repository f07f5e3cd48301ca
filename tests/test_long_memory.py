"""A sequence of 65,536 tokens in the memory of one CPU."""

import numpy as np
import pytest

from experiments.long.run import LIMIT, measure


@pytest.mark.slow
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_sixty_five_thousand_tokens_train_within_8_gib(stop_gradient, monkeypatch):
    """The child of the experiment, 4 x 128 in segments of 1,024, on what users run."""
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    long, short = measure(65_536, 64, stop_gradient), measure(1024, 1, False)
    assert np.isfinite(long["loss_nats"])
    assert long["resident_bytes"] < LIMIT
    assert long["temporary_bytes"] < 4 * short["temporary_bytes"]
