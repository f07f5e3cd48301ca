"""Weights and logits of RWKV-7 by flash-linear-attention 0.6.0 on a CPU: definitions replace its Triton kernels.

    python tests/goldens/make_fla.py                    writes fla/: random weights as it saves them, and logits.npz
    python tests/goldens/make_fla.py FOLDER NEW ...     reads FOLDER and its logits.npz, and writes both to NEW

logits.npz has tokens_BT, and logits_BTV of them. Names, shapes, transposes, epsilons and the order of all that happens
are the library's own. Needs requirements-live.txt.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

OUTPUT = Path(__file__).with_name("fla")


class Fake(mock.MagicMock):
    __path__, __spec__ = [], None


class Kernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports Triton's parts of the library as objects without content."""

    def find_spec(self, name, path, target=None):
        fake = name.startswith(("fla.ops", "fla.modules", "fla.utils"))
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if fake else None

    def create_module(self, spec):
        return Fake(name=spec.name)

    def exec_module(self, module):
        pass


def difference_to_previous(x, *_, **__):
    previous = torch.nn.functional.pad(x, (0, 0, 1, -1))
    return previous - x, x[:, -1]


def recurrence(r, w, k, v, kk, a, scale, **_):
    state, out = torch.zeros(len(r), *r.shape[2:], v.shape[-1]), []
    for r_t, w_t, k_t, v_t, kk_t, a_t in zip(*(x.unbind(1) for x in (r, w, k, v, kk, a)), strict=True):
        found = torch.einsum("bhk,bhkn->bhn", kk_t, state)
        written = torch.einsum("bhk,bhn->bhkn", k_t, v_t) - torch.einsum("bhk,bhn->bhkn", kk_t * a_t, found)
        state = w_t.exp()[..., None] * state + written
        out.append(scale * torch.einsum("bhk,bhkn->bhn", r_t, state))
    return torch.stack(out, 1), state


def gated(o, r, k, r_k, v, g):
    return (o + ((r * k * r_k).sum(-1, keepdim=True) * v).flatten(2)) * g


def fla():
    """(config, model), the library's classes."""
    sys.meta_path.insert(0, Kernels())
    from fla.layers import rwkv7 as layer
    from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM, modeling_rwkv7

    layer.token_shift = modeling_rwkv7.token_shift = difference_to_previous
    layer.fused_addcmul_rwkv7 = lambda x, to_previous, *mixes: [x + to_previous * mix for mix in mixes]
    layer.fused_k_rwkv7 = lambda k, a, k_a: k + k * (a - 1) * k_a
    layer.fused_mul_recurrent_rwkv7 = recurrence
    layer.gate_output_correction = gated
    layer.get_layer_cache = layer.update_layer_cache = lambda *_, **__: None
    modeling_rwkv7.ACT2FN = {"sqrelu": lambda x: x.relu().square()}
    return RWKV7Config, RWKV7ForCausalLM


def save(model, folder, tokens_BT):
    with torch.no_grad():
        logits_BTV = model.eval()(torch.tensor(tokens_BT).long(), use_cache=False).logits
    model.save_pretrained(folder)
    np.savez(Path(folder) / "logits.npz", tokens_BT=tokens_BT, logits_BTV=logits_BTV.numpy())


def main(*folders):
    config, model = fla()
    for read, written in zip(folders[::2], folders[1::2], strict=True):
        loaded, report = model.from_pretrained(read, dtype=torch.float32, output_loading_info=True)
        assert not any(report.values()), report
        save(loaded, written, np.load(Path(read) / "logits.npz")["tokens_BT"])
    if not folders:
        save_random(config, model)


def save_random(config, model):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    ranks = {"decay_low_rank_dim": 3, "a_low_rank_dim": 5, "v_low_rank_dim": 2, "gate_low_rank_dim": 6}
    made = model(config(**sizes, **ranks, fuse_norm=False, dtype="float32"))
    for x in made.parameters():
        x.data += 0.3 * torch.randn_like(x)
    made.generation_config = None  # otherwise written to a file of its own
    save(made, OUTPUT, np.random.default_rng(0).integers(0, 11, (2, 12), dtype=np.int32))


if __name__ == "__main__":
    main(*sys.argv[1:])
