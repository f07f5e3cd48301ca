"""Fine-tuning of any model that `rwkv_jax.load` reads: `configs/finetune.py:full`, `:lora`, `:state`.

    python -m rwkv_jax.train --config=configs/finetune.py:lora --workdir=runs/lora \\
        --config.finetune.model=RWKV-4-Pile-169M.pth --config.corpus=PATH

Sizes and tokenizer are those of the weights. The parameters are float32 unless `--config.model.param_dtype=bfloat16`,
which halves their memory under "lora" and "state". Rules of `optim.groups` with factor 0 freeze parts:

    --config.optim.groups='((r"^emb/", 0.0), (r"blocks.0-5/", 0.0), (r"/time_decay$", 2.0), (r"/time_first$", 3.0))'

Learning rates: "full" uses RWKV-LM's advice for fine-tuning, 1e-5; the others are untuned starting points
(small models need more: experiments/finetune). "lora" and "state" compute no gradient and keep no moments of the
model's own parameters. Not run here on released weights.
"""

from ml_collections.config_dict import placeholder

from rwkv_jax.train import run_config

RATES = {"full": 1e-5, "lora": 1e-3, "state": 1e-2}


def get_config(arg="lora"):
    method = arg or "lora"
    if method not in RATES:
        raise ValueError(f"unknown method {method!r}, expected one of {', '.join(RATES)}")
    config = run_config.default()
    for name in ("vocab_size", "num_layers", "dim", "head_size"):
        config.model[name] = placeholder(int)
    config.model.embedding_norm, config.model.head_norm_epsilon = placeholder(bool), placeholder(float)
    config.tokenizer = placeholder(str)
    config.finetune.method = method
    config.optim.update(lr=RATES[method], schedule="cosine")
    config.update(seq_len=1024, batch_size=8, steps=1000)
    return config.lock()
