"""The experiment on small initial embeddings: its vocabulary, its arms, and conclusions from synthetic curves."""

import numpy as np
import pytest

from experiments import study
from experiments.small_init.run import ARMS, STUDY, bpe, conclude
from rwkv_jax import data
from rwkv_jax.data import tokenizers

ITS = study.Study(**STUDY)
LOOKS = 20


def values(small=0.0, norm=0.0, noise=0.0):
    """Curves of all arms: they fall by one nat a decade of tokens, shifted by an effect that fades to 0."""
    rng, found = np.random.default_rng(0), {}
    for arm, fields in ARMS.items():
        shift = small * (fields["model.embedding_init"] == "v5") + norm * fields["model.embedding_norm"]
        for seed in range(3):
            level = 8 + 0.1 * seed + noise * rng.standard_normal()
            nats = level - np.log10(np.arange(1, LOOKS + 1)) + shift * np.linspace(1, 0, LOOKS)
            found[study.name_of(arm, seed)] = {"curve": {"valid_loss_nats": nats.tolist()}}
    return found


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({"small": -0.3, "norm": -0.1}, "same sign"),
        ({"small": 0.3}, "contradicted"),
        ({"small": -0.3, "norm": 0.3, "noise": 0.1}, "not resolved"),
    ],
    ids=str,
)
def test_small_init_verdict_is_about_the_beginning_of_training(given, verdict):
    concluded = conclude(ITS, values(**given))
    assert concluded["ledger"][0]["verdict"] == verdict
    if "noise" not in given:
        small, norm = (given.get(name, 0) * 18 / 19 for name in ("small", "norm"))  # second of 20 evaluations
        found = {name: mean for name, (mean, _, _) in concluded["differences"]["0.1"].items()}
        expected = {"small with LN0 - normal without": small + norm, "LN0": norm, "small": small}
        assert found == pytest.approx(expected, abs=1e-4)


def test_bpe_builds_its_vocabulary_once_and_round_trips_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, the café at the end\n" * 400)
    path = bpe(str(text), 300, tmp_path)
    tokenizer = tokenizers.get_tokenizer(str(path))
    ids = tokenizer.encode("the mat\nunseen: ж")
    assert 256 < tokenizer.vocab_size <= 300 and len(tokenizer.encode("the cat")) < 7
    assert tokenizer.decode(ids) == "the mat\nunseen: ж" and data.SEPARATOR not in ids
    before = path.stat().st_mtime_ns
    assert bpe(str(text), 300, tmp_path) == path and path.stat().st_mtime_ns == before
