"""WKV-4 as others write it, judged beside our forms."""

import jax
import jax.numpy as jnp

from experiments.speed import ops


def plain_scan(w_C, u_C, k_BTC, v_BTC):
    """Eqs. 23-28 as one scan over time; each step is in float32, and the state is then rounded to the dtype of k."""
    dtype = jnp.finfo(k_BTC.dtype)
    # stored in float32 arrays nevertheless: XLA's CPU compiler takes T^2 time for bfloat16 arrays in a loop
    stored = lambda x: jax.lax.reduce_precision(x, dtype.nexp, dtype.nmant)
    k, v = k_BTC.astype(jnp.float32), v_BTC.astype(jnp.float32)
    return ops.plain_scan(w_C, u_C, k, v, stored).astype(v_BTC.dtype)


def transformers_gradients(w_C, u_C, k_TC, v_TC, dy_TC):
    """Return y and the gradients of sum(dy * y), by name, of transformers' loop for CPUs."""
    import torch
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    tensor = lambda x: torch.from_numpy(x.copy())
    w, u, k, v = (tensor(x).requires_grad_() for x in (w_C, u_C, k_TC[None], v_TC[None]))
    y, _ = rwkv_linear_attention_cpu(torch.log(-w), u, k, v)
    loss = (y[0] * tensor(dy_TC)).sum()
    dw, du, dk, dv = torch.autograd.grad(
        loss, (w, u, k, v), materialize_grads=True
    )  # with one token, w has no gradient
    return {"y": y[0].detach().numpy(), "w": dw.numpy(), "u": du.numpy(), "k": dk[0].numpy(), "v": dv[0].numpy()}
