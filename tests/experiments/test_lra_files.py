"""Long Range Arena: the public files of each task."""

import numpy as np
import pytest
from PIL import Image

from experiments.lra import files


def test_load_reads_the_listops_files(tmp_path):
    head, row = "Source\tTarget\n", "( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )\t{}\n"
    for name, answer in (("train", 4), ("val", 5), ("test", 6)):
        (tmp_path / f"basic_{name}.tsv").write_text(head + row.format(answer) * answer)
    splits = files.load("listops", tmp_path)
    assert [split.labels.tolist() for split in splits] == [[4] * 4, [5] * 5, [6] * 6]
    assert splits[0].tokens[0].tolist() == [11, 4, 10, 2, 3, 14, 14]  # [MAX 4 [MIN 2 3 ] ]


def test_load_reads_the_imdb_files(tmp_path):
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(10):
                (tmp_path / split / label / f"{i}_{i % 5}.txt").write_text(f"{label} é" + "!" * 5000 * (i == 0))
    train, valid, test = files.load("imdb", tmp_path)
    assert [len(split.labels) for split in (train, valid, test)] == [18, 2, 20]
    assert test.labels.tolist() == [0] * 10 + [1] * 10
    assert test.tokens[0].size == 4096 and bytes(test.tokens[11].tolist()).decode() == "pos é"
    assert sorted(train.labels.tolist() + valid.labels.tolist()) == test.labels.tolist()


def test_load_reads_the_aan_files(tmp_path):
    for name in ("train", "eval", "test"):
        rows = [("1", "A1", "B2", "b'one'", "b'two'"), ("0", "C3", "D4", f"b'{name}'", f"b'{'x' * 5000}'")]
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    _, valid, _ = files.load("aan", tmp_path)
    assert valid.num_documents == 2 and valid.labels.tolist() == [1, 0]
    assert [bytes(row)[:6] for row in valid.tokens] == [b"b'one'", b"b'two'", b"b'eval", b"b'xxxx"]
    assert valid.tokens[3].size == 4000


def test_load_reads_the_cifar10_files(tmp_path):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (12, 3073), np.uint8)
    records[:, 0] = np.arange(12) % 10
    for i in range(5):
        records[2 * i : 2 * i + 2].tofile(tmp_path / f"data_batch_{i + 1}.bin")
    records[10:].tofile(tmp_path / "test_batch.bin")
    train, valid, test = files.load("cifar10", tmp_path)
    assert [len(split.labels) for split in (train, valid, test)] == [9, 1, 2] and test.labels.tolist() == [0, 1]
    red, green, blue = records[10, 1:].reshape(3, 32, 32).astype(int)
    grey = (299 * red + 587 * green + 114 * blue) // 1000
    assert test.tokens[0].tolist() == grey.ravel().tolist()


def test_load_reads_the_pathfinder_files(tmp_path):
    level, rng = tmp_path / "curv_contour_length_14", np.random.default_rng(0)
    (level / "metadata").mkdir(parents=True)
    (level / "imgs" / "0").mkdir(parents=True)
    pictures = rng.integers(0, 256, (10, 32, 32), np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(level / "imgs" / "0" / f"sample_{i}.png")
    (level / "imgs" / "0" / "sample_10.png").touch()  # the release contains such an empty file
    lines = [f"imgs/0 sample_{i}.png {i} {i % 2} 1.5 6 0 0\n" for i in range(11)]
    (level / "metadata" / "0.npy").write_text("".join(lines))
    splits = files.load("pathfinder", tmp_path)
    assert [len(split.labels) for split in splits] == [8, 1, 1]
    found = {row.tobytes(): label for split in splits for row, label in zip(split.tokens, split.labels, strict=True)}
    assert found == {picture.tobytes(): i % 2 for i, picture in enumerate(pictures)}


def test_load_refuses_missing_or_broken_files_in_one_line(tmp_path):
    for name in files.TASKS:
        with pytest.raises(FileNotFoundError, match=f"no {tmp_path}.* expected the public files"):
            files.load(name, tmp_path)
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n[FIRST 1 2 ]\t1\n")
    with pytest.raises(ValueError, match="does not hold ListOps as its public files do: KeyError"):
        files.load("listops", tmp_path)
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(b"too short")
    with pytest.raises(ValueError, match="have 45 bytes, expected records of 3,073"):
        files.load("cifar10", tmp_path)
