"""A byte-level model of 4 x 128 on the embedded corpus, the smallest run that learns something.

python -m rwkv_jax.train --config=configs/tiny.py --workdir=runs/tiny
python -m rwkv_jax.train --config=configs/tiny.py:rwkv7 --workdir=runs/tiny-rwkv7
python -m rwkv_jax.train --config=configs/tiny.py:transformer --workdir=runs/tiny-transformer
python -m rwkv_jax.generate --model=runs/tiny --prompt="def main("

Cost: 600 steps of 4,096 bytes, 4 minutes on 2 CPU cores.
Expected: validation 1.64 bits a byte for RWKV-4, 1.84 for the transformer (seed 0, the source of Python 3.11.7).
"""

from rwkv_jax import models
from rwkv_jax.train import run_config


def get_config(arg="rwkv4"):
    config = run_config.default()
    config.model.name = arg or "rwkv4"
    config.steps = 600
    config.optim.update(models.kind_of(models.kinds.kind_of_model(config.model.name)).recipe)
    return config.lock()
