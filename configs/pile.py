"""The released RWKV-4 Pile models (Tables 2 and 3): `configs/pile.py:169m`, `:430m`, `:1b5`, `:3b`, `:7b`, `:14b`.

    python -m rwkv_jax.train --config=configs/pile.py:169m --workdir=runs/pile-169m --config.corpus=PATH \\
        --config.tokenizer=20B_tokenizer.json
    python -m rwkv_jax.train --config=configs/pile.py:14b --rehearse=v5p:4x4x8         does it fit: see docs/scale.md

The Pile is one epoch of 332.1 billion GPT-NeoX-20B tokens in windows of 1,024; a constant learning rate for W of 8,043
mini-epochs of 40,320 windows, then exponential decay. The batch was "128 or 256" windows, switched at a point that the
paper does not give; 128 here, hence 2.5 million steps.
Cost: 2.6e20 FLOP for 169m (8 days on one H200 at 40 % of its peak), 2.8e22 for 14b.
Expected: training loss 2.533, 2.260, 2.040, 1.945, 1.839, 1.757 nats a token at the end, read off the author's figure
(+-0.005). Not run here.
"""

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


def get_config(arg="169m"):
    size = arg or "169m"
    if size not in TABLE:
        raise ValueError(f"unknown size {size!r}, expected one of {', '.join(TABLE)}")
    num_layers, dim, lr, lr_end, constant = TABLE[size]
    config = run_config.default()
    config.model.update(vocab_size=50277, num_layers=num_layers, dim=dim, dtype="bfloat16", remat="block")
    config.model.embedding_scale = lr  # v4neo draws the embedding from U(+-lr_init)
    config.update(corpus="pile", tokenizer="20B_tokenizer.json", seq_len=1024, batch_size=128, strategy="fsdp")
    config.data.order = "released"
    config.steps = MINI_EPOCHS * WINDOWS // config.batch_size
    config.optim.update(lr=lr, lr_end=lr_end, warmup=0.0, decay=1 - constant / MINI_EPOCHS)
    config.update(log_every=100, eval_every=10_000, eval_tokens=2**22, save_every=1000)
    return config.lock()
