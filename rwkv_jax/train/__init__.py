"""Training: the state, one step, one loop.

    python -m rwkv_jax.train --config=configs/tiny.py --workdir=runs/tiny [--config.optim.lr=6e-4 ...]

A workdir holds `config.json` (model, tokenizer, corpus hash, versions, the whole config), `metrics.jsonl` (one
object a log step) and `checkpoints/`. The same command resumes it: bit for bit on a CPU, and on a GPU with
deterministic operations. TPUs are untested.
"""

from rwkv_jax.train.assemble import learning_rate
from rwkv_jax.train.loop import run
from rwkv_jax.train.step import TrainState, apply_gradient, make_init, make_step, stored
from rwkv_jax.train.workdir import claimed

__all__ = ["TrainState", "apply_gradient", "claimed", "learning_rate", "make_init", "make_step", "run", "stored"]
