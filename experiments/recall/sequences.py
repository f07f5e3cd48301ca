"""Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): pairs first, then each key once more.

    k1 v1 k2 v2 ... kn vn  .  .  k2 v2  .  .  .  k1 v1  .  .  ...

Keys are tokens of the lower half of the vocabulary, values of the upper half. Between the questions (`.`) are keys
that no pair of this sequence has, so that n values are in sight and a random one of them is right in 1 / n.
"""

import numpy as np

GAP_POWER = 0.01  # a question's distance from the pairs: p(distance) ~ distance^(GAP_POWER - 1), as in Zoology


def recall(rng: np.random.Generator, batch_size: int, seq_len: int, pairs: int, vocab_size: int) -> dict:
    """Return {"tokens" [B, T + 1], "mask" [B, T]}: the mask marks the questions, whose next token is the value."""
    places, half = (seq_len - 2 * pairs) // 2, vocab_size // 2
    if not 1 <= pairs <= min(places, half - 1):
        raise ValueError(f"{pairs} pairs do not fit {seq_len} tokens of a vocabulary of {vocab_size}")
    keys_BK, values_BK = (shuffled(rng, batch_size, low, low + half) for low in (0, half))
    fill_BT = rng.integers(pairs, half, (batch_size, seq_len + 1))
    tokens_BT = np.take_along_axis(keys_BK, fill_BT, axis=1)
    keys_BN, values_BN = keys_BK[:, :pairs], values_BK[:, :pairs]
    tokens_BT[:, 0 : 2 * pairs : 2], tokens_BT[:, 1 : 2 * pairs : 2] = keys_BN, values_BN

    # Draws without replacement of probability p are the largest of log p + Gumbel noise.
    log_p = (GAP_POWER - 1) * np.log(np.arange(1, places + 1))
    place_BN = (log_p + rng.gumbel(size=(batch_size, places))).argsort(axis=1)[:, ::-1][:, :pairs]
    at_BN = 2 * pairs + 2 * place_BN
    np.put_along_axis(tokens_BT, at_BN, keys_BN, axis=1)
    np.put_along_axis(tokens_BT, at_BN + 1, values_BN, axis=1)
    mask_BT = np.zeros((batch_size, seq_len), bool)
    np.put_along_axis(mask_BT, at_BN, True, axis=1)
    return {"tokens": tokens_BT.astype(np.int32), "mask": mask_BT}


def shuffled(rng, batch_size: int, low: int, high: int) -> np.ndarray:
    """Return [B, high - low]: the tokens of [low, high), each row in its own random order."""
    return low + rng.random((batch_size, high - low)).argsort(axis=1)
