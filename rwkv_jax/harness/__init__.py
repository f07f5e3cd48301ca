"""Multiple-choice, perplexity and generation tasks of lm-evaluation-harness.

    pip install "rwkv_jax[harness]"
    python -m rwkv_jax.harness --model=runs/tiny --tasks=lambada_openai,piqa

`requests` does not need lm_eval. The adapter does, and is imported on first use.
"""

from rwkv_jax.harness.requests import Scored, score

__all__ = ["HarnessLM", "Scored", "score"]


def __getattr__(name):
    if name == "HarnessLM":
        from rwkv_jax.harness.adapter import HarnessLM

        return HarnessLM
    raise AttributeError(f"module 'rwkv_jax.harness' has no attribute {name!r}")
