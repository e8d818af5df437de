"""Recordings of the 7B shape without a 7B model: units that are packed already, for benchmarks of the store.

28 layers, 4 KV heads of 128, as in llava-onevision-qwen2-7b. The values are random, with the outlier channels that
unrotated keys have, so that every codec does its real work and nothing compresses that would not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from memdb.codecs import codec as codec_named
from memdb.codecs.pack import pack_unit
from memdb.models.window import LayerKV
from memdb.recipes import recipe
from memdb.schemas.fingerprint import ModelIdentity, ModelShape, encoding_fingerprint
from memdb.schemas.frames import SourceIdentity
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.units import BLOCK_DTYPE, BlockKind, Caption, PackedKV, Table, Unit

LAYERS, KV_HEADS, HEAD_SIZE = 28, 4, 128
UNIT_FRAMES = 16
SECOND_NS = 1_000_000_000
DTYPE = torch.bfloat16
CAPTION_SIZE = 384
INIT_IDS = (1, 2, 3)


def shape(tokens: int, layers: int = LAYERS) -> ModelShape:
    return ModelShape(layers, 7 * KV_HEADS, KV_HEADS, HEAD_SIZE, 3584, tokens, 32_768)


def spec(
    name: str, tokens: int, *, codec: str = "int4", sample_fps: float = 0.5, layers: int = LAYERS
) -> RecordingSpec:
    """A hybrid recording of frames of `tokens` tokens."""
    chosen = recipe("hybrid", codec=codec)
    print_ = f"{tokens:032x}"
    encoded = encoding_fingerprint(
        chosen, model=print_, init_ids=INIT_IDS, sample_fps=sample_fps, seed=0, dtype="bfloat16"
    )
    return RecordingSpec(
        name=name,
        source=SourceIdentity("file", 1, name),
        source_name=f"{name}.mp4",
        live=False,
        started_at_ns=None,
        sample_fps=sample_fps,
        seed=0,
        dtype="bfloat16",
        recipe=chosen,
        model=ModelIdentity(f"random:{tokens}", print_, shape(tokens, layers)),
        init_ids=INIT_IDS,
        encoding_fingerprint=encoded,
        caption_encoder="random",
    )


def packed(
    tokens: int, count: int, *, codec: str = "int4", layers: int = LAYERS, frames: int = UNIT_FRAMES
) -> list[PackedKV]:
    """The KV of `count` different units of `frames` frames, packed as an ingest packs them."""
    chosen = codec_named(codec)
    random = torch.Generator().manual_seed(tokens)
    outliers = torch.where(torch.rand(KV_HEADS, 1, HEAD_SIZE, generator=random) < 0.05, 20.0, 1.0)

    def block() -> LayerKV:
        k, v = (torch.randn(KV_HEADS, tokens, HEAD_SIZE, generator=random) for _ in range(2))
        return LayerKV((k * outliers).to(DTYPE), v.to(DTYPE))

    made = []
    for _ in range(count):
        rows = [[block() for _ in range(frames)] for _ in range(layers)]
        made.append(pack_unit(chosen, rows, {}, DTYPE))
    return made


def units(
    kv: list[PackedKV], first: int, count: int, *, sample_fps: float = 0.5, seed: int = 0
) -> Iterator[Unit]:
    """Units `first` to `first + count - 1` of a recording, over the given payloads in turn."""
    for number in range(first, first + count):
        own = kv[number % len(kv)]
        yield unit(number, own, sample_fps=sample_fps, random=np.random.default_rng((seed, number)))


def unit(number: int, kv: PackedKV, *, sample_fps: float, random: np.random.Generator) -> Unit:
    """One unit as `hybrid` makes it: blocks of a frame, their mean keys, a caption with its vector, a JPEG's bytes."""
    frames = int(kv.slices["block"].max()) + 1
    layers = int(kv.slices["layer"].max()) + 1
    blocks = block_table(number, frames, int(kv.slices["tokens"][0]), sample_fps)
    keys = random.standard_normal((layers, frames, KV_HEADS * HEAD_SIZE), np.float32).astype(np.float16)
    words = " ".join(f"word{value}" for value in random.integers(0, 4096, 20))
    vector: npt.NDArray[np.float32] = random.standard_normal(CAPTION_SIZE, np.float32)
    said = Caption(words, tuple(range(40)), vector)
    start_ns, end_ns = int(blocks["start_ns"][0]), int(blocks["end_ns"][-1])
    return Unit(number, start_ns, end_ns, 0, blocks, kv, keys, said, random.bytes(12_000))


def block_table(number: int, frames: int, tokens: int, sample_fps: float) -> Table:
    blocks = np.zeros(frames, BLOCK_DTYPE)
    frame_ns = round(SECOND_NS / sample_fps)
    index = number * frames + np.arange(frames)
    blocks["kind"], blocks["tokens"] = BlockKind.FRAME, tokens
    blocks["start_ns"], blocks["end_ns"] = index * frame_ns, (index + 1) * frame_ns
    blocks["position"] = index * tokens
    return blocks


def with_number(made: Unit, number: int, sample_fps: float = 0.5) -> Unit:
    """The same content as another unit of its recording."""
    blocks = block_table(number, len(made.blocks), int(made.blocks["tokens"][0]), sample_fps)
    start_ns, end_ns = int(blocks["start_ns"][0]), int(blocks["end_ns"][-1])
    return replace(made, number=number, start_ns=start_ns, end_ns=end_ns, blocks=blocks)
