"""Token files, Megatron pairs and `.npy`, memory-mapped in place.

The first call reads all tokens for their SHA-256, range and separators; the cache keeps these results. The splits are
cut where the first documents after 90 and 95 % of the tokens begin, or by position where there are too few.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rwkv_jax.data import cache, megatron
from rwkv_jax.data.corpus import SEPARATOR, Corpus, Split
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.files import one_line

_BLOCK_TOKENS = 1 << 22
_NPY = b"\x93NUMPY"


def find(path: Path) -> Path | None:
    """Return the file of the tokens that `path` names, or None if it names no token file."""
    if _is_npy(path):
        return path
    prefix = megatron.prefix_of(path)
    return prefix and megatron.with_ending(prefix, ".bin")


def _is_npy(path: Path) -> bool:
    if path.suffix == ".npy":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_NPY)) == _NPY


def read(path: Path, tokenizer: Tokenizer, tokenizer_id: str) -> Corpus:
    """Return the corpus of a file that `find` returned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds no integers or tokens outside the tokenizer's vocabulary.
    """
    tokens, starts = _npy(path) if _is_npy(path) else megatron.read(path.with_suffix(""))
    files = [path] if starts is None else [path, path.with_suffix(".idx")]
    identity = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    folder = cache.folder(path.stem, identity)
    found = cache.made(folder, lambda partial: _scan(partial, path, tokens, starts))
    low, high = found["range"]
    if low < 0 or high >= tokenizer.vocab_size:
        raise ValueError(
            f"{path} holds token {low if low < 0 else high}, outside the vocabulary of {tokenizer.vocab_size} "
            f"of tokenizer {tokenizer.name}: name the tokenizer that made it"
        )
    starts = np.fromfile(folder / "starts", np.int64)
    splits = []
    for begin, end in pairwise([0, *_cuts(path, starts, len(tokens)), len(tokens)]):
        inside = np.concatenate([[0], starts[(starts > begin) & (starts < end)] - begin])
        num_bytes = end - begin - len(inside) if tokenizer.name == "bytes" else None
        splits.append(Split(tokens[begin:end], inside, (), num_bytes))
    sha256 = hashlib.sha256(json.dumps([tokenizer_id, found["sha256"]]).encode()).hexdigest()
    return Corpus(path.stem, tokenizer.name, tokenizer.vocab_size, sha256, *splits)


def _npy(path: Path):
    try:
        with np.errstate(over="ignore"):  # a header may claim a size that overflows; it is refused
            tokens = np.load(path, mmap_mode="r")
    except OSError:
        raise
    except Exception as error:  # the header is evaluated as Python, which can fail in any way
        raise ValueError(f"{path} is damaged or not a .npy file: {one_line(error)}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        raise ValueError(f"{path} holds {tokens.dtype} {list(tokens.shape)}, expected integers of one dimension")
    return tokens, None


def _scan(folder: Path, path: Path, tokens, begins) -> dict:
    """Read all tokens; return range and SHA-256, and write the positions of separators to the file `starts`."""
    sha256, separators, low, high = hashlib.sha256(), [], 0, 0
    about = {"desc": f"reading {path.name}", "unit": "token", "unit_scale": True}
    with tqdm(total=len(tokens), disable=None, leave=False, **about) as bar:
        for at in range(0, len(tokens), _BLOCK_TOKENS):
            block = tokens[at : at + _BLOCK_TOKENS]
            sha256.update(block)
            low, high = min(low, int(block.min())), max(high, int(block.max()))
            separators.append(at + np.flatnonzero(block == SEPARATOR))
            bar.update(len(block))
    if begins is None:
        starts = np.union1d([0], np.concatenate(separators))
    else:  # a separator before the document belongs to it
        starts = begins - ((begins > 0) & (tokens[begins - 1] == SEPARATOR))
    sha256.update(json.dumps([tokens.dtype.str, len(starts)]).encode())
    sha256.update(starts.data)
    starts.tofile(folder / "starts")
    return {"range": [low, high], "sha256": sha256.hexdigest()}


def _cuts(path: Path, starts, num_tokens: int) -> list[int]:
    """Return the positions of the two cuts."""
    cuts = [num_tokens * percent // 100 for percent in (90, 95)]
    whole = [int(starts[min(np.searchsorted(starts, cut), len(starts) - 1)]) for cut in cuts]
    cuts = whole if 0 < whole[0] < whole[1] < num_tokens else cuts
    if not 0 < cuts[0] < cuts[1] < num_tokens:
        raise ValueError(f"{path} holds {num_tokens} tokens: too few for train, valid and test")
    return cuts
