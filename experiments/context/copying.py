"""Long-range copy: a symbol is to be kept over a number of other symbols, the lag, and then given back.

x x x STORE a x x x x x ASK a        x, a: any of the same symbols; lag 6, from a to ASK
"""

import numpy as np

STORE, ASK = 0, 1
SYMBOLS = 32
VOCAB_SIZE = 2 + SYMBOLS


def batch(lag_B, seq_len: int, rng) -> dict:
    """Rows of `seq_len` tokens that end with the question; only its answer counts.

    Args:
        lag_B: of each row, 1 to seq_len - 2.
    """
    B, T = len(lag_B), seq_len
    if min(lag_B) < 1 or max(lag_B) > T - 2:
        raise ValueError(f"lags are {min(lag_B)} to {max(lag_B)}, expected 1 to {T - 2} in {T} tokens")
    tokens = rng.integers(2, VOCAB_SIZE, (B, T + 1), dtype=np.int32)
    row_B = np.arange(B)
    tokens[row_B, T - 2 - lag_B] = STORE
    tokens[:, T - 1] = ASK
    tokens[:, T] = tokens[row_B, T - 1 - lag_B]
    return {"tokens": tokens, "mask": np.broadcast_to(np.arange(T) == T - 1, (B, T))}
