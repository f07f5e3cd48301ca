"""What a corpus holds: sizes, and documents that repeat others."""

import hashlib

import numpy as np
from tqdm import tqdm

from rwkv_jax.corpora.corpus import SEPARATOR, SPLITS, Corpus, Split

_WINDOW = 16  # tokens
_KEPT = 8  # one window in so many is looked at, by hash, so that copies are looked at in the same places
_BITS = 1 << 32


def report(corpus: Corpus) -> dict:
    """JSON values: name, tokenizer, vocabulary, hash, and by split its tokens, documents, bytes and repetitions.

    A copy has the tokens of an earlier document; a near copy has more than half of its windows of 16 tokens in earlier
    documents. Earlier is by order of train, valid, test: what the two later repeat may be known from training.
    """
    seen = np.zeros(_BITS // 8, np.uint8)  # 512 MiB, of which only what is touched takes memory
    digests, splits = set(), {}
    total = sum(len(getattr(corpus, name).starts) for name in SPLITS)
    with tqdm(desc="documents", total=total, disable=None, leave=False) as bar:
        for name in SPLITS:
            split = getattr(corpus, name)
            splits[name] = _sizes(split) | _repetitions(split, digests, seen, bar)
    about = {"name": corpus.name, "tokenizer": corpus.tokenizer, "vocab_size": corpus.vocab_size}
    return about | {"sha256": corpus.sha256, **splits}


def _sizes(split: Split) -> dict:
    num_text = len(split.tokens) - int(np.sum(split.tokens[split.starts] == SEPARATOR))
    return {
        "tokens": len(split.tokens),
        "documents": len(split.starts),
        "bytes": split.num_bytes,
        "bytes_per_token": split.num_bytes / num_text if split.num_bytes and num_text else None,
        "predicted": len(split.tokens) if split.mask is None else int(np.count_nonzero(split.mask)),
    }


def _repetitions(split: Split, digests: set, seen: np.ndarray, bar) -> dict:
    copies = near = 0
    for begin, end in zip(split.starts, [*split.starts[1:], len(split.tokens)], strict=True):
        tokens = np.asarray(split.tokens[begin + (split.tokens[begin] == SEPARATOR) : end], np.uint64)
        digest = hashlib.sha256(tokens.data).digest()[:16]
        windows = _windows(tokens)
        byte, bit = windows >> np.uint64(3), (1 << (windows & np.uint64(7)).astype(np.uint8)).astype(np.uint8)
        if digest in digests:
            copies += 1
        elif len(windows) and np.mean((seen[byte] & bit) != 0) > 0.5:
            near += 1
        digests.add(digest)
        np.bitwise_or.at(seen, byte, bit)
        bar.update()
    return {"copies": copies, "near_copies": near}


def _windows(tokens: np.ndarray) -> np.ndarray:
    """Numbers of some windows of the tokens, in [0, _BITS); none of fewer tokens than a window has."""
    num_windows = max(0, len(tokens) - _WINDOW + 1)
    hashes = np.zeros(num_windows, np.uint64)
    for i in range(_WINDOW):
        hashes = (hashes ^ tokens[i : i + num_windows]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    kept = hashes[hashes % np.uint64(_KEPT) == 0]
    return (kept if len(kept) else np.sort(hashes)[:1]) >> np.uint64(32)


def readable(found: dict) -> str:
    about = "{name}: tokenizer {tokenizer}, vocabulary of {vocab_size:,}, SHA-256 {sha256:.16}".format(**found)
    lines = [about, f"{'':<6}{'tokens':>16}{'documents':>12}{'bytes/token':>13}{'copies':>9}{'near copies':>13}"]
    for name in SPLITS:
        row = found[name]
        rate = "-" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.3f}"
        counts = f"{row['tokens']:>16,}{row['documents']:>12,}{rate:>13}{row['copies']:>9,}{row['near_copies']:>13,}"
        part = "" if row["predicted"] == row["tokens"] else f"   {row['predicted']:,} to be predicted"
        lines.append(f"{name:<6}{counts}{part}")
    return "\n".join(lines)
