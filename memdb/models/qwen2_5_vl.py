"""Qwen2.5-VL behind the protocol, from a Hub id, a folder or a random model.

Where it differs from LLaVA-OneVision: a temporal patch takes two raw frames, a frame keeps its rows and columns in
the tokens' ids (M-RoPE, see places.Grid), and pictures need not be square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdb.models.chat_model import ChatModel, check_layers, text_shape, tokenizer_digest
from memdb.models.places import Grid, Placing
from memdb.models.protocol import Pixels
from memdb.models.saliency import PackedListener
from memdb.models.sheet import PLAIN, ModelSheet
from memdb.schemas.errors import UnsupportedModel
from memdb.schemas.fingerprint import ModelIdentity, digest_of
from memdb.schemas.frames import Image

VISION_BATCH = 8  # pairs of frames that pass the vision tower at once
# A frame's tokens, at most, whatever more the checkpoint would take of a picture: InfiniPot-V's figure (2506.15745).
FRAME_TOKENS_MAX = 128
_LANGUAGE_MODELS = ("qwen2_5_vl_text",)
_VIDEO_START, _VIDEO_END = "<|vision_start|>", "<|vision_end|>"


class Qwen25VL(ChatModel):
    """A transformers Qwen2_5_VLForConditionalGeneration, its tokenizer and its frame preprocessing.

    The published resize rule is applied to the first picture's size, and the grid that it gives holds for the whole
    recording, so that its blocks have one size: a picture of another shape that comes later is stretched to it.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        preprocessing: dict[str, Any],
        spec: str,
        weights: str,
        sheet: ModelSheet = PLAIN,
    ) -> None:
        """`preprocessing` is the checkpoint's own (mean, std, pixel limits); `weights` the digest of its weights."""
        text, vision = network.config.text_config, network.config.vision_config
        check_layers(text, _LANGUAGE_MODELS)
        super().__init__(network, tokenizer, sheet, sections_of(text))
        self._patch, self._merge = int(vision.patch_size), int(vision.spatial_merge_size)
        self._together = int(vision.temporal_patch_size)
        self._ids_per_s = Fraction(vision.tokens_per_second)
        self._cell = self._patch * self._merge  # pixels a side that make one token
        self._pixels_min, self._pixels_max = pixel_limits(preprocessing, self._cell)
        mean = preprocessing["image_mean"]
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing["image_std"], device=self.device).view(1, 3, 1, 1)
        fingerprint = digest_of(
            {
                "family": "qwen2_5_vl",
                "weights": weights,
                "tokenizer": tokenizer_digest(tokenizer),
                "preprocessing": {
                    "image_mean": mean,
                    "image_std": preprocessing["image_std"],
                    "pixels": [self._pixels_min, self._pixels_max],
                    "resize": "pillow-bicubic",
                },
                "ids_per_s": str(self._ids_per_s),
                "rope": {str(key): value for key, value in text.rope_parameters.items()},
            }
        )
        shape = text_shape(text, self._pixels_max // self._cell**2)
        self.identity = ModelIdentity(spec, fingerprint, shape)

    @property
    def frames_together(self) -> int:
        return self._together

    def frame_grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = smart_grid(
            height, width, cell=self._cell, pixels_min=self._pixels_min, pixels_max=self._pixels_max
        )
        most = self.shape.frame_tokens  # a strip of a picture would have more
        return min(rows, most), min(columns, max(1, most // min(rows, most)))

    def placing(self, sample_fps: float, grid: tuple[int, int] | None) -> Placing:
        """A grid whose step is the ids that pass from one pair of frames to the next."""
        assert grid is not None, "a recording of this family has a grid"
        step = self._ids_per_s * self._together / Fraction(sample_fps).limit_denominator(1_000_000)
        return Grid(*grid, step)

    def prepare(self, image: Image, grid: tuple[int, int] | None = None) -> Pixels:
        from PIL import Image as Pictures

        rows, columns = grid or self.frame_grid(*image.shape[:2])
        picture, size = Pictures.fromarray(image), (columns * self._cell, rows * self._cell)
        if picture.size != size:
            picture = picture.resize(size, Pictures.Resampling.BICUBIC)
        return np.asarray(picture)

    @torch.inference_mode()
    def visual_tokens(self, pixels: Sequence[Pixels]) -> Tensor:
        whole = [*pixels, *[pixels[-1]] * (-len(pixels) % self._together)]
        size = VISION_BATCH * self._together
        parts = [self._see(np.stack(whole[start : start + size])) for start in range(0, len(whole), size)]
        return torch.cat(parts)  # (F, N, E)

    @torch.inference_mode()
    def salient_tokens(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        whole = [*pixels, *[pixels[-1]] * (-len(pixels) % self._together)]
        size, looking = VISION_BATCH * self._together, self._network.model.visual.blocks[-1].attn
        tokens, saliency = [], []
        for start in range(0, len(whole), size):
            listener = PackedListener()
            with listener.on(looking):
                tokens.append(self._see(np.stack(whole[start : start + size])))
            F, N, patches = *tokens[-1].shape[:2], self._merge**2
            means = listener.column_means(looking, N * patches).view(F, N, patches).mean(-1)
            grid = whole[0].shape[0] // self._cell, whole[0].shape[1] // self._cell
            saliency.append(torch.empty_like(means))
            saliency[-1][:, self._window_order(*grid)] = means
        return torch.cat(tokens), torch.cat(saliency)  # (F, N, E), (F, N)

    def _window_order(self, rows: int, columns: int) -> Tensor:
        """(N,) the raster numbers of a frame's tokens in the order in which the tower keeps them, window by window."""
        side = self._network.config.vision_config.window_size // self._cell
        row, column = np.divmod(np.arange(rows * columns), columns)
        window = row // side * -(-columns // side) + column // side
        return torch.from_numpy(np.argsort(window, kind="stable")).to(self.device)

    def _see(self, pixels: Pixels) -> Tensor:
        """Raw frames (F * together, height, width, 3), uint8 -> (F, N, E). No pair sees another."""
        frames = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float()
        frames = ((frames / 255.0 - self._mean) / self._std).to(self.dtype)
        m, p, G = self._merge, self._patch, self._together
        rows, columns = frames.shape[2] // self._cell, frames.shape[3] // self._cell
        pairs = frames.view(-1, G, 3, rows, m, p, columns, m, p)
        # A patch is (colour, time, p, p), and the m x m patches of one token stand together.
        patches = pairs.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * G * p * p)
        grid = torch.tensor([[len(pairs), rows * m, columns * m]], device=self.device)
        tokens: Tensor = self._network.model.visual(patches, grid_thw=grid).pooler_output
        return tokens.view(len(pairs), rows * columns, -1)

    def frame_separator(self) -> Tensor:
        """None: the prompt closes the video."""
        return torch.empty(0, self.shape.embedding_size, dtype=self.dtype, device=self.device)

    def init_ids(self, prompt: str) -> list[int]:
        start = self.encode_text(f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n")
        return [*start, *self._special(_VIDEO_START)] or [min(self._stop_ids, default=0)]

    def prompt_ids(self, text: str) -> list[int]:
        rest = self.encode_text(f"{text}<|im_end|>\n<|im_start|>assistant\n")
        return [*self._special(_VIDEO_END), *rest]

    def _special(self, token: str) -> list[int]:
        """The id of a special token, none where the tokenizer does not know it."""
        found = self._tokenizer.get_vocab().get(token)
        return [] if found is None else [int(found)]


def sections_of(text: Any) -> tuple[int, ...]:
    """How many frequency pairs turn by time, by row and by column. Raises UnsupportedModel for anything else."""
    rope = text.rope_parameters
    sections = rope.get("mrope_section")
    pairs = (text.hidden_size // text.num_attention_heads) // 2
    plain = isinstance(sections, list | tuple) and all(
        isinstance(size, int) and size > 0 for size in sections
    )
    if not plain or len(sections) != 3 or sum(sections) != pairs:
        raise UnsupportedModel(
            f"this checkpoint's mrope_section is {sections!r}: memdb carries three sections, for time, row and "
            f"column, that share out the {pairs} frequency pairs of a head"
        )
    if rope.get("mrope_interleaved"):
        raise UnsupportedModel(
            "this checkpoint interleaves the sections of its rotary embedding (mrope_interleaved); memdb carries "
            "sections that follow one another, as Qwen2.5-VL has them"
        )
    return tuple(sections)


def pixel_limits(preprocessing: dict[str, Any], cell: int) -> tuple[int, int]:
    """Least and most pixels of a frame, by the checkpoint and by us. Raises UnsupportedModel for absurd ones."""
    most = FRAME_TOKENS_MAX * cell * cell
    found = {
        "min_pixels": preprocessing.get("min_pixels", cell * cell),
        "max_pixels": preprocessing.get("max_pixels", most),
    }
    for name, value in found.items():
        if not _is_size(value) or (name == "max_pixels" and value < cell * cell):
            raise UnsupportedModel(
                f"{name} in the model's preprocessing is {value!r}: give pixels, at least the "
                f"{cell * cell} of one token"
            )
    pixels_max = min(found["max_pixels"], most)
    return min(found["min_pixels"], pixels_max), pixels_max


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def smart_grid(height: int, width: int, *, cell: int, pixels_min: int, pixels_max: int) -> tuple[int, int]:
    """Rows and columns of `cell` pixels, nearest to the picture's own shape within the limits (Qwen2-VL's rule).

    1080 x 1920, cell 28, at most 128 * 28 * 28 pixels -> 8 x 15
    """
    rows, columns = max(1, round(height / cell)), max(1, round(width / cell))
    if rows * columns * cell * cell > pixels_max:
        shrink = math.sqrt(height * width / pixels_max)
        rows = max(1, math.floor(height / shrink / cell))
        columns = max(1, math.floor(width / shrink / cell))
    elif rows * columns * cell * cell < pixels_min:
        grow = math.sqrt(pixels_min / (height * width))
        rows, columns = math.ceil(height * grow / cell), math.ceil(width * grow / cell)
    return rows, columns
