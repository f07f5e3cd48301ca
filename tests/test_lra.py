"""Long Range Arena: expressions and rules, what the classifier sees, public files, verdicts."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

import rwkv_jax
from experiments import command
from experiments.lra import classify, files, listops, run
from experiments.lra.listops import Examples

WORDS = {str(digit): digit for digit in range(10)} | {"MIN": 10, "MAX": 11, "MED": 12, "SM": 13, "]": 14}
PRESET = replace(run.PRESETS["smoke"], buckets=(8,), batch_size=8)


def tokens(text):
    return np.array([WORDS[word] for word in text.replace("[", "").split()], np.uint8)


@pytest.mark.parametrize(
    "text, values",  # at 0, 1, 2, ... levels
    [
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", [9, 4, 5]),
        ("[MED 3 8 5 6 ]", [4, 5]),  # 5.5, rounded down
        ("[SM 9 [SM 1 2 ] [MAX 0 [MIN 3 4 ] ] ]", [4, 2, 2, 5]),
        ("7", [7]),
    ],
)
def test_values_by_level(text, values):
    assert [listops.evaluate(tokens(text), levels) for levels in range(len(values))] == values
    assert listops.evaluate(tokens(text)) == values[-1]


def test_a_list_without_an_end_is_refused():
    with pytest.raises(ValueError, match="1 lists without an end"):
        listops.evaluate(tokens("[MAX 1 2"))


def test_expressions_keep_to_the_recipe():
    recipe = listops.Recipe(above=5, below=30, max_depth=3, max_args=4)
    made = listops.generate(600, recipe)
    lengths = [len(one) for one in made.tokens]
    assert min(lengths) == 6 and max(lengths) <= 29 and len({one.tobytes() for one in made.tokens}) == 600
    assert made.labels.tolist() == [listops.evaluate(one) for one in made.tokens]
    deepest = [np.cumsum(np.where(one == 14, -1, (one > 9).astype(int))).max() for one in made.tokens]
    assert max(deepest) == recipe.max_depth - 1  # the digits are the last level
    assert set(np.concatenate(made.tokens)) == set(range(15))


def test_any_number_of_processes_makes_the_same():
    recipe = listops.Recipe(5, 30)
    one, two = (listops.generate(700, recipe, seed=3, processes=n) for n in (1, 2))
    assert [x.tobytes() for x in one.tokens] == [x.tobytes() for x in two.tokens] and (one.labels == two.labels).all()
    assert one.tokens[0].tobytes() != listops.generate(1, recipe, seed=4).tokens[0].tobytes()


def test_rules_at_the_public_lengths():
    """Measured on 6,000 by another program: 0.169, 0.377, 0.593, 0.743, 0.838. Four standard errors of 500."""
    made = listops.generate(1000)
    found = listops.rules(made.part(0, 500), made.part(500, 1000))
    for share, expected in zip(found.values(), (0.169, 0.377, 0.593, 0.743, 0.838), strict=True):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 500) ** 0.5


@pytest.fixture(scope="module")
def examples():
    """Sequences whose class is their first token."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 4, rng.integers(1, 9)) for _ in range(101)]
    return Examples(rows, np.array([row[0] for row in rows]))


def test_batches_are_of_one_bucket_and_hold_every_example_once(examples):
    lengths = np.array([len(row) for row in examples.tokens])
    judged = classify.batches(examples, (4, 8), 16)
    assert sorted(np.concatenate([index for _, index in judged])) == list(range(101))
    trained = classify.batches(examples, (4, 8), 16, np.random.default_rng(0))
    index = np.concatenate([index for _, index in trained])
    assert all(len(index) == 16 for _, index in trained) and len(set(index)) == len(index) > 101 - 2 * 16
    for T, index in judged + trained:
        assert lengths[index].max() <= T and (T == 4 or lengths[index].min() > 4)
    with pytest.raises(ValueError, match="an example has 8 tokens, expected at most 6"):
        classify.batches(examples, (4, 6), 16)


@partial(jax.jit, static_argnums=0, static_argnames="method")
def forward(model, params, *args, method=None):
    return model.apply({"params": params}, *args, method=method)


def drawn(num_documents=1):
    lm = rwkv_jax.build("rwkv4", vocab_size=4, num_layers=1, dim=8)
    model = classify.Classifier(lm, 4, num_documents)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((2, 3), int))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: x + rng.standard_normal(x.shape, np.float32), params)


def test_padding_is_not_seen(examples):
    model, params = drawn()
    rows = classify.batch(examples, 8, np.arange(5), 8)
    assert rows["tokens"].shape == (8, 8) and (rows["labels"][5:] == examples.labels[0]).all()
    assert rows["valid"].sum(axis=1).tolist() == [len(examples.tokens[i]) for i in (0, 1, 2, 3, 4, 0, 0, 0)]
    other = np.where(rows["valid"], rows["tokens"], 3)
    logits, same = (forward(model, params, tokens, rows["valid"]) for tokens in (rows["tokens"], other))
    assert (logits == same).all() and not (forward(model, params, other, np.ones((8, 8), bool)) == logits).all()


def test_documents_of_a_pair_are_read_apart(examples):
    model, params = drawn(num_documents=2)
    rows = [np.array([1, 2, 3]), np.array([3, 0, 3]), np.array([0, 1]), np.array([2, 2, 2])]
    pairs = Examples(rows, np.array([0, 1]), 2)
    assert [row.tolist() for row in pairs.part(1, 2).tokens] == [[0, 1], [2, 2, 2]]
    batch = classify.batch(pairs, 4, np.array([1, 0]), 2)
    logits = forward(model, params, batch["tokens"], batch["valid"])
    one, other = np.asarray(forward(model.lm, params["lm"], np.stack(rows[:2]), method="hidden")[0]).mean(axis=1)
    dense = params["Dense_0"]
    by_hand = np.concatenate([one, other, one * other, one - other]) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(logits[1], by_hand, rtol=1e-4, atol=1e-5)


def test_training_finds_the_first_token(examples):
    model = classify.Classifier(rwkv_jax.build("rwkv4", vocab_size=4, num_layers=1, dim=8), 4)
    params, curve = classify.fit(model, examples, examples, PRESET, lr=3e-2, epochs=15, seed=0)
    nats, right = classify.judge(model, params, examples, PRESET)
    assert curve["valid_right"][-1] == right.mean() > 0.9
    assert curve["valid_loss_nats"][-1] == pytest.approx(nats.mean(), abs=1e-4)
    assert curve["valid_loss_nats"][-1] < curve["valid_loss_nats"][0]
    assert curve["steps"][-1] == 15 * (101 // 8) and len(curve["loss_nats"]) == classify.POINTS


def test_listops_files(tmp_path):
    head, row = "Source\tTarget\n", "( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )\t{}\n"
    for name, answer in (("train", 4), ("val", 5), ("test", 6)):
        (tmp_path / f"basic_{name}.tsv").write_text(head + row.format(answer) * answer)
    splits = files.load("listops", tmp_path)
    assert [split.labels.tolist() for split in splits] == [[4] * 4, [5] * 5, [6] * 6]
    assert splits[0].tokens[0].tolist() == tokens("[MAX 4 [MIN 2 3 ] ]").tolist()


def test_imdb_files(tmp_path):
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


def test_aan_files(tmp_path):
    for name in ("train", "eval", "test"):
        rows = [("1", "A1", "B2", "b'one'", "b'two'"), ("0", "C3", "D4", f"b'{name}'", f"b'{'x' * 5000}'")]
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    _, valid, _ = files.load("aan", tmp_path)
    assert valid.num_documents == 2 and valid.labels.tolist() == [1, 0]
    assert [bytes(row)[:6] for row in valid.tokens] == [b"b'one'", b"b'two'", b"b'eval", b"b'xxxx"]
    assert valid.tokens[3].size == 4000


def test_cifar10_files(tmp_path):
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
    (tmp_path / "test_batch.bin").write_bytes(b"too short")
    with pytest.raises(ValueError, match="test_batch have 9 bytes, expected records of 3,073"):
        files.load("cifar10", tmp_path)


def test_pathfinder_files(tmp_path):
    level, rng = tmp_path / "curv_contour_length_14", np.random.default_rng(0)
    (level / "metadata").mkdir(parents=True)
    (level / "imgs" / "0").mkdir(parents=True)
    pictures = rng.integers(0, 256, (10, 32, 32), np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(level / "imgs" / "0" / f"sample_{i}.png")
    (level / "imgs" / "0" / "sample_10.png").touch()  # the release holds such a file
    lines = [f"imgs/0 sample_{i}.png {i} {i % 2} 1.5 6 0 0\n" for i in range(11)]
    (level / "metadata" / "0.npy").write_text("".join(lines))
    splits = files.load("pathfinder", tmp_path)
    assert [len(split.labels) for split in splits] == [8, 1, 1]
    found = {row.tobytes(): label for split in splits for row, label in zip(split.tokens, split.labels, strict=True)}
    assert found == {picture.tobytes(): i % 2 for i, picture in enumerate(pictures)}


@pytest.mark.parametrize("name", files.TASKS)
def test_a_missing_folder_is_one_line(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {tmp_path}.* expected the public files"):
        files.load(name, tmp_path)


def test_other_words_are_one_line(tmp_path):
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n[FIRST 1 2 ]\t1\n")
    with pytest.raises(ValueError, match="does not hold ListOps as its public files do: KeyError"):
        files.load("listops", tmp_path)


@pytest.mark.parametrize(
    "arms, right, interval, verdict",
    [
        (("rwkv4",), {"rwkv4": 0.55}, (0.53, 0.57), "same sign"),
        (("rwkv4",), {"rwkv4": 0.36}, (0.34, 0.39), "not resolved"),
        (("rwkv4",), {"rwkv4": 0.30}, (0.28, 0.32), "contradicted"),
        (("rwkv4", "transformer"), {"rwkv4": 0.55, "transformer": 0.40}, (0.53, 0.57), "reproduced"),
        (("rwkv4", "transformer"), {"rwkv4": 0.70, "transformer": 0.40}, (0.68, 0.72), "same sign"),
        (("rwkv4", "transformer"), {"rwkv4": 0.55, "transformer": 0.60}, (0.53, 0.57), "contradicted"),
    ],
)
def test_verdicts(arms, right, interval, verdict):
    assert run.verdict_of(run.Preset(arms=arms), right, *interval, rule=0.37) == verdict


def test_other_lengths_reproduce_nothing():
    preset = run.Preset(above=20, below=100, arms=("rwkv4", "transformer"))
    assert run.verdict_of(preset, {"rwkv4": 0.55, "transformer": 0.4}, 0.53, 0.57, rule=0.37) == "same sign"


def test_the_interval_of_a_share():
    """Against its definition: the shares whose z from the observed one is 1.96."""
    low, high = run.interval(0.3, 50)
    for share in (low, high):
        assert abs(0.3 - share) / (share * (1 - share) / 50) ** 0.5 == pytest.approx(1.96)


def test_what_is_not_there_ends_with_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "compute", lambda cells, *_: [cells["imdb by its files, rwkv4"]()])
    argv = ["--smoke", f"--out={tmp_path}", f"--imdb={tmp_path / 'aclImdb'}"]
    code = command.main(run.HERE, run.__doc__, run.PRESETS, run.cells, run.conclude, run.sweep, run.OPTIONS, argv)
    assert code == 2 and f"error: no {tmp_path}/aclImdb/train/neg" in capsys.readouterr().err
