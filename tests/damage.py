"""Damaged files of any format: truncated, with flipped bytes, or replaced by something else."""

import contextlib
import resource
from pathlib import Path

import numpy as np

# Contents that users have in place of weights, and a part of the error for each.
FOREIGN = {
    b"": "empty file",
    b"\n\n<!DOCTYPE html><html>": "a web page, not weights",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "a Git LFS pointer",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "torch's old format",
    b"GGUF\x03\x00\x00\x00": "not weights; expected a .pth, .safetensors or rwkv.cpp file",
}


def cuts(content, last):
    """Every short prefix of `content`, some of the longer ones, and each of the 60 that end before `last`."""
    ends = [*range(min(300, last)), *range(300, last - 60, 13), *range(max(300, last - 60), last)]
    return [content[:end] for end in ends]


def flips(content, count):
    """`count` copies with up to 4 random bytes replaced, half of them in the header: lengths, magic numbers, names."""
    rng = np.random.default_rng(count)
    for _ in range(count):
        damaged = bytearray(content)
        for last in rng.choice([len(content), min(100, len(content))], rng.integers(1, 5)):
            damaged[rng.integers(last)] = rng.integers(256)
        yield bytes(damaged)


@contextlib.contextmanager
def half_a_gigabyte():
    """Limits the address space, since a hostile size asks for memory first."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
