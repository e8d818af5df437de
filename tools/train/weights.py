"""Weights between runs: bf16 in shards, the joint head, and the heads that only training uses."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tools.train.network import Network

SHARD = "14MB"  # below 16 MiB
_PARTS = {"joint": ("joint_", "sharp"), "teachers": ("tell_",)}  # files, and whose names begin so


def save(network: Network, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).cpu() for name, tensor in network.hf.state_dict().items()
    }
    network.hf.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD)
    for part, names in _PARTS.items():
        own = {
            name: tensor.detach().to(torch.bfloat16).cpu().contiguous()
            for name, tensor in network.state_dict().items()
            if name.startswith(names)
        }
        save_file(own, folder / f"{part}.safetensors")


def load(network: Network, folder: Path) -> None:
    """Take over the weights that an earlier run saved in `folder`."""
    found = type(network.hf).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    network.hf.load_state_dict(found.state_dict())
    for part in _PARTS:
        path = folder / f"{part}.safetensors"
        if path.exists():
            own = {name: tensor.float() for name, tensor in load_file(path).items()}
            network.load_state_dict(own, strict=False)
