"""A tiny Qwen2.5-VL as transformers makes it, its own ids, and plain loops over them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import memdb
from memdb.models.qwen2_5_vl import Qwen25VL
from memdb.models.random_qwen import random_qwen
from memdb.models.random_weights import read_config
from memdb.schemas.frames import Image
from tests.model_cases import timed, wrapped

# A small base, so that rows and columns, which turn the slower pairs, turn them enough to be seen.
QWEN = f"random-qwen:0:{Path(__file__).parent / 'data' / 'qwen.json'}"
ROWS, COLUMNS, N = 2, 3, 6  # of pictures of 96 x 64 pixels
VIDEO_TOKEN = 4  # <video> of the small tokenizer

# Per layer and token: the tokens that it attends to, and how far away they are on the three axes (n, 3).
Seen = Callable[[int, int], tuple[Tensor, Tensor]]


def qwen(spec: str = QWEN) -> Qwen25VL:
    return cast(Qwen25VL, wrapped(spec))


def remember(
    store: Path,
    shown: Sequence[Image],
    *,
    fps: float = 1.0,
    recipe: str = "rekv",
    settings: Sequence[str] = (),
    **more: Any,
) -> None:
    """Frames at `fps` into a store, closed again, by the model that tests share."""
    with memdb.connect(store, model=QWEN, device="cpu") as db:
        db.loaded._model = qwen()
        db.ingest(
            timed(shown, step_s=1 / fps),
            recording="film",
            recipe=recipe,
            settings=settings,
            sample_fps=fps,
            **{"codec": "raw", **more},
        )


class PlainQwen:
    """The random network with its own rotation and attention; nothing of ours in it."""

    def __init__(self, spec: str = QWEN) -> None:
        _, seed, *rest = spec.split(":", 2)
        self.network, self.tokenizer, self._preprocessing = random_qwen(
            read_config(rest[0]) if rest else {}, seed=int(seed)
        )
        text = self.network.config.text_config
        self.heads, self.kv_heads = int(text.num_attention_heads), int(text.num_key_value_heads)
        self.head_size = int(text.hidden_size) // self.heads
        self.theta = float(text.rope_parameters["rope_theta"])
        sections = text.rope_parameters["mrope_section"]
        self.axis = [axis for axis, size in enumerate(sections) for _ in range(size)]  # of each pair
        self.exact = copy.deepcopy(self.network).double()

    # What transformers is given, written out patch by patch

    def patches(self, shown: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Pixels (patches, 3 * 2 * 14 * 14) and grid (1, 3) of prepared frames; the last is repeated if it is odd."""
        frames = [qwen().prepare(picture, (ROWS, COLUMNS)) for picture in shown]
        frames += [frames[-1]] * (len(frames) % 2)
        mean, std = (np.array(self._preprocessing[name]) for name in ("image_mean", "image_std"))
        scaled = [((frame / 255.0 - mean) / std).astype(np.float32) for frame in frames]
        rows = []
        for first, second in zip(scaled[::2], scaled[1::2], strict=True):
            for row in range(ROWS):
                for column in range(COLUMNS):
                    for y in (28 * row, 28 * row + 14):
                        for x in (28 * column, 28 * column + 14):
                            both = np.stack([frame[y : y + 14, x : x + 14] for frame in (first, second)])
                            rows.append(both.transpose(3, 0, 1, 2).ravel())  # colour, time, y, x
        grid = torch.tensor([[len(frames) // 2, 2 * ROWS, 2 * COLUMNS]])
        return torch.from_numpy(np.stack(rows)), grid

    @torch.inference_mode()
    def see(self, shown: Sequence[Image]) -> Tensor:
        """Visual tokens (F, N, E) by transformers' own path."""
        pixels, grid = self.patches(shown)
        found = self.network.model.get_video_features(pixels, grid).pooler_output
        whole = found[0] if isinstance(found, list | tuple) else found
        return whole.view(-1, N, whole.shape[-1])

    def given(
        self, init: Sequence[int], frames: int, prompt: Sequence[int], grid: Tensor, fps: float
    ) -> dict[str, Any]:
        """What transformers' forward and `get_rope_index` are told of [init | video | prompt]."""
        ids = [*init, *[VIDEO_TOKEN] * (frames * N), *prompt]
        kinds = [0] * len(init) + [2] * (frames * N) + [0] * len(prompt)
        return {
            "input_ids": torch.tensor([ids]),
            "mm_token_type_ids": torch.tensor([kinds], dtype=torch.int),
            "video_grid_thw": grid,
            "second_per_grid_ts": torch.tensor([2 / fps]),
        }

    @property
    def truncates_seconds(self) -> bool:
        """Whether this transformers takes half a second between frames for none (5.17 does, 5.23 does not)."""
        grid = torch.tensor([[2, 2 * ROWS, 2 * COLUMNS]])
        ids, _ = self.network.model.get_rope_index(**self.given([], 2, [], grid, 4.0))
        return bool(ids[0, 0, 0] == ids[0, 0, N])

    @torch.inference_mode()
    def whole(self, shown: Sequence[Image], init: Sequence[int], prompt: Sequence[int], fps: float) -> Tensor:
        """Logits (T, V) of one untouched forward from pixels and ids, places and all by transformers."""
        pixels, grid = self.patches(shown)
        given = self.given(init, int(grid[0, 0]), prompt, grid, fps)
        self.network.model.rope_deltas = None  # or another stream's would be used
        found: Tensor = self.network(pixel_values_videos=pixels, use_cache=False, **given).logits[0]
        return found

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        found: Tensor = self.network.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long))
        return found

    @torch.inference_mode()
    def forward(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """Logits (T, V): one causal forward of transformers at given ids (3, T)."""
        states = self.network.model.language_model(
            inputs_embeds=embeddings[None], position_ids=ids[:, None], use_cache=False
        )
        return self.network.lm_head(states.last_hidden_state[0])

    @torch.inference_mode()
    def loop(
        self, embeddings: Tensor, seen: Seen, *, heard: list[tuple[Tensor, Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Logits (T, V) in fp64, token by token; a query is turned by the distance and meets the unturned key."""
        language, x = self.exact.model.language_model, embeddings.double()  # x (T, E)
        group, D = self.heads // self.kv_heads, self.head_size
        for number, layer in enumerate(language.layers):
            own = layer.self_attn
            normed = layer.input_layernorm(x)
            q, k, v = (
                part(normed).view(len(x), -1, D).transpose(0, 1)
                for part in (own.q_proj, own.k_proj, own.v_proj)
            )
            if heard is not None:
                heard.append((q, k, v))
            wide_k, wide_v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)  # (Hq, T, D)
            rows = []
            for token in range(len(x)):
                tokens, distance = seen(number, token)
                turned = self.turned(q[:, token : token + 1], distance)  # (Hq, n, D)
                scores = (turned * wide_k[:, tokens]).sum(-1) / math.sqrt(D)
                rows.append((scores.softmax(-1)[:, None] @ wide_v[:, tokens])[:, 0])
            x = x + own.o_proj(torch.stack(rows).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.exact.lm_head(language.norm(x))

    def turned(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (H, 1 or n, D) turned by ids (n, 3), in fp64: pair i by its own axis' id times theta^(-2 i / D)."""
        pairs = self.head_size // 2
        steps = [self.theta ** (-2 * i / self.head_size) for i in range(pairs)]
        angles = torch.stack(
            [ids[:, self.axis[i]].double() * steps[i] for i in range(pairs)], -1
        )  # (n, D / 2)
        left, right = x.double().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


@lru_cache(maxsize=2)
def plain_qwen(spec: str = QWEN) -> PlainQwen:
    return PlainQwen(spec)


def ids_by_hand(init: int, frames: int, prompt: int, step: float) -> Tensor:
    """(3, T) of [init | frames | prompt]: text on one id, frames by time, row and column, text one past the largest."""
    rows = [[at] * 3 for at in range(init)]
    for frame in range(frames):
        t = init + math.floor(frame * step)
        rows += [[t, init + row, init + column] for row in range(ROWS) for column in range(COLUMNS)]
    first = max(max(row) for row in rows) + 1
    rows += [[first + at] * 3 for at in range(prompt)]
    return torch.tensor(rows).T


def causal_at(ids: Tensor) -> Seen:
    """Everything before, at its distance on each axis."""

    def seen(layer: int, token: int) -> tuple[Tensor, Tensor]:
        return torch.arange(token + 1), (ids[:, token : token + 1] - ids[:, : token + 1]).T

    return seen


def windowed_at(ids: Tensor, init: int, window: int, ceiling: int, *, wide_from: int | None = None) -> Seen:
    """Less than `window` tokens back at the true distance; init tokens beyond that as if they stood at 0 and the
    query at its ids, none above the ceiling. All at the true distance from `wide_from` on."""

    def seen(layer: int, token: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(token + 1)
        distance = (ids[:, token : token + 1] - ids[:, : token + 1]).T  # (token + 1, 3)
        if token < init or (wide_from is not None and token >= wide_from):
            return tokens, distance
        near = token - tokens < window
        far = ids[:, token].clamp(max=ceiling).expand(token + 1, 3)
        kept = near | (tokens < init)
        return tokens[kept], torch.where(near[:, None], distance, far)[kept]

    return seen
