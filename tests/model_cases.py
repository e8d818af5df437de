"""Tiny models, moving pictures, and plain loops over an untouched network to hold the pipeline against."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import memdb
from memdb import codecs, recipes
from memdb.client import Client
from memdb.codecs.pack import pack_unit
from memdb.index.mean_key import MeanKey
from memdb.models.caption_vectors import InputEmbeddings
from memdb.models.decode import prefill
from memdb.models.load import load_model
from memdb.models.protocol import VideoModel
from memdb.models.random_llava import random_llava
from memdb.models.random_weights import read_config
from memdb.models.window import LayerKV
from memdb.query import engine
from memdb.query.retrieve.topk import BlockTopK
from memdb.query.stored import Readings, StoredKV
from memdb.reader import SliceReader
from memdb.schemas.frames import Image
from memdb.schemas.recipe import Recipe
from memdb.schemas.units import BLOCK_DTYPE, BlockKind, Caption, Unit
from memdb.store import Store
from tests.store_cases import spec

TINY = "random:0"  # 4 layers, 4 query and 2 KV heads of 64, 16 tokens a frame
# 3 layers, 6 query and 2 KV heads of 20, 9 tokens a frame (5 x 5 patches), another base of the rotation
OTHER = {
    "vision_config": {"image_size": 70},
    "text_config": {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "initializer_range": 0.15,
        "rope_theta": 10_000.0,
    },
}
# Captions cost time and no KV depends on them: where they are not what is tested, they are short.
SHORT_CAPTIONS = ("caption.encoder=input-embeddings", "caption.tokens_max=3")
INIT_PROMPT = "You are a helpful assistant."
QUESTION = "What happens in this video?"

NS = 1_000_000_000  # a second

Pair = tuple[float, Image]
Seen = Callable[[int, int], tuple[Tensor, Tensor]]


def other_spec(folder: Path) -> str:
    """The other tiny model, its configuration in a file."""
    path = folder / "other.json"
    path.write_text(json.dumps(OTHER))
    return f"random:3:{path}"


def pictures(count: int, *, seed: int = 0) -> list[Image]:
    """Frames of 96 x 64 pixels that all differ: coloured noise in large squares, and a bright square that moves."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        coarse = random.integers(0, 256, (4, 6, 3), np.uint8)
        picture = np.ascontiguousarray(coarse.repeat(16, 0).repeat(16, 1))
        x = 7 * number % 72
        picture[20:44, x : x + 24] = (255, 40 * number % 256, 0)
        found.append(picture)
    return found


def timed(shown: Sequence[Image], *, step_s: float = 1.0) -> list[Pair]:
    """Frames with their times, as `ingest` takes them."""
    return [(number * step_s, picture) for number, picture in enumerate(shown)]


def ingest(
    store: Path,
    shown: Sequence[Image],
    *,
    model: str = TINY,
    recipe: str | Recipe = "rekv",
    codec: str | None = None,
    settings: Sequence[str] = (),
    recording: str = "film",
    dtype: str | None = None,
    **more: Any,
) -> None:
    """One frame a second into a store, closed again. The model is the one that tests share."""
    with memdb.connect(store, model=model, device="cpu", dtype=dtype) as db:
        db.loaded._model = wrapped(model, dtype or "float32")
        db.ingest(
            timed(shown),
            recording=recording,
            recipe=recipe,
            codec=codec,
            settings=settings,
            sample_fps=1.0,
            **more,
        )


@contextmanager
def reopened(store: Path, *, dtype: str | None = None) -> Iterator[Client]:
    """Another connection, which loads the model that the store remembers."""
    with memdb.connect(store, device="cpu", dtype=dtype, create=False) as db:
        yield db


@lru_cache(maxsize=8)
def wrapped(spec: str = TINY, dtype: str = "float32") -> VideoModel:
    """A model behind our protocol, shared by the tests of a process."""
    return load_model(spec, device="cpu", dtype=dtype)


def record_decisions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """From now on, the logits (V,) by which each answer's first token is decided."""
    decided: list[Tensor] = []

    def recorded(*args: Any) -> Tensor:
        decided.append(prefill(*args))
        return decided[-1]

    monkeypatch.setattr(engine, "prefill", recorded)
    return decided


def stored_kv(db: Client, recording: str = "film") -> list[LayerKV]:
    """All keys and values of a recording, a layer each (H, tokens, D), as a question reads them, in fp32."""
    row, readings, found = db.store.recording(recording), Readings(), []
    with SliceReader(db.store) as reader:
        kv = StoredKV(db.store, row, reader, backend="exact", sim="dot")
        rows = np.arange(len(kv.table))
        for layer in range(row.spec.model.shape.layers):
            whole, _ = kv.read(layer, rows, torch.device("cpu"), torch.float32, readings)
            assert whole is not None
            found.append(whole)
        kv.close()
    assert not readings.bad
    return found


def relative(found: Tensor, truth: Tensor) -> float:
    """The largest difference as a share of the largest true value."""
    assert found.shape == truth.shape
    return float((found.double() - truth.double()).abs().max() / truth.double().abs().max())


class PlainModel:
    """A random network as transformers makes it: its own rotation, its own attention, nothing of ours in it."""

    def __init__(self, spec: str) -> None:
        _, seed, *rest = spec.split(":", 2)
        self.network, self._tokenizer = random_llava(read_config(rest[0]) if rest else {}, seed=int(seed))
        self._exact: Any = None
        text = self.network.config.text_config
        self.layers = int(text.num_hidden_layers)
        self.heads = int(text.num_attention_heads)
        self.kv_heads = int(text.num_key_value_heads)
        self.head_size = int(self.network.model.language_model.layers[0].self_attn.head_dim)
        self.theta = float(text.rope_parameters["rope_theta"])

    @torch.inference_mode()
    def see(self, shown: Sequence[Image]) -> Tensor:
        """Visual tokens (F, N, E) by transformers' own path; resized as PIL resizes, scaled to -1..1."""
        from PIL import Image as Pictures

        side = int(self.network.config.vision_config.image_size)
        resized = [
            np.asarray(Pictures.fromarray(picture).resize((side, side), Pictures.Resampling.BICUBIC))
            for picture in shown
        ]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        whole = self.network.model.get_video_features(pixels[None]).pooler_output
        tokens = whole[0] if isinstance(whole, list | tuple) else whole.reshape(-1, whole.shape[-1])
        return tokens[:-1].reshape(len(shown), -1, tokens.shape[-1])  # the last is the newline

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        found: Tensor = self.network.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long))
        return found

    @torch.inference_mode()
    def newline(self) -> Tensor:
        return self.network.model.image_newline[None]

    @torch.inference_mode()
    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits (T, V) of every token: one ordinary causal forward with transformers' rotation and sdpa."""
        states = self.network.model.language_model(inputs_embeds=embeddings[None], use_cache=False)
        return self.network.lm_head(states.last_hidden_state[0])

    def say(self, embeddings: Tensor, tokens_max: int, stop: frozenset[int]) -> list[int]:
        """Greedy tokens, the whole sequence computed anew for each."""
        ids: list[int] = []
        while len(ids) < tokens_max:
            token = int(self.forward(torch.cat((embeddings, self.embed(ids))))[-1].argmax())
            if token in stop:
                break
            ids.append(token)
        return ids

    @property
    def exact(self) -> Any:
        """The same weights in fp64."""
        if self._exact is None:
            self._exact = copy.deepcopy(self.network).double()
        return self._exact

    @torch.inference_mode()
    def loop(
        self,
        embeddings: Tensor,
        seen: Seen,
        *,
        given: Sequence[tuple[Tensor, Tensor]] | None = None,
        heard: list[tuple[Tensor, Tensor, Tensor]] | None = None,
        reach: int = 0,
    ) -> Tensor:
        """Logits (T, V) in fp64, token by token from the formulas.

        `seen(layer, x)` names the tokens that token x attends to and how far away each of them stands: its query
        is turned by that distance, which may be negative, and meets the unturned key. `given`: per layer keys and
        values (H, G, D) that take the places 0..G - 1 whatever was computed there. `heard` gets (q, k, v) of every
        layer, unturned. `reach`: the largest distance, where it is more than the tokens are.
        """
        language, x = self.exact.model.language_model, embeddings.double()  # x (T, E)
        group, D = self.heads // self.kv_heads, self.head_size
        cos, sin = self.angles(torch.arange(max(len(x), reach) + 1))
        for number, layer in enumerate(language.layers):
            own = layer.self_attn
            normed = layer.input_layernorm(x)
            q, k, v = (
                part(normed).view(len(x), -1, D).transpose(0, 1)
                for part in (own.q_proj, own.k_proj, own.v_proj)
            )
            if given is not None:
                gk, gv = (part.double() for part in given[number])
                k = torch.cat((gk, k[:, gk.shape[1] :]), 1)
                v = torch.cat((gv, v[:, gv.shape[1] :]), 1)
            if heard is not None:
                heard.append((q, k, v))
            wide_k, wide_v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)  # (Hq, T, D)
            rows = []
            for place in range(len(x)):
                tokens, distance = seen(number, place)
                far, way = distance.abs(), distance.sign()[:, None]
                turned = turn(q[:, place : place + 1], cos[far], sin[far] * way)  # (Hq, n, D)
                scores = (turned * wide_k[:, tokens]).sum(-1) / math.sqrt(D)
                rows.append((scores.softmax(-1)[:, None] @ wide_v[:, tokens])[:, 0])
            out = torch.stack(rows).flatten(1)  # (T, Hq * D)
            x = x + own.o_proj(out)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.exact.lm_head(language.norm(x))

    def attention(self, q: Tensor, k: Tensor, x: int) -> Tensor:
        """(x + 1,): what token x pays to itself and those before it, mean over heads; q and k unturned (H, T, D)."""
        cos, sin = self.angles(x - torch.arange(x + 1))
        turned = turn(q[:, x : x + 1], cos, sin)
        wide_k = k.repeat_interleave(self.heads // self.kv_heads, 0)[:, : x + 1]
        return ((turned * wide_k).sum(-1) / math.sqrt(self.head_size)).softmax(-1).mean(0)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (n, D / 2) of p * theta^(-2 i / D) for positions p (n,)."""
        D = self.head_size
        steps = self.theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        angles = positions.double()[:, None] * steps
        return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (H, 1 or n, D) with the pairs (i, i + D / 2) of its channels turned by angles (n, D / 2), in fp64."""
    left, right = x.double().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


@lru_cache(maxsize=4)
def plain(spec: str = TINY) -> PlainModel:
    return PlainModel(spec)


def causal(layer: int, x: int) -> tuple[Tensor, Tensor]:
    """Everything before, at its true distance."""
    tokens = torch.arange(x + 1)
    return tokens, x - tokens


def windowed(init: int, window: int, *, wide_from: int | None = None) -> Seen:
    """Less than `window` back, and the first `init` tokens, at `window` - 1 at most; all from `wide_from` on."""

    def seen(layer: int, x: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(x + 1)
        if wide_from is not None and x >= wide_from:
            return tokens, x - tokens
        tokens = tokens[(x - tokens < window) | (tokens < init)]
        return tokens, (x - tokens).clamp(max=window - 1)

    return seen


def at_places(places: Sequence[npt.NDArray[np.int64]], first: int, before: Seen, hidden: int = -1) -> Seen:
    """Tokens from `first` on see by places: per layer one place a token (`hidden` where it is not there).

    Tokens before `first` see as `before` says: they were encoded earlier.
    """

    def seen(layer: int, x: int) -> tuple[Tensor, Tensor]:
        if x < first:
            return before(layer, x)
        own = torch.from_numpy(places[layer])
        tokens = torch.nonzero((own != hidden) & (own <= own[x]))[:, 0]
        return tokens, own[x] - own[tokens]

    return seen


@dataclass
class Planted:
    """A recording of random keys and values, per layer and frame (H, N, D), that are written as they stand."""

    keys: list[list[Tensor]]
    values: list[list[Tensor]]
    captions: list[str] = field(default_factory=list)  # of every frame, or none

    @classmethod
    def random(cls, frames: int) -> Planted:
        shape, random = wrapped().shape, torch.Generator().manual_seed(3)

        def some() -> list[list[Tensor]]:
            size = (shape.kv_heads, shape.frame_tokens, shape.head_size)
            return [[torch.randn(size, generator=random) for _ in range(frames)] for _ in range(shape.layers)]

        return cls(some(), some())

    @property
    def frames(self) -> int:
        return len(self.keys[0])

    def write(self, path: Path, *changes: str) -> None:
        model, codec = wrapped(), codecs.codec("raw")
        recipe = recipes.recipe("rekv", codec="raw", settings=("answer.tokens_max=1", *changes))
        vectors = InputEmbeddings(model)
        row = spec(
            "film",
            recipe=recipe,
            model=model.identity,
            init_ids=tuple(model.init_ids(INIT_PROMPT)),
            caption_encoder=vectors.name if self.captions else "",
        )
        with Store.open(path, create=True, write=True) as store, store.writer(row) as writer:
            for number in range(self.frames):
                layers: list[list[LayerKV | None]] = [
                    [LayerKV(k[number], v[number])] for k, v in zip(self.keys, self.values, strict=True)
                ]
                blocks = np.zeros(1, BLOCK_DTYPE)
                blocks["kind"], blocks["tokens"] = BlockKind.FRAME, model.shape.frame_tokens
                blocks["start_ns"], blocks["end_ns"] = number * NS, (number + 1) * NS
                kv = pack_unit(codec, layers, {}, torch.float32)
                keys, said = MeanKey().keys(layers), None
                if self.captions:
                    ids = tuple(model.encode_text(self.captions[number]))
                    said = Caption(self.captions[number], ids, vectors.of_caption("", ids))
                unit = Unit(number, number * NS, (number + 1) * NS, 0, blocks, kv, keys, said, None)
                writer.append([unit])

    def point(self, layer: int, frame: int, query: npt.NDArray[np.float32], strength: float) -> None:
        """Give every token of a frame a key whose dot product with the folded query is `strength`."""
        way = torch.from_numpy(query).view(wrapped().shape.kv_heads, 1, -1)
        k = self.keys[layer][frame]
        k -= way * (k * way).sum((0, 2), keepdim=True) / way.square().sum()  # orthogonal to it
        k += way * (strength / way.square().sum())


def asked(
    path: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "kv"
) -> tuple[list[list[int]], list[npt.NDArray[np.float32]]]:
    """Per layer the rows that a question took and the query vector that it took them by."""
    rows: list[list[int]] = []
    queries: list[npt.NDArray[np.float32]] = []
    select = BlockTopK.select

    def recorded(self: BlockTopK, search: Any, layer: int, query: Any, *rest: Any) -> Any:
        found = select(self, search, layer, query, *rest)
        rows.append(found.tolist())
        queries.append(query)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(BlockTopK, "select", recorded)
        with reopened(path) as db:
            answer = db.ask(QUESTION, mode=mode)
    assert not answer.warnings
    return rows, queries
