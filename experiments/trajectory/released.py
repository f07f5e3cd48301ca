"""The released trainer's own model on a CPU, in float64: `RWKV-v4neo/src/model.py` of a clone of BlinkDL/RWKV-LM.

The file runs unchanged. Stubs replace what it imports: Lightning by two names, DeepSpeed's fused Adam by torch's, and
the CUDA operator by the same steps over time on tensors [B, C]. The loop around it is the trainer's: rates times each
group's `my_lr_scale`, gradients clipped at a norm of 1.
"""

import contextlib
import hashlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rwkv_jax.files import user_path

FILE = Path("RWKV-v4neo") / "src" / "model.py"
KNOWN = "524481d"  # commit of RWKV-LM, August 2026, at which this was tested
EMPTY = -1e38  # exponent of an empty sum, as in the kernel


def source(clone) -> Path:
    """Return the path of the released model in a clone."""
    path = user_path(clone) / FILE
    if not path.is_file():
        raise ValueError(f"--rwkv-lm={clone}: there is no {path}, expected a clone of BlinkDL/RWKV-LM")
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--rwkv-lm needs torch: pip install -r requirements-live.txt")
    return path


def digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def trajectory(path, tensors, tokens_NBT, lr):
    """Return (losses, gradient norms, final tensors) of the released model, one step per batch of tokens."""
    import torch

    V, D = tensors["emb.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    T = tokens_NBT.shape[2] - 1
    fields = types.SimpleNamespace(
        vocab_size=V, n_embd=D, n_layer=layers, ctx_len=T, dropout=0, weight_decay=0, layerwise_lr=1, my_pile_stage=0,
        lr_init=lr, betas=(0.9, 0.99), adam_eps=1e-8, my_pos_emb=0, pre_ffn=0, head_qk=0, grad_cp=0, my_qa_mask=0,
    )  # fmt: skip
    losses, norms = [], []
    try:
        with surroundings(T):
            spec = importlib.util.spec_from_file_location("released_rwkv4", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            model = module.RWKV(fields)
            model.trainer = types.SimpleNamespace(strategy=None)
            model.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
            adam = model.configure_optimizers()
            for group in adam.param_groups:
                group["lr"] = lr * group["my_lr_scale"]
            for tokens_BT in tqdm(tokens_NBT, desc=str(FILE), disable=None, leave=False):
                ids = torch.from_numpy(tokens_BT.astype(np.int64))
                adam.zero_grad()
                loss = model.training_step((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), 0)
                loss.backward()
                losses.append(loss.item())
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
                adam.step()
            final = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    except Exception as error:  # foreign code, of any commit
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} does not run as it did at commit {KNOWN} of RWKV-LM: {what}") from error
    return np.array(losses), np.array(norms), final


@contextlib.contextmanager
def surroundings(T):
    """Install the stubs and environment variables that the file needs, for the duration of the block."""
    import torch
    import torch.utils.cpp_extension as extension

    def module(name, **names):
        made = types.ModuleType(name)
        made.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        vars(made).update(names)
        return made

    def adam(groups, lr, betas, eps, **_):
        return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps)

    nothing = lambda *args, **kwargs: None
    stubs = [
        module("pytorch_lightning", LightningModule=torch.nn.Module, __version__="2"),
        module("pytorch_lightning.utilities", rank_zero_info=nothing, rank_zero_only=nothing),
        module("pytorch_lightning.strategies", DeepSpeedStrategy=type("DeepSpeedStrategy", (), {})),
        module("deepspeed"),
        module("deepspeed.ops"),
        module("deepspeed.ops.adam", DeepSpeedCPUAdam=adam, FusedAdam=adam),
    ]
    wanted = {"RWKV_JIT_ON": "0", "RWKV_T_MAX": str(T), "RWKV_FLOAT_MODE": "fp32", "RWKV_MY_TESTING": ""}
    modules, environ = ({k: where.get(k) for k in names} for where, names in (
        (sys.modules, [stub.__name__ for stub in stubs]), (os.environ, wanted)))  # fmt: skip
    dtype, load = torch.get_default_dtype(), extension.load
    try:
        sys.modules.update({stub.__name__: stub for stub in stubs})
        os.environ.update(wanted)
        extension.load = lambda **_: types.SimpleNamespace(forward=wkv_forward, backward=wkv_backward)
        torch.set_default_dtype(torch.float64)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for where, before in ((sys.modules, modules), (os.environ, environ)):
            for name, value in before.items():
                where.pop(name, None) if value is None else where.update({name: value})
        extension.load = load
        torch.set_default_dtype(dtype)


def wkv_forward(B, T, C, w_C, u_C, k_BTC, v_BTC, y_BTC):
    """Fill y. w is the log decay, below 0."""
    y_BTC.copy_(_wkv(w_C, u_C, k_BTC, v_BTC))


def wkv_backward(B, T, C, w_C, u_C, k_BTC, v_BTC, y_BTC, dy_BTC, dw_BC, du_BC, dk_BTC, dv_BTC):
    """Fill the gradients by row of the batch; dw is that of log(-w), as the kernel returns it."""
    import torch

    by_row = (w_C.expand(B, C), u_C.expand(B, C), k_BTC, v_BTC)
    inputs = [x.detach().requires_grad_() for x in by_row]
    with torch.enable_grad():
        gradients = torch.autograd.grad(_wkv(*inputs), inputs, dy_BTC)
    dw_BC.copy_(gradients[0] * w_C)
    for out, gradient in zip((du_BC, dk_BTC, dv_BTC), gradients[1:], strict=True):
        out.copy_(gradient)


def _wkv(w, u, k_BTC, v_BTC):
    """Return y [B, T, C] as the released kernel computes it for each channel (Eqs. 23-28), all channels at once."""
    import torch

    num = den = torch.zeros_like(k_BTC[:, 0])
    exponent, y = num + EMPTY, []
    for k, v in zip(k_BTC.unbind(1), v_BTC.unbind(1), strict=True):
        past, now, _ = _weights(exponent, u + k)
        y.append((past * num + now * v) / (past * den + now))
        past, now, exponent = _weights(w + exponent, k)
        num, den = past * num + now * v, past * den + now
    return torch.stack(y, dim=1)


def _weights(a, b):
    """Return exp(a) and exp(b) divided by the larger of them, and its exponent."""
    import torch

    top = torch.maximum(a, b)
    return torch.exp(a - top), torch.exp(b - top), top
