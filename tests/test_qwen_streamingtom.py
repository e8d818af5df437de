"""StreamingTOM where a token has three ids: over pairs of frames on a grid, by every profile, and resumed."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memdb import age
from memdb.clock import set_policy
from memdb.compact import compact
from memdb.ingest.reduce.ctr import CausalTemporal
from memdb.models.places import Grid
from memdb.policy import Age, Policy
from memdb.query.rebuild.stamps import Stamp, layer_places
from memdb.retain import THINNERS
from memdb.schemas.errors import Interrupted
from memdb.schemas.keep import token_ids
from memdb.store import Store
from tests.age_cases import DAY_NS
from tests.model_cases import INIT_PROMPT, NS, QUESTION, pictures, record_decisions, relative, reopened
from tests.qwen_cases import COLUMNS, ROWS, N, Seen, ids_by_hand, plain_qwen, qwen, remember
from tests.test_resume import stop_at

FRAMES, G, WINDOW, BATCH, STEP = 9, 3, 10, 4, 4  # frames are pairs; three groups and a third in the window
KEPT = WINDOW // G
CUT = (
    f"reduce.tokens={G}",
    f"encode.window_tokens={WINDOW}",
    f"encode.chunk_frames={BATCH}",
    "answer.tokens_max=1",
)
BOUND = 1e-4


def in_view(profile: str, frame: int) -> tuple[int, int]:
    until = frame if profile == "fixed" else frame // BATCH * BATCH
    return max(0, until - KEPT), until


def ids_of(profile: str, n: int, prompt: int, raster: Tensor) -> Tensor:
    """(3, T) of [init | frames | prompt]: where each stands, for the question and, in `code`, for other frames.

    raster (F, G): at which of its places a frame's tokens were.
    """
    rows = [[at] * 3 for at in range(n)]
    for frame in range(FRAMES):
        first, until = in_view(profile, frame)
        place = until - first + frame % BATCH if profile == "code" else frame
        t = n + math.floor(place * STEP)
        rows += [[t, n + place // COLUMNS, n + place % COLUMNS] for place in raster[frame].tolist()]
    behind = n + STEP * (FRAMES - 1) + 1
    return torch.tensor(rows + [[behind + at] * 3 for at in range(prompt)]).T


def seen_by(profile: str, ids: Tensor, n: int) -> Seen:
    """Init tokens directly before the oldest group in view, but in `code`; own frame or batch up to the token."""

    def seen(layer: int, token: int) -> tuple[Tensor, Tensor]:
        tokens, own = torch.arange(token + 1), ids[:, : token + 1].clone()
        if n <= token < n + FRAMES * G:
            first, _ = in_view(profile, (token - n) // G)
            if profile != "code":
                own[0, :n] += STEP * first
            tokens = tokens[(tokens < n) | (tokens >= n + first * G)]
        return tokens, (ids[:, token : token + 1] - own[:, tokens]).T

    return seen


@pytest.mark.parametrize("profile", ["fixed", "paper", "code"])
def test_groups_over_a_window_are_the_plain_loop(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, own, model = pictures(2 * FRAMES), plain_qwen(), qwen()
    decided = record_decisions(monkeypatch)
    remember(tmp_path / "s", shown, recipe="streamingtom", profile=profile, settings=CUT)
    with reopened(tmp_path / "s") as db:
        for mode in ("kv", "recent"):  # the newest blocks are all of them
            assert not db.ask(QUESTION, mode=mode).warnings
        assert [len(unit.blocks) for unit in db.store.units(db.store.recording("film").id)] == [1] * FRAMES
    tokens, saliency = model.salient_tokens([model.prepare(picture, (ROWS, COLUMNS)) for picture in shown])
    kind = "released" if profile == "code" else "textbook"
    frames, raster = CausalTemporal(tokens=G, dpc=kind).reduce(
        tokens, saliency, None, seed=0, numbers=range(0, 18, 2)
    )
    init, prompt = model.init_ids(INIT_PROMPT), model.prompt_ids(QUESTION)
    embeddings = torch.cat((own.embed(init), frames.flatten(0, 1), own.embed(prompt)))
    ids = ids_of(profile, len(init), len(prompt), raster)
    truth = own.loop(embeddings, seen_by(profile, ids, len(init)))[-1]
    assert relative(decided[0].double(), truth) < BOUND
    assert relative(decided[1].double(), truth) < BOUND
    for other in {"fixed", "paper", "code"} - {profile}:
        wrong = own.loop(
            embeddings, seen_by(other, ids_of(other, len(init), len(prompt), raster), len(init))
        )[-1]
        assert relative(wrong, truth) > 20 * BOUND
    even = torch.tensor([1, 3, 5]).expand(FRAMES, G)
    assert not torch.equal(raster, even)
    wrong = own.loop(embeddings, seen_by(profile, ids_of(profile, len(init), len(prompt), even), len(init)))[
        -1
    ]
    assert relative(wrong, truth) > 20 * BOUND, "where in the frame they stood matters"


@pytest.mark.parametrize("profile", ["fixed", "paper", "code"])
def test_t8_nothing_lost_is_full_attention(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, own, model = pictures(10), plain_qwen(), qwen()
    decided = record_decisions(monkeypatch)
    settings = ("reduce=identity", "encode.chunk_frames=2", "answer.tokens_max=1")
    remember(tmp_path / "s", shown, recipe="streamingtom", profile=profile, settings=settings)
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
    init, prompt = model.init_ids(INIT_PROMPT), model.prompt_ids(QUESTION)
    embeddings = torch.cat((own.embed(init), own.see(shown).flatten(0, 1), own.embed(prompt)))
    truth = own.forward(embeddings, ids_by_hand(len(init), 5, len(prompt), STEP))[-1]
    assert embeddings.shape[0] == len(init) + 5 * N + len(prompt)
    assert relative(decided[0], truth) < BOUND


def test_a_time_stamp_between_groups_does_not_move_them_in_their_frame() -> None:
    """Two groups, a stamp of two tokens behind the first: rows and columns by hand, of 2 x 3 places."""
    raster = np.array([0, 4, 5, 1, 2, 3])
    found = layer_places(
        7, np.array([3, 8]), np.array([3, 3]), [Stamp(3, "")], [2], Grid(2, 3, Fraction(4)), raster
    ).of_blocks(torch.device("cpu"))
    # The first frame begins at 7 and reaches to column 9; the stamp takes 10 and 11; the next frame begins at 12.
    assert found.ids.tolist() == [
        [7, 7, 7, 12, 12, 12],
        [7, 8, 8, 12, 12, 13],
        [7, 8, 9, 13, 14, 12],
    ]
    assert found.order.tolist() == [7, 8, 9, 12, 13, 14]


@pytest.mark.parametrize("profile", ["fixed", "code"])
def test_it_goes_on_from_what_is_stored(profile: str, tmp_path: Path) -> None:
    """Quantised, its window full, stopped after two batches: the content of an ingest without a break."""
    shown = pictures(2 * FRAMES)
    options = {"recipe": "streamingtom", "profile": profile, "settings": CUT, "codec": "oqm"}
    remember(tmp_path / "whole", shown, **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        remember(tmp_path / "s", shown, stop=stop_at(patch, 1), **options)
    remember(tmp_path / "s", shown, **options)
    digests = []
    for name in ("whole", "s"):
        with reopened(tmp_path / name) as db:
            digests.append(db.digest("film")["film"])
            assert db.verify().ok
    assert digests[0] == digests[1]


def test_a_group_that_ageing_thinned_can_still_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a frame's tokens stands where it stood."""
    monkeypatch.setattr(age, "LATE_NS", 0)
    remember(tmp_path / "s", pictures(2 * FRAMES), recipe="streamingtom", settings=CUT)
    with Store.open(tmp_path / "s", write=True) as store:
        row = store.recording("film")
        later_ns = row.created_ns + 20 * DAY_NS
        set_policy(store, Policy(ages=(Age(NS, "", "uniform", 700_000),)), now_ns=later_ns)
        units = store.units(row.id)
        before = [keep for unit in units if (keep := store.read_keep(unit)) is not None]
        compact(store, now_ns=later_ns)
        units = store.units(row.id)
        after = [keep for unit in units if (keep := store.read_keep(unit)) is not None]
    assert len(before) == len(after) == FRAMES
    for unit, old, new in zip(units, before, after, strict=True):
        assert new.ids[0].tolist() == token_ids(unit.number, 0, np.arange(2)).tolist()
        for stood, stands in zip(old.positions, new.positions, strict=True):
            assert stands.tolist() == stood[THINNERS["uniform"]().choose(G, 2)].tolist()
    with reopened(tmp_path / "s") as db:
        assert db.verify().ok
        assert not db.ask(QUESTION, mode="kv").warnings
