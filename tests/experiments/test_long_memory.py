"""Training on a sequence of 65,536 tokens within the memory of one CPU."""

import numpy as np
import pytest

from experiments.long.run import LIMIT, SEGMENT, measure

pytestmark = pytest.mark.slow


@pytest.fixture
def as_users_run(monkeypatch):
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)


def test_long_training_on_65536_tokens_takes_the_memory_of_one_segment(as_users_run):
    """Runs the experiment at 4 x 128 in child processes. Truncation at a quarter of the length takes equal memory."""
    short = measure(SEGMENT, 1, False)
    for seq_len, stop_gradient in ((65_536, False), (16_384, True)):
        long = measure(seq_len, seq_len // SEGMENT, stop_gradient)
        assert np.isfinite(long["loss_nats"])
        assert long["resident_bytes"] < LIMIT
        assert long["temporary_bytes"] < 4 * short["temporary_bytes"]
