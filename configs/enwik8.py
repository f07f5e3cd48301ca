"""enwik8, byte level, at the shape of the paper's Table 5: 12 x 512, batch 16, T 1,024, dropout 0.1, weight decay 0.1.

    python -m rwkv_jax.train --config=configs/enwik8.py:rwkv4 --workdir=runs/enwik8 --config.corpus=PATH/enwik8
    python -m rwkv_jax.train --config=configs/enwik8.py:transformer --workdir=runs/enwik8-transformer \\
        --config.corpus=PATH/enwik8

enwik8 is the 100,000,000 bytes of mattmahoney.net/dc/enwik8.zip, split 90/5/5 MB by position as usual.
Cost: 2.5e8 FLOP a token, 2.2e16 an epoch of 5,493 steps; 40 epochs are about 9e17 FLOP, hours on one GPU.
Expected: the paper prints 1.178 test bits a character for RWKV-4 (train 1.010) and 1.137 for the transformer. It does
not state the epochs, the final learning rate, or whether it counts characters or bytes. Not run here.
"""

from rwkv_jax.train import run_config

STEPS_A_EPOCH = 5_493


def get_config(arg="rwkv4"):
    config = run_config.default()
    config.model.update(name=arg or "rwkv4", num_layers=12, dim=512, dropout=0.1, dtype="bfloat16")
    config.update(corpus="enwik8", seq_len=1024, batch_size=16, steps=40 * STEPS_A_EPOCH)
    config.optim.update(lr=6e-4, lr_end=1e-5, weight_decay=0.1, decay=0.9, warmup=0.002)
    config.update(log_every=100, eval_every=STEPS_A_EPOCH, eval_tokens=2**20, save_every=1000)
    return config.lock()
