"""Readers of the Long Range Arena's public files: token sequences and classes.

Each option names the folder that its archive unpacks to:

    --listops     lra_release.gz: listops-1000/        basic_{train,val,test}.tsv
    --aan         lra_release.gz: tsv_data/            new_aan_pairs.{train,eval,test}.tsv
    --pathfinder  lra_release.gz: pathfinder32/        curv_contour_length_14/metadata/*.npy, which are text, and imgs/
    --imdb        aclImdb_v1.tar.gz: aclImdb/          {train,test}/{pos,neg}/*.txt
    --cifar10     cifar-10-binary.tar.gz: cifar-10-batches-bin/    {data_batch_1..5,test_batch}.bin, without pickle

Texts are bytes, images are grey levels in rows. As in S4's loaders, ListOps drops its parentheses, texts are truncated
to 4,096 bytes and papers to 4,000, Pathfinder is its harder set, split 8:1:1 at random, and empty files are skipped.
Without a validation split, a random tenth of the training data is used as one.
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.image import imread

from experiments.lra.listops import END, OPERATOR, OPERATORS, VOCAB_SIZE, Examples

Splits = tuple[Examples, Examples, Examples]
GREY = np.array([299, 587, 114])  # parts in 1000 of red, green and blue
TEXT_BYTES, PAPER_BYTES = 4096, 4000


def listops(folder: Path) -> Splits:
    words = {str(digit): digit for digit in range(10)} | {"]": END}
    words |= {f"[{name}": OPERATOR + i for i, name in enumerate(OPERATORS)}

    def split(name):
        rows = list(_table(folder / f"basic_{name}.tsv"))[1:]
        encode = lambda text: np.array([words[word] for word in text.split() if word not in "()"], np.uint8)
        return _examples([encode(source) for source, _ in rows], [label for _, label in rows])

    return split("train"), split("val"), split("test")


def text(folder: Path) -> Splits:
    def split(name):
        paths = [(path, label) for label in ("neg", "pos") for path in sorted(_there(folder / name / label).iterdir())]
        read = lambda path: np.frombuffer(path.read_bytes()[:TEXT_BYTES], np.uint8)
        return _examples([read(path) for path, _ in paths], [label == "pos" for _, label in paths])

    return *_apart(split("train"), (9, 1)), split("test")


def retrieval(folder: Path) -> Splits:
    def split(name):
        rows = list(_table(folder / f"new_aan_pairs.{name}.tsv"))
        papers = [np.frombuffer(paper.encode()[:PAPER_BYTES], np.uint8) for row in rows for paper in row[3:5]]
        return _examples(papers, [float(row[0]) for row in rows], num_documents=2)

    return split("train"), split("eval"), split("test")


def image(folder: Path) -> Splits:
    def split(*names):
        data = np.concatenate([np.fromfile(_there(folder / f"{name}.bin"), np.uint8) for name in names])
        if data.size % 3073:
            raise ValueError(f"{folder}: {', '.join(names)} have {data.size} bytes, expected records of 3,073")
        records = data.reshape(-1, 3073)
        grey = (records[:, 1:].reshape(-1, 3, 1024) * GREY[:, None]).sum(axis=1) // 1000
        return _examples(list(grey.astype(np.uint8)), records[:, 0])

    return *_apart(split(*(f"data_batch_{i}" for i in range(1, 6))), (9, 1)), split("test_batch")


def pathfinder(folder: Path) -> Splits:
    folder = folder / "curv_contour_length_14"
    images, labels = [], []
    for metadata in sorted(_there(folder / "metadata").glob("*.npy"), key=lambda path: int(path.stem)):
        for line in metadata.read_text().splitlines():
            place, name, _, label, *_ = line.split()
            path = _there(folder / place / name)
            if path.stat().st_size:
                pixels = np.round(imread(path) * 255)  # grey as [32, 32], or with channels last
                grey = pixels if pixels.ndim == 2 else (pixels[..., :3] * GREY).sum(axis=-1) // 1000
                images.append(grey.astype(np.uint8).ravel())
                labels.append(int(label))
    return _apart(_examples(images, labels), (8, 1, 1))


def _there(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {path}, expected the public files as experiments/lra/files.py lists them")
    return path


def _table(path: Path):
    csv.field_size_limit(sys.maxsize)
    with open(_there(path), newline="", encoding="utf-8") as file:
        yield from csv.reader(file, delimiter="\t")


def _examples(tokens, labels, num_documents=1) -> Examples:
    if not len(labels):
        raise ValueError("a split without examples, expected the public files")
    return Examples(tokens, np.array(labels, np.int32), num_documents)


def _apart(examples: Examples, parts) -> tuple[Examples, ...]:
    order = np.random.default_rng(42).permutation(len(examples.labels))
    bounds = len(order) * np.cumsum(parts)[:-1] // sum(parts)
    pick = lambda index: _examples([examples.tokens[i] for i in index], examples.labels[index])
    return tuple(map(pick, np.split(order, bounds)))


class Task(NamedTuple):
    title: str
    read: Callable[[Path], Splits]
    vocab_size: int
    num_classes: int
    longest: int  # tokens of a sequence


TASKS = {
    "listops": Task("ListOps", listops, VOCAB_SIZE, 10, 2048),
    "imdb": Task("Text", text, 256, 2, TEXT_BYTES),
    "aan": Task("Retrieval", retrieval, 256, 2, PAPER_BYTES),
    "cifar10": Task("Image", image, 256, 10, 1024),
    "pathfinder": Task("Pathfinder", pathfinder, 256, 2, 1024),
}


def load(name: str, folder: Path) -> Splits:
    """Return the training, validation and test examples of a task."""
    try:
        return TASKS[name].read(folder)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{folder} does not hold {TASKS[name].title} as its public files do: {error!r}") from error
