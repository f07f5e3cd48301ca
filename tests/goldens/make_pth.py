"""A state dict of torch 2.13 with views, a parameter and three dtypes: `python tests/goldens/make_pth.py`."""

import io
from pathlib import Path

import torch

state = torch.nn.Linear(2, 3).state_dict()
state["weight"] = torch.tensor([[1.5, -2.0], [0.0, 3.25], [-0.5, 8.0]], dtype=torch.bfloat16)
state["bias"] = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float16))
base = torch.arange(12.0).reshape(3, 4)
state["rows"], state["transposed"], state["scalar"] = base[1:], base.T, torch.tensor(7)
buffer = io.BytesIO()  # a file's records would begin with its name
torch.save(state, buffer)
Path(__file__).with_name("torch.pth").write_bytes(buffer.getvalue())
