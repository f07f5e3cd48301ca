"""Small initial embedding (Fig. 9): is early training faster, and is that due to the small values or to LN0?

Claim (section 3.4, appendix F): an embedding that starts tiny, followed by a LayerNorm (LN0), changes direction in its
first steps, so that the loss falls earlier than from the usual N(0, 0.02). The paper draws one pair of curves and
prints no numbers. Here the two parts are separated: {N(0, 0.02), U(-1e-4, 1e-4)} x {LN0, none}. The vocabulary has
mostly rare tokens (BPE, 4,096, trained on the same text), because the effect is about rare tokens.

    python -m experiments.small_init.run              2 x 64, 200 steps of 2,048 tokens, 3 seeds each
    python -m experiments.small_init.run --sweep      learning rate of each arm -> sweep.json
    python -m experiments.small_init.run --preset=gpu 6 x 512, 1,400 steps of 16,384 tokens
    python -m experiments.small_init.run --smoke

Cost: 12 minutes on 2 shared cores, and `--sweep` as long; `gpu`, estimated: 15 minutes on one H200.

LN0's epsilon, 1e-5, belongs to the treatment: it outweighs the variance 3e-9 of U(-1e-4, 1e-4), so that the stream
starts at 0.018 rather than 1, and grows into its norm. Each arm has its own best rate and a warm-up of 5 %.

Measured: held-out loss at shares of the run, small with LN0 minus normal without, paired by seed and batches, with t
intervals over seeds. Verdict by the loss at a tenth of the run:
  same sign      it is lower with its interval
  contradicted   it is higher with its interval
  not resolved   otherwise
The end is not judged: the paper's curves meet. The effect of each part is the mean over the other's two settings.

Deviations: a vocabulary of 4,096 rather than 50,277 and source code rather than the Pile, with fewer rare tokens; the
paper's model and step count are unknown. Losses are nats a token of this vocabulary.
"""

from itertools import product
from pathlib import Path

import numpy as np
import tokenizers

from experiments import statistics, study
from experiments.command import claim, not_run
from rwkv_jax import data
from rwkv_jax.files import written

EMBEDDINGS = {"U(1e-4)": "v5", "N(0, 0.02)": "normal"}
ARMS = {
    f"{embedding}, {'LN0' if norm else 'no LN0'}": {"model.embedding_init": scheme, "model.embedding_norm": norm}
    for (embedding, scheme), norm in product(EMBEDDINGS.items(), (True, False))
}
SMALL, USUAL = "U(1e-4), LN0", "N(0, 0.02), no LN0"
SHARES = (0.1, 0.25, 0.5, 1.0)
EARLY = SHARES[0]


def bpe(source: str, vocab_size: int, folder: Path) -> Path:
    """Return the path of a byte-level BPE vocabulary of the training split, built once in `folder`.

    Token 0 is the separator.
    """
    path = folder / f"bpe-{Path(source).stem}-{vocab_size}.json"
    if path.exists():
        return path
    train = data.prepare(source, "bytes").train
    ends = np.append(train.starts[1:], len(train.tokens))
    texts = (bytes(train.tokens[a + 1 : b]).decode(errors="replace") for a, b in zip(train.starts, ends, strict=True))
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        file.write(library.to_str(pretty=True).encode())
    return path


def prepare(config, folder: Path) -> None:
    config.tokenizer = str(bpe(config.corpus, config.model.vocab_size, folder))


def effects(its, values: dict, share: float) -> dict:
    """Return paired differences in nats at a share of the run, and their intervals: both parts together, and each."""
    config = study.config_of(its)
    look = round(share * config.steps / config.eval_every) - 1
    runs = {arm: study.runs_of(its, values, arm) for arm in ARMS}
    nats = {arm: np.array([run["curve"]["valid_loss_nats"][look] for run in runs[arm]]) for arm in ARMS}
    pair = lambda a, b: nats[a] - nats[b]
    interval = lambda x: [round(v, 4) for v in statistics.t_interval(x)]
    norm = [pair(f"{embedding}, LN0", f"{embedding}, no LN0") for embedding in EMBEDDINGS]
    small = [pair(f"U(1e-4), {norm}", f"N(0, 0.02), {norm}") for norm in ("LN0", "no LN0")]
    return {
        "small with LN0 - normal without": interval(pair(SMALL, USUAL)),
        "LN0": interval(np.mean(norm, axis=0)),
        "small": interval(np.mean(small, axis=0)),
    }


def conclude(its, values: dict) -> dict:
    """Compare the losses of the arms at shares of the run."""
    config = study.config_of(its)
    by_share = {f"{share:g}": effects(its, values, share) for share in SHARES}
    told = lambda share, name: statistics.told(*by_share[f"{share:g}"][name])
    both, tokens = "small with LN0 - normal without", config.seq_len * config.batch_size * config.steps * EARLY
    _, low, high = by_share[f"{EARLY:g}"][both]
    return {
        "differences": by_share,
        "ledger": [
            claim(
                "Fig. 9, small initial embedding with LN0",
                "loss falls earlier; no numbers",
                f"{told(EARLY, both)} nats a token; the small values alone {told(EARLY, 'small')}",
                statistics.verdict(low, high, sign=-1),
                run=f"{study.size_of(its)}, after {tokens:,.0f} tokens",
                details=f"LN0 alone {told(EARLY, 'LN0')}; at the end both {told(1, both)}",
            )
        ],
        "not_run": [
            not_run(
                "Fig. 9 at 6 x 512, vocabulary 50,277, 23 M tokens",
                "python -m experiments.small_init.run --preset=gpu",
                hours=0.3,
            )
        ],
    }


TINY = {"num_layers": 1, "dim": 16, "vocab_size": 512}
LARGE = {"num_layers": 6, "dim": 512, "vocab_size": 50277, "dtype": "bfloat16"}
STUDY = {
    "base": {
        "model": {"num_layers": 2, "dim": 64, "vocab_size": 4096}, "seq_len": 128, "batch_size": 16, "steps": 200,
        "eval_every": 10, "eval_tokens": 2**13, "optim.lr": 1.6e-2,
    },
    "arms": ARMS,
    "seeds": 3,
    "measure": (),
    "against": None,
    "swept": True,
    "sweep": study.Sweep(value=lambda run: run["curve"]["valid_loss_nats"][-1]),
    "prepare": prepare,
    "conclude": conclude,
    "presets": {
        "smoke": {"base": {"model": TINY, "steps": 8, "eval_every": 1, "eval_tokens": 2**8}},
        "gpu": {
            "base": {
                "model": LARGE, "seq_len": 256, "batch_size": 64, "steps": 1400, "eval_every": 70,
                "eval_tokens": 2**17, "optim.lr": 2e-3, "corpus": "enwik8",
            },
            "seeds": 2,
        },
    },
}  # fmt: skip

if __name__ == "__main__":
    study.main(**STUDY)
