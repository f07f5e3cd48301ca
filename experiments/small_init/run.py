"""Small initial embedding (Fig. 9): is training faster in its beginning, and is it the small values or LN0?

Claim (section 3.4, appendix F): an embedding that starts tiny, with a LayerNorm (LN0) behind it, changes direction in
its first steps, so that the loss falls earlier than from the usual N(0, 0.02). The paper draws one pair of curves and
prints no numbers. Here the two halves are apart: {N(0, 0.02), U(-1e-4, 1e-4)} x {LN0, none}, on tokens of a
vocabulary in which most are rare (BPE, 4,096, trained on the same text), as the effect is about rare tokens.

    python -m experiments.small_init.run              2 x 64, 200 steps of 2,048 tokens, 3 seeds each
    python -m experiments.small_init.run --sweep      learning rate of each arm -> sweep.json
    python -m experiments.small_init.run --preset=gpu 6 x 512, 1,400 steps of 16,384 tokens
    python -m experiments.small_init.run --smoke --out=DIR

Cost: 12 minutes on 2 shared cores, and `--sweep` as long; `gpu`, estimated: 15 minutes on one H200.

LN0's epsilon, 1e-5, belongs to the treatment: it outweighs the variance 3e-9 of U(-1e-4, 1e-4), so that the stream
starts at 0.018 rather than 1, and grows into its norm. Each arm has its own best rate and a warm-up of 5 %.
What is measured is held-out loss at shares of the run, and the tokens until fixed losses, small with LN0 minus normal
without, paired by seed and batches, with t intervals over seeds. *Same sign*: the loss at a tenth of the run is
lower with its interval; *contradicted*: it is higher with it; else *not resolved*. The end is told, not judged: the
paper's curves meet. Of each half, what it does is the mean over the other's two settings.

Deviations: a vocabulary of 4,096 rather than 50,277 and source code rather than the Pile, with fewer rare
tokens; the paper's model and step count are unknown. Losses are nats a token of this vocabulary, for its arms alone.
"""

import hashlib
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tokenizers

from experiments import command, sweeps, text
from experiments.statistics import t_interval
from rwkv_jax import corpora, metrics, run_config

HERE = Path(__file__).parent
EMBEDDINGS = {"U(1e-4)": "v5", "N(0, 0.02)": "normal"}
ARMS = {
    f"{embedding}, {'LN0' if norm else 'no LN0'}": {"embedding_init": scheme, "embedding_norm": norm}
    for (embedding, scheme), norm in product(EMBEDDINGS.items(), (True, False))
}
SMALL, USUAL = "U(1e-4), LN0", "N(0, 0.02), no LN0"
FIRST = (SMALL, USUAL, "N(0, 0.02), LN0", "U(1e-4), no LN0")  # the important first
SHARES = (0.1, 0.25, 0.5, 1.0)
EARLY = SHARES[0]


@dataclass(frozen=True)
class Preset:
    seeds: tuple = (0, 1, 2)
    lr: float = 1.6e-2  # where sweep.json has nothing of an arm, and what `--sweep` begins around
    vocab_size: int = 4096
    num_layers: int = 2
    dim: int = 64
    dtype: str = "float32"
    seq_len: int = 128
    batch_size: int = 16
    steps: int = 200
    looks: int = 20
    eval_tokens: int = 2**13
    text: str = "stdlib"


TINY = {"num_layers": 1, "dim": 16, "seq_len": 32, "batch_size": 2, "steps": 8, "looks": 8, "eval_tokens": 2**8}
PRESETS = {
    "smoke": Preset(seeds=(0, 1), vocab_size=512, **TINY),
    "cpu": Preset(),
    "gpu": Preset(
        seeds=(0, 1), lr=2e-3, vocab_size=50277, num_layers=6, dim=512, dtype="bfloat16", seq_len=256, batch_size=64,
        steps=1400, eval_tokens=2**17, text="enwik8",
    ),
}  # fmt: skip


def bpe(source: str, vocab_size: int, folder: Path) -> Path:
    """A byte-level BPE vocabulary of the training split, made once in `folder`. Token 0 is the separator."""
    path = folder / f"bpe-{Path(source).stem}-{vocab_size}.json"
    if path.exists():
        return path
    train = corpora.prepare(source, "bytes").train
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
    beside = path.with_suffix(".partial")
    library.save(str(beside))
    return beside.replace(path)


def config_of(preset: Preset, arm: str, seed: int, lr: float, vocabulary: Path):
    """The training run of one arm."""
    config = run_config.default()
    config.model.update(ARMS[arm], vocab_size=preset.vocab_size)
    config.model.update(num_layers=preset.num_layers, dim=preset.dim, dtype=preset.dtype)
    config.update(corpus=preset.text, tokenizer=str(vocabulary.absolute()), steps=preset.steps, seed=seed)
    config.update(seq_len=preset.seq_len, batch_size=preset.batch_size, log_every=max(1, preset.steps // 100))
    config.update(eval_every=preset.steps // preset.looks, eval_tokens=preset.eval_tokens, save_every=0)
    config.optim.lr = lr
    return config


def trained(preset: Preset, arm: str, seed: int, lr: float, folder: Path, workdir: Path) -> dict:
    """Held-out nats a token against the tokens seen."""
    vocabulary = bpe(preset.text, preset.vocab_size, folder)
    text.trained(config_of(preset, arm, seed, lr, vocabulary), workdir)
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "valid_loss_nats" in row]
    return {
        "lr": lr,
        "tokens": [row["step"] * preset.seq_len * preset.batch_size for row in rows],
        "nats": [round(row["valid_loss_nats"], 5) for row in rows],
        "training": text.curve(workdir),
        "vocabulary_sha256": hashlib.sha256(vocabulary.read_bytes()).hexdigest(),
    }


def best_rate(arm: str) -> float | None:
    """Of an arm in sweep.json; None where it was not swept."""
    runs = sweeps.swept(HERE / "sweep.json").get(arm)
    return runs and float(min(runs, key=runs.get))


def cells(preset: Preset, folder: Path) -> command.Cells:
    """A run each: all arms with the first seed before any with the second."""

    def cell(arm, seed):
        lr = best_rate(arm) if preset == PRESETS["cpu"] else None
        workdir = folder / f"{list(ARMS).index(arm)}-{seed}"
        return lambda: trained(preset, arm, seed, lr or preset.lr, folder, workdir)

    return {f"{arm}, seed {seed}": cell(arm, seed) for seed in preset.seeds for arm in FIRST}


def tokens_until(nats, tokens, level: float) -> float | None:
    """Tokens at which a held-out curve first reaches `level`, on a straight line between looks; None: it does not."""
    nats, tokens = np.minimum.accumulate(nats), np.asarray(tokens, float)
    if nats[-1] > level or nats[0] < level:
        return None
    return float(np.interp(-level, -nats, tokens))


def conclude(preset: Preset, values: dict) -> dict:
    """Paired differences at shares of the run, and of the tokens until losses that all arms reach."""
    of = lambda arm: [values[f"{arm}, seed {seed}"] for seed in preset.seeds]
    at = lambda arm, share: np.array([run["nats"][round(share * preset.looks) - 1] for run in of(arm)])
    interval = lambda x: [round(v, 4) for v in t_interval(x)]

    def effects(share):
        """Small with LN0 minus normal without; and each half, the mean over the other."""
        nats = {arm: at(arm, share) for arm in ARMS}
        pair = lambda a, b: nats[a] - nats[b]
        norm = [pair(f"{embedding}, LN0", f"{embedding}, no LN0") for embedding in EMBEDDINGS]
        small = [pair(f"U(1e-4), {norm}", f"N(0, 0.02), {norm}") for norm in ("LN0", "no LN0")]
        return {
            "small with LN0 - normal without": interval(pair(SMALL, USUAL)),
            "LN0": interval(np.mean(norm, axis=0)),
            "small": interval(np.mean(small, axis=0)),
        }

    by_share = {f"{share:g}": effects(share) for share in SHARES}
    floor = max(run["nats"][-1] for arm in ARMS for run in of(arm))
    ceiling = min(run["nats"][0] for arm in ARMS for run in of(arm))
    levels = [round(x, 2) for x in np.linspace(ceiling, floor, 5)[1:-1]] if ceiling > floor else []
    until = {
        arm: [[tokens_until(run["nats"], run["tokens"], level) for run in of(arm)] for level in levels] for arm in ARMS
    }
    _, low, high = by_share[f"{EARLY:g}"]["small with LN0 - normal without"]
    early = "same sign" if high < 0 else "contradicted" if low > 0 else "not resolved"
    told = lambda share, name: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*by_share[f"{share:g}"][name])
    early_tokens = preset.seq_len * preset.batch_size * preset.steps * EARLY
    return {
        "levels": levels,
        "tokens_until": until,
        "differences": by_share,
        "lr": {arm: of(arm)[0]["lr"] for arm in ARMS},
        "lr_swept": [arm for arm in ARMS if best_rate(arm) == of(arm)[0]["lr"]],
        "ledger": [
            {
                "artefact": "Fig. 9, small initial embedding with LN0",
                "paper": "loss falls earlier; no numbers",
                "ours": f"after {early_tokens:,.0f} tokens {told(EARLY, 'small with LN0 - normal without')} nats a "
                f"token (LN0 {told(EARLY, 'LN0')}, small values {told(EARLY, 'small')}), at the end "
                f"{told(1, 'small with LN0 - normal without')}",
                "verdict": early,
            }
        ],
        "not_run": [
            {
                "artefact": "Fig. 9 at 6 x 512, vocabulary 50,277, 23 M tokens",
                "command": "python -m experiments.small_init.run --preset=gpu",
                "hardware": "one H100 or H200",
                "hours": 0.3,
                "why": "no GPU for so long",
            }
        ],
    }


def sweep(preset: Preset, path: Path) -> None:
    """Held-out loss at the end of the run, of each arm and rate."""
    folder = Path("runs/small_init/sweep")
    for arm in FIRST:

        def loss(lr, arm=arm):
            workdir = folder / f"{list(ARMS).index(arm)}-{lr:g}"
            return trained(preset, arm, preset.seeds[0], lr, folder, workdir)["nats"][-1]

        sweeps.bracket(path, arm, preset.lr, loss, fields=command.fields(preset))


if __name__ == "__main__":
    sys.exit(command.main(HERE, __doc__, PRESETS, cells, conclude, sweep))
