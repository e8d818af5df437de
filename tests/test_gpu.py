"""The same code on a GPU: codecs bit for bit, the ladder, and a question end to end. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memdb import codecs
from memdb.client import connect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]

FRAMES = 24


@pytest.fixture
def exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default convolutions round to TF32, another way for another number of frames."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def frames() -> list[np.ndarray]:
    """Smooth pictures that differ from one another."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[0:112, 0:112] / 112
    made = []
    for _ in range(FRAMES):
        a, b, c = draw.uniform(0, 6, 3)
        waves = [np.sin(a * rows + b * columns + c + turn) for turn in (0.0, 2.0, 4.0)]
        made.append(((np.stack(waves, -1) + 1) * 127).astype(np.uint8))
    return made


@pytest.mark.parametrize("name", codecs.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_codec_gives_the_same_bytes_on_cpu_and_gpu(name: str, dtype: torch.dtype) -> None:
    codec = codecs.codec(name)
    draw = torch.Generator().manual_seed(1)
    k, v = (torch.randn(3, 2, 17, 64, generator=draw).mul(9).to(dtype) for _ in range(2))
    width = codec.scale_bytes(k, v)
    assert codec.scale_bytes(k.cuda(), v.cuda()) == width
    packed = codec.pack(k, v, width)
    assert torch.equal(codec.pack(k.cuda(), v.cuda(), width).cpu(), packed)
    here = codec.unpack(packed, dtype, width, 2, 17, 64, dtype)
    there = codec.unpack(packed.cuda(), dtype, width, 2, 17, 64, dtype)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("model", ["random:0", "random-qwen:0"])
@pytest.mark.parametrize("window", [1 << 20, 130])
def test_the_ladder_holds_on_a_gpu(tmp_path: Path, window: int, model: str, exact_fp32: None) -> None:
    settings = [f"encode.window_tokens={window}", "encode.chunk_frames=5", "rebuild.time_text_s=0"]
    with connect(tmp_path / "s", model=model, device="cuda", dtype="float32") as db:
        db.ingest(frames(), fps=1, recording="r", recipe="rekv", codec="raw", settings=settings, sample_fps=1)
    with connect(tmp_path / "s", device="cuda", dtype="float32", create=False) as db:
        report = db.compare_uncut(frames(), "r", "What is it?", fps=1)
    assert report.window_binds == (window == 130)
    assert report.relative < 1e-4


def test_a_question_says_the_same_on_cpu_and_gpu(tmp_path: Path, exact_fp32: None) -> None:
    with connect(tmp_path / "s", model="random:0", device="cpu") as db:
        db.ingest(frames(), fps=1, recording="r", recipe="rekv", codec="int4", sample_fps=1)
    said = []
    for device in ("cpu", "cuda"):
        with connect(tmp_path / "s", device=device, dtype="float32", create=False) as db:
            answer = db.ask("What colour was the star?", mode="kv", context_tokens_max=300)
            said.append((answer.token_ids[:8], [item.start_s for item in answer.evidence]))
    assert said[0] == said[1]
