"""Digests of weights, so that a store knows its model. Files are read once and remembered by size and mtime."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import xxhash
from torch import nn

from memdb.paths import cache_dir, write_atomically
from memdb.schemas.errors import ModelNotFound

_CHUNK_BYTES = 8 << 20


def folder_digest(folder: Path) -> str:
    """Digest over names and contents of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelNotFound(
            f"{folder} holds no *.safetensors: memdb loads safetensors only; convert the weights with "
            "model.save_pretrained(folder) and name that folder"
        )
    rows = {file.name: _file_digest(file) for file in files}
    return hashlib.blake2b(json.dumps(rows, sort_keys=True).encode(), digest_size=16).hexdigest()


def module_digest(module: nn.Module) -> str:
    """Digest over the parameters and buffers of a model in memory, names and bits."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    stat = file.stat()
    memory = cache_dir() / "weights.json"
    key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    known = _load(memory)
    if key not in known:
        digest = xxhash.xxh3_128()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        known[key] = digest.hexdigest()
        write_atomically(memory, json.dumps(known, indent=1).encode())
    return known[key]


def _load(memory: Path) -> dict[str, str]:
    try:
        data = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in data.items()} if isinstance(data, dict) else {}
