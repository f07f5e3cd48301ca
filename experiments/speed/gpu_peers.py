"""Fused kernels of other projects on a GPU, at the shapes and on the inputs of `ops`; installed ones are measured.

CUDA        the released kernel, `RWKV-v4neo/cuda/wkv_cuda_bf16.cu` of a clone of BlinkDL/RWKV-LM given by path,
            compiled for each length as its trainer compiles it
TRITON      `fused_recurrent_rwkv4` of the package flash-linear-attention
ATTENTION   `jax.nn.dot_product_attention` by cuDNN, causal, in as many heads of 64 as make the same width

Inputs go from JAX to torch without a copy. The timed functions take the foreign kernel as an argument, loaded in their
first call, so that everything but the kernel can be tested without a GPU.
"""

import importlib.util
from functools import cache, partial

import jax

from rwkv_jax.files import user_path

CUDA, TRITON, ATTENTION = "released CUDA kernel", "fla Triton kernel", "fused attention, cuDNN"
HEAD = 64


def missing(rwkv_lm) -> list[str]:
    """Return the reasons why peers are not measured, one line each."""
    lines = []
    if not _torch_with_cuda():
        return [f"{CUDA} and {TRITON}: no torch for CUDA is installed"]
    if rwkv_lm is None:
        lines.append(f"{CUDA}: no clone of RWKV-LM was given (--rwkv-lm=PATH)")
    if not _has_fla():
        lines.append(f"{TRITON}: the package flash-linear-attention is not installed")
    return lines


def sides(shape, rwkv_lm):
    """Return {"forward": run, "both": run} by peer, for peers that `missing` does not list; bfloat16."""
    found = {ATTENTION: attention_sides(shape, implementation="cudnn")}
    if _torch_with_cuda() and rwkv_lm is not None:
        found[CUDA] = cuda_sides(partial(released_kernel, rwkv_lm, shape[1]))
    if _torch_with_cuda() and _has_fla():
        found[TRITON] = triton_sides(triton_kernel)
    return found


def _torch_with_cuda():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _has_fla():
    return importlib.util.find_spec("fla") is not None


def sources(rwkv_lm) -> list[str]:
    """Return the files of the released kernel in a clone of RWKV-LM."""
    paths = [user_path(rwkv_lm) / "RWKV-v4neo" / "cuda" / name for name in ("wkv_op_bf16.cpp", "wkv_cuda_bf16.cu")]
    for path in paths:
        if not path.exists():
            raise ValueError(f"--rwkv-lm={rwkv_lm}: there is no {path}, expected a clone of BlinkDL/RWKV-LM")
    return [str(path) for path in paths]


@cache
def released_kernel(rwkv_lm, T):
    """Return the kernel's module with `forward` and `backward`.

    Registers and fast math are as in its trainer; T is compiled in.
    """
    from torch.utils.cpp_extension import load

    flags = ["-O3", "-Xptxas=-O3", "--use_fast_math", "--extra-device-vectorization", "--maxrregcount=60"]
    return load(name=f"wkv_bf16_{T}", sources=sources(rwkv_lm), extra_cuda_cflags=[*flags, f"-DTmax={T}"])


def triton_kernel():
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    return fused_recurrent_rwkv4


def cuda_sides(load):
    """Return the runs of `kernel = load()`.

    `kernel.forward(B, T, D, w, u, k, v, y)` fills y, and `kernel.backward(B, T, D, w, u, k, v, y, dy, dw, du, dk, dv)`
    the last four. w is float32 and negative, the rest bfloat16; dw and du are [B, D].
    """

    def forward(x):
        import torch

        w, u, k, v, _ = _tensors(x)
        u = u.to(k.dtype)
        y = torch.empty_like(k)
        load().forward(*k.shape, w, u, k, v, y)
        return w, u, k, v, y

    def both(x):
        import torch

        w, u, k, v, y = forward(x)
        dy = _tensors(x)[4]
        dw, du = (torch.empty(k.shape[0], k.shape[2], dtype=k.dtype, device=k.device) for _ in range(2))
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        load().backward(*k.shape, w, u, k, v, y, dy, dw, du, dk, dv)
        return y, (dw.sum(0), du.sum(0), dk, dv)

    return {"forward": lambda x: _finished(forward(x)[-1]), "both": lambda x: _finished(both(x))}


def triton_sides(load):
    """Return the runs of `wkv = load()`: `wkv(time_decay, u, k, v, state) -> (y, state)`.

    w = -exp(time_decay), and the state is [B, 3, 1, D]: numerator, denominator and their exponent.
    """

    def run(x, backward):
        import torch

        w, u, k, v, dy = _tensors(x)
        state = torch.zeros(k.shape[0], 3, 1, k.shape[2], dtype=k.dtype, device=k.device)
        state[:, 2] = -1e38
        inputs = [a.detach().requires_grad_(backward) for a in (torch.log(-w), u, k, v)]
        y, _ = load()(*inputs, state)
        if not backward:
            return _finished(y)
        return _finished((y, torch.autograd.grad(y, inputs, dy)))

    return {"forward": partial(run, backward=False), "both": partial(run, backward=True)}


def attention_sides(shape, implementation):
    """Return the runs of causal attention of queries dy to keys k and values v: inputs as random as the others'."""
    B, T, D, _ = shape
    heads = lambda x_BTD: x_BTD.reshape(B, T, D // HEAD, HEAD)
    attention = partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
    forward = jax.jit(lambda q, k, v: attention(heads(q), heads(k), heads(v)))

    @jax.jit
    def both(q, k, v):
        y, pull = jax.vjp(forward, q, k, v)
        return y, pull(heads(q))

    on = lambda f: lambda x: jax.block_until_ready(f(x[4], x[2], x[3]))
    return {"forward": on(forward), "both": on(both)}


def _tensors(x):
    import torch

    return [torch.from_dlpack(a) for a in x]


def _finished(result):
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result
