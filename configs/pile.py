"""The released Pile models (Tables 2 and 3): `configs/pile.py:169m`, `:430m`, `:1b5`, `:3b`, `:7b`, `:14b`; RWKV-7.

    python -m rwkv_jax.train --config=configs/pile.py:169m --workdir=runs/pile-169m --config.corpus=PATH \\
        --config.tokenizer=20B_tokenizer.json
    python -m rwkv_jax.train --config=configs/pile.py:14b --rehearse=v5p:4x4x8         its memory: docs/scale.md

Training is one epoch of the Pile: 332.1 billion GPT-NeoX-20B tokens in windows of 1,024, which are 8,043 mini-epochs
of 40,320 windows. The learning rate is constant for the mini-epochs in `TABLE`, then decays exponentially. The batch
was "128 or 256" windows, switched at a point that the paper does not give. Here it is 128, hence 2.5 million steps.
Cost: 2.6e20 FLOP for 169m (8 days on one H200 at 40 % of its peak), 2.8e22 for 14b.
Expected: training loss 2.533, 2.260, 2.040, 1.945, 1.839, 1.757 nats a token at the end, read off the author's figure
(+-0.005). Not run here.

    python -m rwkv_jax.train --config=configs/pile.py:rwkv7-169m --workdir=runs/pile-rwkv7-169m --config.corpus=PATH

is the script of the released rwkv7-169m (RWKV-LM, RWKV-v7/train_temp/demo-training-run-v7-pile.sh): windows of 4,096,
240 a step, cosine decay after 10 steps of warm-up, weight decay 0.1, Adam's epsilon 1e-18. Its first step has a tenth
of the rate, in the script a hundredth. `rwkv7-421m`, `rwkv7-1b5` and `rwkv6-173m` were released too; any other size of
RWKV-5, 6 and 7 in `build`, such as `rwkv5-0.1b`, takes the Pile's vocabulary. For all but rwkv7-169m the script
is an assumption, with its learning rates at width 768 and those of the World models at others.
Cost: 2.6e20 FLOP for rwkv7-169m, 2.7e21 for rwkv7-1b5. Not run here.
"""

from rwkv_jax import models
from rwkv_jax.train import run_config

#        layers, width, lr, last lr, mini-epochs before the decay
TABLE = {
    "169m": (12, 768, 6e-4, 1e-5, 361),
    "430m": (24, 1024, 4e-4, 1e-5, 411),
    "1b5": (24, 2048, 3e-4, 1e-5, 443),
    "3b": (32, 2560, 1.5e-4, 1e-5, 451),
    "7b": (32, 4096, 1.5e-4, 1e-5, 465),
    "14b": (40, 5120, 1e-4, 7e-6, 544),
}
MINI_EPOCHS, WINDOWS = 8043, 40320

TOKENS = 332_115_325_534
LATER = ("rwkv5", "rwkv6", "rwkv7")
# of LATER, by width: lr, last lr
RATES = {768: (8e-4, 3e-5), 1024: (4e-4, 2e-5), 2048: (3e-4, 2e-5), 2560: (2e-4, 1.5e-5), 4096: (1.5e-4, 1e-5)}


def get_config(arg="169m"):
    name, _, size = (arg or "169m").rpartition("-")
    sizes = models.KINDS[name].sizes if name in LATER else TABLE
    if name not in (*LATER, "") or size not in sizes:
        known = ", ".join([*TABLE, *(f"{name}-{size}" for name in LATER for size in models.KINDS[name].sizes)])
        raise ValueError(f"unknown size {arg!r}, expected one of {known}")
    config = run_config.default()
    config.model.update(dtype="bfloat16", remat="block")
    config.update(corpus="pile", tokenizer="20B_tokenizer.json", strategy="fsdp")
    config.data.order = "released"
    config.update(log_every=100, eval_every=10_000, eval_tokens=2**22, save_every=1000)
    if name:
        _later(config, name, size)
    else:
        _rwkv4(config, size)
    return config.lock()


def _rwkv4(config, size):
    num_layers, dim, lr, lr_end, constant = TABLE[size]
    config.model.update(vocab_size=50277, num_layers=num_layers, dim=dim)
    config.model.embedding_scale = lr  # v4neo draws the embedding from U(+-lr_init)
    config.update(seq_len=1024, batch_size=128)
    config.steps = MINI_EPOCHS * WINDOWS // config.batch_size
    config.optim.update(lr=lr, lr_end=lr_end, warmup=0.0, decay=1 - constant / MINI_EPOCHS)


def _later(config, name, size):
    kind = models.KINDS[name]
    config.model.update(kind.sizes[size], name=name, vocab_size=50304)
    config.update(seq_len=4096, batch_size=240)
    config.steps = TOKENS // (config.batch_size * config.seq_len)
    lr, lr_end = RATES[config.model.dim]
    config.optim.update(kind.recipe, lr=lr, lr_end=lr_end, warmup=10 / config.steps)
