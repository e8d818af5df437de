"""Every kernel of tools/kernels.md through its command, against the functions and formulas themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb.retain.prototypes import prototypes
from memdb.retain.select_kv import exact_counts, top_blocks
from memdb.retain.select_kv_code import code_compress_counts, code_retrieve_counts
from memdb.retain.tar_van import TarVan
from memdb.retain.tar_van_code import code_choice
from memdb.schemas.errors import UsageError
from tests.retain_cases import Film
from tools import kernel_reduce
from tools.kernel_list import BOOLS, BYTES, FLOATS, INTS, KERNELS, Spec
from tools.run_kernel import main, page, value

ROOT = Path(__file__).parents[1]
Arrays = dict[str, Any]


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def soft(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention_rows() -> tuple[Arrays, Arrays]:
    q, k = drawn(4, 3, 8), drawn(2, 11, 8, seed=1)
    rows = soft(np.einsum("hrd,htd->hrt", q, k.repeat(2, 0)) / np.sqrt(8))
    return {"q": q, "k": k}, {"rows": rows, "importance": rows.mean((0, 1))}


def gqa_fold() -> tuple[Arrays, Arrays]:
    q = drawn(6, 5, 8)
    return {"q": q, "kv_heads": 2}, {"vector": q.mean(1).reshape(2, 3, 8).sum(1).ravel()}


def guidance_scores() -> tuple[Arrays, Arrays]:
    q, keys = drawn(6, 5, 8), drawn(9, 16, seed=1)
    mean = q.mean(1).ravel()
    repeated = keys.reshape(9, 2, 8).repeat(3, 1).reshape(9, -1)
    dot = repeated @ mean
    cos = dot / (np.linalg.norm(repeated, axis=1) * np.linalg.norm(mean))
    return {"q": q, "keys": keys}, {"dot": dot, "cos": cos}


def mmr() -> tuple[Arrays, Arrays]:
    """The second of two equal captions comes last; the budget ends before it."""
    vectors = np.array([[9, 1, 0], [9, 1.1, 0], [1, 0, 1]], np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    inputs = {"vectors": vectors, "query": np.array([1, 0, 0], np.float32), "tokens": np.array([5, 5, 5])}
    wanted = {"order": [0, 2, 1], "cosine": unit[[0, 2, 1], 0], "chosen": [0, 2]}
    return {**inputs, "budget_tokens": 11}, wanted


def pages() -> tuple[Arrays, Arrays]:
    q, k = drawn(4, 3, 8), drawn(2, 40, 8, seed=1)
    keys = np.stack([part.mean(1) for part in np.split(k, [16, 32], 1)])  # (3, H, D)
    scores = np.einsum("hd,phd->p", q.mean(1), keys.repeat(2, 1))
    chosen = np.sort(np.argsort(-scores)[:2])  # 40 % of three, rounded up
    return {"q": q, "k": k}, {"keys": keys, "scores": scores, "chosen": chosen}


def prototypes_() -> tuple[Arrays, Arrays]:
    inputs = {
        "k": drawn(2, 10, 8),
        "v": drawn(2, 10, 8, seed=1),
        "importance": np.random.default_rng(2).random(10).astype(np.float32),
        "frame": np.arange(10) // 4,
        "position": np.arange(10) + 50,
    }
    found = prototypes(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    weights = inputs["importance"][:4] / inputs["importance"][:4].sum()
    np.testing.assert_allclose(found.k[:, 0], weights @ inputs["k"][:, :4], rtol=1e-5)
    return inputs, {name: np.asarray(value) for name, value in vars(found).items()}


def kept_of(scores: np.ndarray, counts: list[int]) -> Arrays:
    kept = np.zeros(scores.shape, bool)
    for layer, places in enumerate(top_blocks(list(torch.from_numpy(scores)), counts)):
        kept[layer, places] = True
    return {"counts": counts, "kept": kept}


def select_kv_compress() -> tuple[Arrays, Arrays]:
    scores = drawn(28, 20)
    counts = code_compress_counts(list(torch.from_numpy(scores)), 0.5, 0.75, stable=True)
    return {"scores": scores, "keep": 0.5, "band": 0.75, "stable": True}, kept_of(scores, counts)


def select_kv_exact() -> tuple[Arrays, Arrays]:
    scores = drawn(5, 9)
    counts = exact_counts(list(torch.from_numpy(scores)), 17, z_scores=False)
    assert sum(counts) == 17
    return {"scores": scores, "total": 17, "z_scores": False}, kept_of(scores, counts)


def select_kv_retrieve() -> tuple[Arrays, Arrays]:
    """Layers of other lengths: the last columns of a shorter one are no blocks."""
    scores, blocks = drawn(4, 60), np.array([60, 50, 40, 60])
    rows = [torch.from_numpy(row[:n]) for row, n in zip(scores, blocks, strict=True)]
    counts = code_retrieve_counts(rows, 8, 0.5)
    padded = np.where(np.arange(60) < blocks[:, None], scores, -np.inf)
    return {"scores": scores, "blocks": blocks, "retrieve": 8, "stable": True}, kept_of(padded, counts)


def tar_van() -> tuple[Arrays, Arrays]:
    view = Film(frames=9, exact=False).view()
    inputs = {
        "k": view.k.numpy(),
        "v": view.v.numpy(),
        "frame": view.frame.numpy(),
        "patch": view.patch.numpy(),
        "rows": 3,
        "columns": 4,
        "budget_tokens": 48,
        "pooling": np.array([0.2, 0.4, 0.6]),
    }
    return inputs, {"kept": TarVan(48).choose(view)}


def tar_van_code() -> tuple[Arrays, Arrays]:
    k, v = drawn(2, 8 * 36, 8), drawn(2, 8 * 36, 8, seed=1)
    wanted = code_choice(
        torch.from_numpy(k), torch.from_numpy(v), 36, 6, pooling=True, rows=6, layer=1, layers=8
    )
    options = {"pooling": True, "rows": 6, "layer": 1, "layers": 8}
    return {"k": k, "v": v, "frame_tokens": 36, "frames_kept": 6, **options}, {"kept": wanted}


def template() -> tuple[Arrays, Arrays]:
    """A prototype that received least stays; of equals the newest frame."""
    inputs = {
        "importance": np.array([0.3, 0.1, 0.2, 0.0, 0.2], np.float32),
        "frame": np.array([0, 0, 1, 1, 2]),
        "prototype": np.array([0, 0, 0, 1, 0], bool),
        "budget_tokens": 3,
        "prototype_share": 0.34,
    }
    return inputs, {"kept": [0, 3, 4]}


def vision_sink() -> tuple[Arrays, Arrays]:
    received = np.array([9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 0.0], np.float32)
    inputs = {"importance": received, "position": np.arange(8), "budget_tokens": 4, "bucket_tokens": 2}
    return inputs, {"kept": [0, 1, 5, 6]}


def ctr() -> tuple[Arrays, Arrays]:
    inputs = {
        "frames": drawn(3, 20, 8),
        "saliency": drawn(3, 20, seed=1) ** 2,
        "before": drawn(20, 8, seed=2),
    }
    return {**inputs, "tokens": 6}, kernel_reduce.ctr(**inputs, tokens=6)


def dpc() -> tuple[Arrays, Arrays]:
    points = drawn(30, 8)
    return {"points": points, "clusters": 7}, kernel_reduce.dpc(points, 7)


def oqm_pack() -> tuple[Arrays, Arrays]:
    """Codes 0 to 15 of a channel that rises by its step, two a byte, the even token below."""
    x = np.arange(16, dtype=np.float32)[:, None].repeat(3, 1)
    packed = (np.arange(0, 16, 2) + 16 * np.arange(1, 16, 2))[:, None].repeat(3, 1)
    return {"x": x}, {"packed": packed, "scale": np.ones(3), "minimum": np.zeros(3)}


def oqm_unpack() -> tuple[Arrays, Arrays]:
    inputs, packed = oqm_pack()
    arrays = {name: np.asarray(value, np.float32) for name, value in packed.items()}
    return {**arrays, "packed": packed["packed"].astype(np.uint8), "tokens": 16}, inputs


def segment() -> tuple[Arrays, Arrays]:
    features = drawn(12, 4, 8)
    return {"features": features}, kernel_reduce.segment(features)


CASES = {
    "ctr": ctr,
    "dpc": dpc,
    "oqm_pack": oqm_pack,
    "oqm_unpack": oqm_unpack,
    "segment": segment,
    "attention_rows": attention_rows,
    "gqa_fold": gqa_fold,
    "guidance_scores": guidance_scores,
    "mmr": mmr,
    "pages": pages,
    "prototypes": prototypes_,
    "select_kv_compress": select_kv_compress,
    "select_kv_exact": select_kv_exact,
    "select_kv_retrieve": select_kv_retrieve,
    "tar_van": tar_van,
    "tar_van_code": tar_van_code,
    "template": template,
    "vision_sink": vision_sink,
}


def test_every_kernel_has_a_case() -> None:
    assert list(KERNELS) == sorted(CASES)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_kernel_runs_through_the_command(name: str, tmp_path: Path) -> None:
    inputs, wanted = CASES[name]()
    np.savez(tmp_path / "in.npz", **inputs)
    assert main([name, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as found:
        assert set(found) == set(wanted) == set(KERNELS[name].outputs)
        sizes = {
            letter: size
            for array, spec in KERNELS[name].inputs.items()
            for letter, size in zip(spec.letters, np.shape(inputs.get(array, 0)), strict=False)
        }
        for array, spec in KERNELS[name].outputs.items():
            kinds = {FLOATS: "f", INTS: "i", BOOLS: "b", BYTES: "u"}.get(spec.kind)
            assert found[array].dtype.kind == kinds if kinds else found[array].dtype == spec.kind
            assert found[array].ndim == len(spec.letters)
            for letter, size in zip(spec.letters, found[array].shape, strict=True):
                assert sizes.setdefault(letter, size) == size, (array, letter)
            np.testing.assert_allclose(found[array], np.asarray(wanted[array]), rtol=1e-5, atol=1e-6)


def test_the_command_stands_by_itself(tmp_path: Path) -> None:
    inputs, wanted = vision_sink()
    np.savez(tmp_path / "in.npz", **inputs)
    command = [sys.executable, "-m", "tools.run_kernel", "vision_sink", "in.npz", "out.npz"]
    command[4:] = [str(tmp_path / name) for name in command[4:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert np.load(tmp_path / "out.npz")["kept"].tolist() == wanted["kept"]


def test_the_page_is_what_the_command_lists() -> None:
    assert (ROOT / "tools" / "kernels.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"importance": None}, "'importance' is missing"),
        ({"importance": np.ones((2, 2))}, "has shape (2, 2): give (T)"),
        ({"position": np.arange(3)}, "T is 8"),
        ({"position": np.ones(8)}, "is of kind float64: give int64"),
        ({"budget": np.array(3)}, "unknown array 'budget'"),
        ({"budget_tokens": 3}, "no multiple"),
        ({"budget_tokens": np.array("many")}, "is of kind"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(
    change: Arrays, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {name: value for name, value in {**vision_sink()[0], **change}.items() if value is not None}
    np.savez(tmp_path / "in.npz", **arrays)
    assert main(["vision_sink", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


def test_files_and_names_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noise.npz").write_bytes(b"no arrays at all")
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "objects.npz", importance=np.array([{}], object))
    for source in ("noise.npz", "one.npy", "objects.npz", "missing.npz"):
        assert main(["vision_sink", str(tmp_path / source), str(tmp_path / "out.npz")]) == 2
        assert "cannot read" in capsys.readouterr().err
    assert main(["no_such", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]) == 2
    assert "choose one of attention_rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"frame_tokens": 0}, {"rows": 7}, {"frame_tokens": 35}, {"layers": 6, "layer": 5}, {"tar": np.nan}],
)
def test_numbers_that_do_not_go_together_are_refused_too(
    change: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", **{**tar_van_code()[0], **change})
    assert main(["tar_van_code", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ctr", {"tokens": 99}, "a frame of this model has"),
        ("ctr", {"tokens": -3}, "too small"),
        ("ctr", {"neighbours": 0}, "too small"),
        ("ctr", {"beta": 3.0}, "no share"),
        ("dpc", {"neighbours": 0}, "too small"),
        ("dpc", {"clusters": -1}, "too small"),
        ("oqm_pack", {"bits": 3}, "give 4 or 2"),
        ("oqm_unpack", {"bits": 3}, "give 4 or 2"),
        ("oqm_unpack", {"tokens": 999}, "bytes hold"),
        ("select_kv_retrieve", {"blocks": np.array([0, 50, 40, 60])}, "give 1 to 60"),
        ("select_kv_retrieve", {"blocks": np.array([60, 50, 40, 61])}, "give 1 to 60"),
        ("tar_van_code", {"frame_tokens": -36}, "at least 1"),
        ("tar_van_code", {"frames_kept": 0}, "at least 1"),
    ],
)
def test_numbers_that_mean_nothing_give_no_arrays(
    name: str, change: Arrays, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They gave arrays, of another size than was asked for or of no meaning, with exit code 0."""
    np.savez(tmp_path / "in.npz", **{**CASES[name]()[0], **change})
    assert main([name, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_of_equals_the_newest_frame_stays_and_in_it_the_lowest_patch(tmp_path: Path) -> None:
    arrays = {"importance": np.ones(6, np.float32), "position": np.arange(6), "budget_tokens": 2, "top": 1.0}
    for frame, kept in ((np.arange(6) // 3, [3, 4]), (None, [4, 5])):
        more = {} if frame is None else {"frame": frame}
        np.savez(tmp_path / "in.npz", **arrays, **more)
        assert main(["vision_sink", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]) == 0
        assert np.load(tmp_path / "out.npz")["kept"].tolist() == kept


def test_integers_stand_for_floats_and_half_precision_stays_itself(tmp_path: Path) -> None:
    """Values of a cache in fp16 are compared in fp16, as the released code does."""
    k, v = drawn(2, 56, 8).astype(np.float16), drawn(2, 56, 8, seed=1).astype(np.float16)
    np.savez(tmp_path / "in.npz", k=k, v=v, frame_tokens=7, frames_kept=5, tar=1)
    assert main(["tar_van_code", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]) == 0
    wanted = code_choice(torch.from_numpy(k), torch.from_numpy(v), 7, 5, tar=1.0, stable=False)
    assert np.load(tmp_path / "out.npz")["kept"].tolist() == wanted.tolist()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_sizes_in_front_may_be_any(lead: tuple[int, ...]) -> None:
    codes = np.zeros((*lead, 25, 8), np.uint8)
    sizes = {"D": 8}
    found = value("packed", Spec(BYTES, "... bytes D"), codes, sizes)
    assert found.dtype == torch.uint8
    assert found.shape == codes.shape
    assert sizes == {"D": 8, "bytes": 25}
    for wrong in (codes[..., :7], codes.astype(np.int64), codes[..., 0].reshape(-1)[:25]):
        with pytest.raises(UsageError, match="packed"):
            value("packed", Spec(BYTES, "... bytes D"), wrong, sizes)
