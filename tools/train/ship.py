"""Put the weights of a run where the package has them: `python -m tools.train.ship RUN [--to FOLDER]`.

The folder is a checkpoint as transformers writes it, with the tokenizer, the sheet `memdb.json` (settings that fit
the model, digests) and the joint head. The heads that only training uses go to tools/train, for a later run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from memdb.models.load import EMBEDDED
from memdb.models.sheet import ModelSheet, write_sheet
from memdb.models.world_words import world_tokenizer
from memdb.recipes import INIT_PROMPT

TEACHERS = Path(__file__).with_name("teachers.safetensors")
NOTE = (
    "the embedded model knows only its own synthetic world; for real footage choose a Video-LLM with --model, such "
    "as llava-hf/llava-onevision-qwen2-7b-ov-hf"
)
_SEEN = ("encode.window_tokens=512", "encode.chunk_frames=8")
_FOUND = ("retrieve.sim=cos", "retrieve.blocks=16")  # keys were taught by cosine; more frames confuse it
_TIMES = "rebuild.time_text_s=4"  # it was taught with times behind what they date
# It knows no positions as far apart as a stream has them, and without a time in its context it does not end an answer.
_NEAR = ("rebuild=restored", "rebuild.consecutive=true", "rebuild.time_text_s=60")
_SAID = "answer.tokens_max=16"
# Captions of its world are much alike: a weight of 0.5 has novelty pass over the true clip, see tools/RESULTS.md.
_LIKE = "retrieve.relevance=0.7"
SHEET = ModelSheet(
    name="memdb-world",
    note=NOTE,
    joint="joint.safetensors",
    recipes={
        "rekv": (*_SEEN, *_FOUND, _TIMES, _SAID),
        # A segment fits into the window, so that the guidance prompt sees all of it. The init prompt is the one that
        # the model was taught with.
        "streamkv": (
            *_SEEN,
            "unit.frames_max=24",
            f"encode.init_prompt={INIT_PROMPT}",
            "retrieve.blocks=16",
            _TIMES,
            _SAID,
        ),
        "infinipot-v": (*_NEAR, _SAID),
        # As many frames as the paper's 6K hold.
        "streammem": ("retain.budget_tokens=512", *_NEAR, _SAID),
        # As many frames as the paper's 12K hold.
        "livevlm": ("retain.budget_tokens=1024", *_NEAR, _SAID),
        "streamingtom": (*_SEEN, "retrieve.budget_tokens=256", _TIMES, _SAID),
        "rlivs": (
            "unit.frames=8",
            "encode.chunk_frames=8",
            "caption.tokens_max=48",
            "retrieve.caption_tokens=240",
            _LIKE,
            _TIMES,
            _SAID,
        ),
        "hybrid": (
            *_SEEN,
            *_FOUND,
            "unit.frames=8",
            "caption.tokens_max=48",
            "retrieve.caption_tokens=400",
            "retrieve.beside_tokens=240",  # with 400, mode both loses 5 points: the newest things and which came first
            _LIKE,
            _SAID,
        ),
    },
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=EMBEDDED)
    given = parser.parse_args()
    ship(given.run, given.to)
    return 0


def ship(run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for path in (*run.glob("*.json"), *run.glob("model*.safetensors"), run / SHEET.joint):
        if path.name != "log.json":
            shutil.copyfile(path, folder / path.name)
    world_tokenizer().save_pretrained(folder)
    write_sheet(folder, SHEET)
    if folder == EMBEDDED:
        shutil.copyfile(run / TEACHERS.name, TEACHERS)


if __name__ == "__main__":
    sys.exit(main())
