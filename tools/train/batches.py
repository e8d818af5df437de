"""What one step of training learns from: a recording of its own, looked at once a second or two, and asked about.

Everything is drawn from (seed, step), on the CPU, in processes beside the GPU. A batch is one recording: its frames
stand in rows of ROW that are encoded as one stream each, its questions may be about any of them, so that searching
them is the task that the store has later.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from memdb.models.world_words import world_tokenizer
from memdb.world.captions import of_clip, told_of_clip
from memdb.world.pictures import parameters
from memdb.world.questions import KINDS, Asker, Question, clock
from memdb.world.scenes import Scene, plan, scene_at
from tools.train.facts import NOTED, noted, told

ROW = 64  # frames that are encoded as one stream
CLIP = 8  # frames of a clip, as the recipes of the embedded model have it
CAPTION_PROMPT = "Describe what is happening in this video."
INIT_PROMPT = "You are a helpful assistant."
UNKNOWN = "unknown"  # what captions do not tell
# How often a kind is asked where few frames are read, and where many are: to count, all of a span must be seen.
_NEAR = {
    "gist": 6,
    "detail": 16,
    "place": 4,
    "motion": 4,
    "count": 0,
    "order": 30,
    "when": 30,
    "now": 3,
    "absent": 15,
}
_FAR = {**_NEAR, "count": 24}
_IGNORED = -100
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sizes:
    """How much one step holds."""

    rows: int = 16  # streams of ROW frames
    near: int = 80  # questions over the KV of few frames
    far: int = 32  # questions over that of many: all that count, and others
    told: int = 72  # questions with captions as text, a third of them without KV
    clips: int = 72  # captions
    question: int = 32  # tokens of a question
    prompt: int = 50  # tokens of a question as a prompt, with its answer
    caption: int = 64  # tokens of the caption prompt with the caption
    text: int = 260  # tokens of captions before a question

    @property
    def frames(self) -> int:
        return self.rows * ROW

    @property
    def seen(self) -> int:
        """Questions over KV alone."""
        return self.near + self.far


class Batches(IterableDataset[dict[str, Tensor]]):
    """Endless batches of one split; worker w of n makes those of the steps w, w + n, ..."""

    def __init__(self, seed: str, split: str, sizes: Sizes, first: int = 0) -> None:
        self.seed, self.split, self.sizes, self.first = seed, split, sizes, first

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        step, stride = (self.first, 1) if worker is None else (self.first + worker.id, worker.num_workers)
        writer = Writer(self.split, self.sizes)
        while True:
            yield {
                name: torch.from_numpy(array) for name, array in writer.batch(f"{self.seed}/{step}").items()
            }
            step += stride


class Writer:
    """Makes batches: plans, questions and captions, as arrays."""

    def __init__(self, split: str, sizes: Sizes) -> None:
        self.split, self.sizes = split, sizes
        tokenizer = world_tokenizer()
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self._ids: dict[str, list[int]] = {}
        (self._then,) = self._encode(" then")

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            if len(self._ids) > 50_000:
                self._ids.clear()
            self._ids[text] = self._encode(text)
        return self._ids[text]

    def batch(self, name: str) -> dict[str, npt.NDArray[np.generic]]:
        choose = random.Random(f"batch/{self.split}/{name}")
        stride_s = choose.choice((1, 1, 1, 2))
        count = self.sizes.frames
        scenes = plan(name, count * stride_s, self.split)
        times = [at * stride_s for at in range(count)]
        shown = [scene_at(scenes, time_s) for time_s in times]
        late = choose.choice((0.0, 0.0, 0.25, 0.5, 0.75))
        offset_s = choose.randrange(0, 40_000) if choose.random() < 0.8 else 0
        asker = Asker(scenes, name, self.split)
        made: dict[str, npt.NDArray[np.generic]] = {
            "frames": parameters(shown, [time_s + late for time_s in times]),
            "times": np.asarray(times, np.int64) + offset_s,
            "told_facts": told(shown, times),
        }
        made |= self._captions(choose, shown)
        near, rest = self.sizes.near, self.sizes.far + self.sizes.told
        questions = [self._question(choose, asker, _NEAR) for _ in range(near)]
        questions += [self._question(choose, asker, _FAR) for _ in range(rest)]
        made |= self._questions(questions, stride_s, offset_s)
        made |= self._told(choose, questions[self.sizes.seen :], scenes, shown, times, offset_s)
        return made

    def _question(self, choose: random.Random, asker: Asker, shares: dict[str, int]) -> Question:
        while True:
            kind = choose.choices(KINDS, [shares[kind] for kind in KINDS])[0]
            found = asker.ask(kind, 20)
            if found is not None:
                return found

    def _captions(self, choose: random.Random, shown: Sequence[Scene]) -> dict[str, npt.NDArray[np.generic]]:
        """Clips of 1 to 16 frames within a row, most of CLIP frames in step with it, and what is said of them."""
        C = self.sizes.clips
        first, length = np.zeros(C, np.int64), np.zeros(C, np.int64)
        ids, labels = self._blank(C, self.sizes.caption)
        prompt = self.ids(f"\n{CAPTION_PROMPT}<|im_end|>\n<|im_start|>assistant\n")
        for at in range(C):
            n = choose.choice((CLIP, CLIP, CLIP, CLIP, CLIP, CLIP, 16, 16, 4, 3, 2, 1))
            within = choose.randrange(0, ROW - n + 1, CLIP if n % CLIP == 0 else 1)
            start = choose.randrange(self.sizes.rows) * ROW + within
            first[at], length[at] = start, n
            said = of_clip(shown[start : start + n])
            self._put(ids[at], labels[at], prompt, self.ids(f" {said}<|im_end|>"))
        return {"clip_first": first, "clip_length": length, "clip_ids": ids, "clip_labels": labels}

    def _questions(
        self, questions: Sequence[Question], stride_s: int, offset_s: int
    ) -> dict[str, npt.NDArray[np.generic]]:
        R, N = len(questions), self.sizes.frames
        query = np.zeros((R, self.sizes.question), np.int64)
        ids, labels = self._blank(R, self.sizes.prompt)
        evidence, allowed = np.zeros((R, N), np.bool_), np.ones((R, N), np.bool_)
        kind = np.asarray([KINDS.index(question.kind) for question in questions], np.int64)
        for row, question in enumerate(questions):
            moved, answer = later(question, offset_s)
            own = self.ids(moved)[: self.sizes.question]
            query[row, : len(own)] = own
            prompt = self.ids(f"\n{moved}<|im_end|>\n<|im_start|>assistant\n")
            self._put(ids[row], labels[row], prompt, self.ids(f" {answer}<|im_end|>"))
            for start_s, end_s in question.spans:
                evidence[row, -(-start_s // stride_s) : -(-end_s // stride_s)] = True
            if question.kind == "now":
                assert question.at_s is not None
                allowed[row, -(-question.at_s // stride_s) :] = False
                evidence[row] &= allowed[row]
            if question.kind == "count":
                start_s, end_s = (self._spans(question)[at] for at in (0, 1))
                allowed[row] = False
                allowed[row, -(-start_s // stride_s) : -(-end_s // stride_s)] = True
        return {
            "query": query,
            "ask_ids": ids,
            "ask_labels": labels,
            "evidence": evidence,
            "allowed": allowed,
            "kind": kind,
        }

    @staticmethod
    def _spans(question: Question) -> tuple[int, int]:
        """The span that a counting question names."""
        start, end = (word.strip(",?.") for word in question.text.split() if word[0].isdigit())
        h, m, s = (int(part) for part in start.split(":"))
        hh, mm, ss = (int(part) for part in end.split(":"))
        return 3600 * h + 60 * m + s, 3600 * hh + 60 * mm + ss

    def _told(
        self,
        choose: random.Random,
        questions: Sequence[Question],
        scenes: Sequence[Scene],
        shown: Sequence[Scene],
        times: Sequence[int],
        offset_s: int,
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Captions as text before a question: those of its evidence among others, in time order."""
        R = len(questions)
        text = np.zeros((R, self.sizes.text), np.int64)
        inside = np.zeros((R, self.sizes.text), np.bool_)  # captions of the evidence
        said = np.full(
            (R, self.sizes.text, len(NOTED)), _IGNORED, np.int64
        )  # what the ends of captions tell of
        alone = np.zeros(R, np.bool_)  # no KV beside the captions
        ids, labels = self._blank(R, self.sizes.prompt)
        stride_s = times[1] - times[0]
        clips = len(shown) // CLIP
        for row, question in enumerate(questions):
            alone[row] = row % 3 == 0
            moved, answer = later(question, offset_s)
            spans = question.spans if question.kind != "count" else (self._spans(question),)
            wanted = {
                clip
                for start_s, end_s in spans
                for clip in range(start_s // stride_s // CLIP, min(clips, -(-end_s // stride_s // CLIP)))
            }
            others = (
                list(wanted)
                if question.kind == "count"
                else self._like(choose, question, shown, wanted, clips)
            )
            parts: dict[int, tuple[list[int], Ids]] = {}
            room, used = self.sizes.text, 0
            for clip in [*sorted(wanted), *others]:
                frames = shown[clip * CLIP : (clip + 1) * CLIP]
                start_s = times[clip * CLIP] + offset_s
                end_s = start_s + CLIP * stride_s
                told = told_of_clip(frames)
                body = self.ids(f" {of_clip(frames)}")
                own = [*body, *self.ids(f" [{clock(start_s)} - {clock(end_s)}]\n")]
                facts = [noted(scene, moving=moving) for scene, moving in told]
                ends = [at for at, token in enumerate(body) if token == self._then]
                notes = np.full((len(own), len(NOTED)), _IGNORED, np.int64)
                notes[ends], notes[len(body) :] = np.asarray(facts[:-1]).reshape(-1, len(NOTED)), facts[-1]
                if clip in parts or used + len(own) > room:
                    continue
                parts[clip], used = (own, notes), used + len(own)
            at = self.sizes.text - used
            for clip in sorted(parts):
                own, notes = parts[clip]
                there = slice(at, at + len(own))
                text[row, there], inside[row, there], said[row, there] = own, clip in wanted, notes
                at += len(own)
            if alone[row]:
                answer = self._by_captions(question, answer, shown, stride_s, offset_s)
            prompt = self.ids(f"\n{moved}<|im_end|>\n<|im_start|>assistant\n")
            self._put(ids[row], labels[row], prompt, self.ids(f" {answer}<|im_end|>"))
        return {
            "told_text": text,
            "told_inside": inside,
            "told_noted": said,
            "told_alone": alone,
            "told_ids": ids,
            "told_labels": labels,
        }

    @staticmethod
    def _like(
        choose: random.Random, question: Question, shown: Sequence[Scene], wanted: set[int], clips: int
    ) -> list[int]:
        """Other clips to stand beside the true ones: of some drawn by lot, those that share most words with it."""
        words = set(question.text.rstrip("?.").split())
        picked = choose.sample(range(clips), min(clips, 40))
        score = {
            clip: sum(
                word in words for scene in {shown[clip * CLIP], shown[clip * CLIP + 4]} for word in scene.main
            )
            for clip in picked
            if clip not in wanted
        }
        ranked = sorted(score, key=lambda clip: -score[clip])
        if question.kind == "now":
            return [clip for clip in ranked if clip < min(wanted, default=clips)][: choose.randrange(14)]
        return ranked[: choose.randrange(14)]

    @staticmethod
    def _by_captions(
        question: Question, answer: str, shown: Sequence[Scene], stride_s: int, offset_s: int
    ) -> str:
        """What captions alone can tell: no detail, and of a time an end of a clip that lies in its span."""
        if question.kind == "detail":
            return UNKNOWN
        if question.kind != "when":
            return answer
        start_s, end_s = question.spans[0]
        first = start_s // stride_s // CLIP
        for clip in range(first, min(len(shown) // CLIP, -(-end_s // stride_s // CLIP))):
            frames = shown[clip * CLIP : (clip + 1) * CLIP]
            if frames[0].start_s == start_s:
                return clock(clip * CLIP * stride_s + offset_s)
            if frames[-1].start_s == start_s:
                return clock((clip + 1) * CLIP * stride_s + offset_s)
        return answer

    def _blank(self, rows: int, tokens: int) -> tuple[Ids, Ids]:
        return np.zeros((rows, tokens), np.int64), np.full((rows, tokens), _IGNORED, np.int64)

    @staticmethod
    def _put(ids: Ids, labels: Ids, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """[prompt | answer | padding]; the label of a token is the next one, where that belongs to the answer."""
        whole = [*prompt, *answer][: len(ids)]
        ids[: len(whole)] = whole
        labels[len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]


def later(question: Question, offset_s: int) -> tuple[str, str]:
    """A question and its answer with every time moved by `offset_s`: a recording may begin at any hour."""
    words = [_moved(word, offset_s) for word in question.text.split(" ")]
    answer = question.answer
    if question.about == "when" and question.spans:
        answer = _moved(answer, offset_s)
    return " ".join(words), answer


def _moved(word: str, offset_s: int) -> str:
    bare = word.rstrip(",?.")
    parts = bare.split(":")
    if len(parts) != 3:
        return word
    h, m, s = (int(part) for part in parts)
    return clock(3600 * h + 60 * m + s + offset_s) + word[len(bare) :]
