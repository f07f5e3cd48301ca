"""The released World models of RWKV-5.2, 6 and 7: `configs/world.py:rwkv7-0.1b`, `:rwkv6-1.6b`, `:rwkv5-3b` and so on.

    python -m rwkv_jax.train --config=configs/world.py:rwkv7-0.1b --workdir=runs/world-0.1b --config.corpus=PATH

The recipe of `configs/pile.py` with the World vocabulary and, from arXiv:2404.05892, the tokens a step and the weight
decay of RWKV-5 and 6, 0.001 (RWKV-7: 0.1). One epoch: of World v2 for RWKV-5 and 6, of World v3 for RWKV-7.
No source was found for the rates and the batch at 768 (here the rates of the Pile's rwkv7-169m, the batch of 1,024),
nor for those of RWKV-7 at any width. Released RWKV-7 World models started from trained RWKV-5 and 6.
Cost: 2.7e21 FLOP for rwkv7-0.1b, 1.3e23 for rwkv7-7.2b. Not run here.
"""

from pathlib import Path

from rwkv_jax import models
from rwkv_jax.train import run_config

PILE = Path(__file__).parent / "pile.py"
VOCABULARY = 65536
#        tokens, weight decay
TABLE = {"rwkv5": (1.12e12, 0.001), "rwkv6": (1.12e12, 0.001), "rwkv7": (3.119e12, 0.1)}
WINDOWS = {768: 192, 1024: 192, 2048: 384, 2560: 192, 4096: 576}  # a step, by width


def get_config(arg="rwkv7-0.1b"):
    arg = arg or "rwkv7-0.1b"
    released = {
        f"{name}-{size}": TABLE[name]
        for name in TABLE
        for size, fields in models.KINDS[name].sizes.items()
        if fields["vocab_size"] == VOCABULARY
    }
    if arg not in released:
        raise ValueError(f"unknown size {arg!r}, expected one of {', '.join(released)}")
    tokens, weight_decay = released[arg]
    config = run_config.read(f"{PILE}:{arg}")
    config.model.vocab_size = VOCABULARY
    config.update(corpus="world", tokenizer="world", batch_size=WINDOWS[config.model.dim])
    config.steps = round(tokens / (config.batch_size * config.seq_len))
    config.optim.update(weight_decay=weight_decay, warmup=10 / config.steps)
    return config.lock()
