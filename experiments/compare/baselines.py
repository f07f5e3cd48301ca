"""Reference levels for a byte model's bits per byte: n-gram counts of the same training bytes, and a file
compressor."""

import lzma

import numpy as np

ORDER = 6  # longest n-gram: five bytes of context


def ngram_bits(train_NT, test_T, order: int = ORDER):
    """Return the bits of each byte of `test` under a Witten-Bell n-gram of the rows of `train`, by order.

    p_n(x | h) = (count(h x) + types(h) p_{n-1}(x | h')) / (count(h) + types(h)), where h' is the context without its
    first byte, types(h) is the number of different bytes seen after h, and p_0 = 1/256.

    Args:
        train_NT: bytes; n-grams do not cross from one row into the next.
        test_T: bytes of one stream.
        order: the largest n.

    Returns:
        One array [T] for each n from 1 to `order`.
    """
    probability_T = np.full(len(test_T), 1 / 256)
    bits = []
    for n in range(1, order + 1):
        grams, counts = np.unique(_grams(train_NT, n), return_counts=True)
        contexts, first, types = np.unique(grams >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        wanted_T = _grams(test_T[None], n)
        seen_T = _lookup(grams, counts, wanted_T)
        total_T = _lookup(contexts, totals, wanted_T >> 8)
        types_T = _lookup(contexts, types, wanted_T >> 8)
        backed_off_T = probability_T[n - 1 :]
        known_T = total_T > 0
        mixed_T = (seen_T + types_T * backed_off_T) / np.where(known_T, total_T + types_T, 1)
        probability_T = probability_T.copy()
        probability_T[n - 1 :] = np.where(known_T, mixed_T, backed_off_T)
        bits.append(-np.log2(probability_T))
    return bits


def _grams(rows_NT, n: int):
    """Return every n-gram within a row, as one integer with the newest byte lowest."""
    windows = np.lib.stride_tricks.sliding_window_view(rows_NT, n, axis=1)
    grams = np.zeros(windows.shape[:2], np.int64)
    for i in range(n):
        grams = grams << 8 | windows[..., i]
    return grams.ravel()


def _lookup(keys, values, wanted):
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def xz_bits_per_byte(train: bytes, test: bytes) -> float:
    """Return the bits that xz adds per byte of `test` after compressing `train`."""
    size = lambda text: len(lzma.compress(text, preset=9))
    return 8 * (size(train + test) - size(train)) / len(test)
