"""Context extension (section 5.2): windows of 2,048, 4,096 and 8,192 tokens, each stage after the previous one.

    python -m rwkv_jax.train --config=configs/extend.py:14b-2048 --workdir=runs/pile-14b-2048 --config.corpus=PATH
    python -m rwkv_jax.train --config=configs/extend.py:14b-4096 --workdir=runs/pile-14b-4096 --config.corpus=PATH
    python -m rwkv_jax.train --config=configs/extend.py:14b-8192 --workdir=runs/pile-14b-8192 --config.corpus=PATH

These commands continue the run of `configs/pile.py:14b` in runs/pile-14b for 10, 100 and 100 billion tokens. "169m" to
"7b" work likewise. The paper gives neither the learning rate nor the batch size of these stages. Here the rate stays
at the last one of pre-training, and a step has as many tokens as in pre-training. Cost: 1.75e22 FLOP for 14b, 9.1e21
for 7b. Not run here.

`:rwkv7-169m-8192` likewise, and other models of RWKV-5, 6 and 7 in `configs/pile.py`: their windows start at 4,096.

The same scaled down for a CPU, on bytes of the embedded corpus, from 128 tokens to 256, 512 and 1,024:

    for T in 128 256 512 1024; do
        python -m rwkv_jax.train --config=configs/extend.py:tiny-$T --workdir=runs/tiny-$T
    done

and with `tiny-rwkv7` instead of `tiny` for another model of `configs/tiny.py`.

Cost: 1,660 + 50 + 500 + 500 steps of 2,048 bytes, a few minutes on 2 CPU cores.
"""

from pathlib import Path

from rwkv_jax.train import optim, run_config

CONFIGS = Path(__file__).parent
STAGES = {2048: 10e9, 4096: 100e9, 8192: 100e9}  # window: tokens
TINY = {128: 1660, 256: 50, 512: 500, 1024: 500}  # window: steps; as 332 to 10 to 100 to 100 billion tokens


def get_config(arg="tiny-256"):
    size, _, length = (arg or "tiny-256").rpartition("-")
    short, _, name = size.partition("-")
    first = run_config.read(f"{CONFIGS / 'tiny.py'}:{name}" if short == "tiny" else f"{CONFIGS / 'pile.py'}:{size}")
    windows = TINY if short == "tiny" else [window for window in STAGES if window > first.seq_len]
    if not length.isdecimal() or int(length) not in windows:
        lengths = ", ".join(map(str, windows))
        raise ValueError(f"stage is {arg!r}, expected a size of configs/pile.py or 'tiny', then one of -{lengths}")
    return (_tiny if short == "tiny" else _pile)(first, size, int(length))


def _pile(config, size, seq_len):
    tokens, trunk = config.batch_size * config.seq_len, f"runs/pile-{size}"
    for window, budget in STAGES.items():
        if window <= config.seq_len:
            continue
        start, config.steps = config.steps, config.steps + round(budget / tokens)
        if window == seq_len:
            break
        trunk = f"runs/pile-{size}-{window}"
    config.update(seq_len=seq_len, batch_size=tokens // seq_len, branch_from=f"{trunk}/checkpoints/{start}")
    config.optim.update(schedule="constant", lr=config.optim.lr_end, warmup=0.0, decay=0.0)
    return config.lock()


def _tiny(config, size, seq_len):
    stages = list(TINY)
    before = stages[: stages.index(seq_len)]
    start = sum(TINY[window] for window in before)
    config.update(seq_len=seq_len, batch_size=2048 // seq_len, steps=start + TINY[seq_len], save_every=500)
    if before:
        config.branch_from = f"runs/{size}-{before[-1]}/checkpoints/{start}"
        model = run_config.model_of(config)
        lr = optim.default_lr(model.layers[0], model.dim) / 10  # where the first stage ends
        config.optim.update(schedule="constant", lr=lr, lr_end=lr, warmup=0.0, decay=0.0)
    return config.lock()
