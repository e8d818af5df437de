"""The same code on a GPU: codecs bit for bit, the ladder, and a question end to end. Skipped without one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from memdb import codecs
from memdb.client import connect
from memdb.codecs import planes
from memdb.retain import attention
from memdb.retain.attention import attention_rows, importance
from memdb.retain.prototypes import prototypes

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


@pytest.fixture
def plain_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines with a GPU may have no zstandard: slices then stay as they are, of the same values."""
    if find_spec("zstandard") is None:
        monkeypatch.setattr(planes, "pack", lambda raw, element_bytes, **_: raw)


@pytest.fixture
def waiting() -> Iterator[Callable[[str], None]]:
    """What a wait for the GPU is from now on: error or default. Whatever happens, the default for tests to come."""

    def is_now(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode(mode)

    yield is_now
    torch.cuda.set_sync_debug_mode("default")


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
    widths = codec.scale_bytes(k, v)
    assert torch.equal(codec.scale_bytes(k.cuda(), v.cuda()).cpu(), widths)
    width = int(widths.max())
    packed = codec.pack(k, v, width)
    assert torch.equal(codec.pack(k.cuda(), v.cuda(), width).cpu(), packed)
    here = codec.unpack(packed, dtype, width, 2, 17, 64, dtype)
    there = codec.unpack(packed.cuda(), dtype, width, 2, 17, 64, dtype)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("model", ["random:0", "random-qwen:0"])
@pytest.mark.parametrize("window", [1 << 20, 130])
def test_the_ladder_holds_on_a_gpu(
    tmp_path: Path, window: int, model: str, exact_fp32: None, plain_slices: None
) -> None:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 70])
def test_a_probe_pays_the_same_whether_its_keys_are_widened_or_not(
    dtype: torch.dtype, rows: int, exact_fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(2)
    q, k = (torch.randn(H, T, 128, generator=draw).to(dtype).cuda() for H, T in ((28, rows), (4, 3000)))
    k = k.transpose(0, 1).contiguous().transpose(0, 1)  # as a cache has them, too
    mask = torch.ones(rows, 100, dtype=torch.bool, device="cuda").tril(40)
    wide = attention_rows(q.float(), k.float(), 128**-0.5, mask)
    found = attention_rows(q, k, 128**-0.5, mask)
    assert found.dtype == torch.float32
    assert float((found - wide).norm() / wide.norm()) < 1e-5
    paid = importance(q.float(), k.float(), 128**-0.5, mask)
    for held_bytes in (attention.SCORES_BYTES, 28 * 3000 * 4 * 40):  # all rows at once, and in two parts
        monkeypatch.setattr(attention, "SCORES_BYTES", held_bytes)
        own = importance(q, k, 128**-0.5, mask)
        assert float((own - paid).norm() / paid.norm()) < 1e-5
        assert abs(float(own.sum()) - 1) < 1e-4


@pytest.mark.parametrize("room", [1 << 29, 3_000_000, 1])
def test_layers_that_are_heard_together_pay_as_each_would_alone(
    room: int, exact_fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(4)
    listener, alone = attention.Listener(), []
    mask = torch.ones(5, 5, dtype=torch.bool, device="cuda").tril()
    for T in (900, 900, 900, 700, 900):
        q, k = (torch.randn(H, n, 128, generator=draw).bfloat16().cuda() for H, n in ((28, 5), (4, T)))
        alone.append(importance(q, k, 128**-0.5, mask))
        with monkeypatch.context() as patched:
            patched.setattr(attention, "SCORES_BYTES", room)
            listener.hear(q, k, 128**-0.5, mask)
    for one, other in zip(listener.heard(), alone, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prototypes_are_the_same_means_on_a_gpu(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(5)
    k, v = (torch.randn(3, 4, 48, 64, generator=draw).to(dtype) for _ in range(2))
    paid, frame, at = torch.rand(3, 48, generator=draw), torch.arange(48) // 16, torch.arange(48)
    here = prototypes(k, v, paid, frame, at, [0, 1, 2])
    there = prototypes(*(x.cuda() for x in (k, v, paid, frame, at)), [0, 1, 2])
    assert torch.equal(there.position.cpu(), here.position)
    for one, other in ((there.k, here.k), (there.v, here.v)):
        assert float((one.cpu().float() - other.float()).abs().max()) <= float(other.abs().max()) * 2**-8


def test_a_memory_is_taken_without_waiting_for_the_gpu(waiting: Callable[[str], None]) -> None:
    """Who asks afterwards what it holds waits; before that a wait is an error anywhere."""
    from memdb.ingest.frames import SeenFrame
    from memdb.ingest.layer_tokens import layers_together
    from memdb.ingest.memory import EncoderMemory
    from memdb.models.window import LayerKV
    from memdb.retain.tar_van import TarVan
    from memdb.retain.template import Template
    from memdb.retain.vision_sink import VisionSink

    none = [LayerKV(*torch.zeros(2, 4, 0, 128, dtype=torch.bfloat16, device="cuda"))] * 3
    for retainer in (TarVan(64), Template(64), VisionSink(64, short_frames=2)):
        memory = EncoderMemory(none, retainer)
        for unit in range(5):
            frames = [SeenFrame(n, n, n + 1, torch.zeros(16, 1), b"") for n in (2 * unit, 2 * unit + 1)]
            drawn = torch.randn(3, 2, 4, 32, 128, device="cuda").bfloat16()
            paid = [torch.rand(len(own.id) + 32, device="cuda") for own in memory.layers]
            at = torch.arange(32, device="cuda")
            waiting("error")
            made = None
            if isinstance(retainer, Template):
                own_paid = torch.stack([own[-32:] for own in paid])
                numbers = [frame.number for frame in frames]
                made = prototypes(
                    drawn[:, 0], drawn[:, 1], own_paid, 2 * unit + at // 16, unit * 32 + at, numbers
                )
            heard = paid if retainer.hears else []
            fresh = layers_together([LayerKV(*own) for own in drawn])
            memory.take(unit, frames, fresh, made, heard, unit * 32, (4, 4))
            waiting("default")
            assert memory._asked is not None  # an event that is waited for is no error in that mode
            room, each = 64 + 16 * retainer.short_frames, 34 if made else 32
            assert len(memory.keep_set().ids[0]) == min(room, (unit + 1) * each)
