"""Holds a store to the account of what was acknowledged."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memdb.policy import Policy, read_policy
from memdb.repair import repair
from memdb.schemas.errors import CorruptionError, MemdbError, NotAStore
from memdb.store import Store, recording_digest
from memdb.transfer import import_recording
from tools.trust.look import Seen, files_of, is_derived, look, problems
from tools.trust.model import Kept, Model, running_hash
from tools.trust.questions import ask_all
from tools.trust.runner import POLICIES, Runner
from tools.trust.script import Op
from tools.trust.units import UNIT_NS, make_unit, marks

REPAIRING = ("repair", "wound")  # operations of which a repair is a part
OWN_FOLDERS = ("segments", "state", "keys")  # the name of a file in them begins with the id of its recording


@dataclass
class Findings:
    lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.lost or self.silent)

    def __str__(self) -> str:
        return "; ".join([*self.lost, *self.silent][:4])


def check(
    path: Path,
    models: Iterable[Model],
    *,
    may_be_new: bool = False,
    repairing: bool = False,
    derived_may_be_damaged: bool = False,
    excused: str = "",
) -> tuple[Findings, Model]:
    """Whether the store is as one of the models says, and which it is: that with the fewest differences.

    `may_be_new`: the store was still being made. `repairing`: its repair was under way, which may have to be
    begun again. `derived_may_be_damaged`: a power cut may leave key pages and
    caption tables torn, which is reported and mended; what is found must be right all the same. `excused`: see
    `remains`.
    """
    models = list(models)
    found = Findings()
    try:
        if repairing and must_be_repaired(path):
            repair(path)
        with Store.open(path) as store:
            seen = look(store)
            policy = _policy_of(path)
            # Of those that fit as well, the last: it is the one that allows for most.
            wrong = [[*differences(model, seen), *_beside(path, model, policy)] for model in models]
            best = min(reversed(range(len(models))), key=lambda index: len(wrong[index]))
            model = models[best]
            found.lost += wrong[best]
            for file, what in problems(store):
                if not (derived_may_be_damaged and is_derived(file)) and not model.hurt:
                    found.lost.append(f"verify: {file}: {what}")
            found.silent += ask_all(store, model)
    except NotAStore as error:
        if not may_be_new:
            found.lost.append(f"it is no store any more: {error}")
        return found, models[0]
    except Exception as error:  # a typed one is no better than any other where there is no damage
        found.lost.append(f"it cannot be read: {type(error).__name__}: {error}")
        return found, models[0]
    if model.bare:
        found.lost += remains(path, model, excused)
    for name, copy in model.copies.items():
        inside, _ = check(path.with_name(name), [copy], derived_may_be_damaged=derived_may_be_damaged)
        found.lost += [f"backup: {what}" for what in inside.lost]
        found.silent += [f"backup: {what}" for what in inside.silent]
    for name, kept in model.exports.items():
        found.lost += [f"export: {what}" for what in _read_export(path.with_name(name), kept)]
    return found, model


def _policy_of(path: Path) -> int | str:
    """The number of the policy that is in place."""
    try:
        policy = read_policy(path)
    except CorruptionError as error:
        return str(error)
    numbers = {Policy(): 0} | {known: number for number, known in POLICIES.items()}
    return numbers.get(policy, "another")


def _beside(path: Path, model: Model, policy: int | str) -> list[str]:
    """What is amiss with the policy and with backups."""
    found = [] if policy == model.policy else [f"its policy is {policy} instead of {model.policy}"]
    wanted = [*model.copies, *model.exports]
    return found + [f"its copy {name} is missing" for name in wanted if not path.with_name(name).exists()]


def _read_export(file: Path, kept: Kept) -> list[str]:
    """What is wrong with an exported recording, by taking it into a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Store.open(Path(folder) / "s.memdb", create=True, write=True) as store:
                name = import_recording(store, file).recording
                digest = recording_digest(store, name)
        except MemdbError as error:
            return [f"{type(error).__name__}: {error}"]
    return [] if digest == kept.digest else ["its digest is another"]


def must_be_repaired(path: Path) -> bool:
    """Whether the store says that it is to be repaired."""
    try:
        Store.open(path).close()
    except CorruptionError as error:
        return "memdb repair" in str(error)
    return False


def differences(model: Model, seen: dict[str, Seen]) -> list[str]:
    """What of the model is missing or different in a store, and what is there that must not be."""
    found = [f"{name}: is back" for name in seen if name not in model.kept]
    for name, kept in model.kept.items():
        if name in seen:
            found += [f"{name}: {what}" for what in _differences(kept, seen[name])]
        elif kept.units or kept.gaps or kept.epochs:
            found.append(f"{name}: is missing")
    return found


def _differences(kept: Kept, seen: Seen) -> list[str]:
    found = []
    if len(seen.units) != kept.units:
        found.append(f"{len(seen.units)} units instead of {kept.units}")
    hurt = False
    for number, digest in enumerate(seen.units[: kept.units]):
        if isinstance(digest, str) and number in kept.wounded:
            hurt = True
        elif isinstance(digest, str) or not kept.settle(number, digest):
            found.append(f"unit {number}: {_why_other(kept, number, digest)}")
    if not (found or hurt) and seen.digest != kept.digest:
        found.append(f"its digest is {seen.digest}")
    if seen.gaps != [units * UNIT_NS for units in kept.gaps]:
        found.append(f"gaps {seen.gaps} instead of {kept.gaps}")
    if seen.epochs != kept.epochs:
        found.append(f"epochs {seen.epochs} instead of {kept.epochs}")
    end_ns = kept.units * UNIT_NS if kept.end_units == kept.units else None
    if seen.end_ns != end_ns:
        found.append(f"end {seen.end_ns} instead of {end_ns}")
    newest = max(kept.states_left(), default=None)
    if seen.state != newest:
        found.append(f"the state of unit {seen.state} instead of {newest}")
    elif newest is not None and seen.state_hash != running_hash(kept.stream, newest):
        found.append(f"the state of unit {newest} holds something else")
    return found


def _why_other(kept: Kept, number: int, digest: bytes | str) -> str:
    if isinstance(digest, str):
        return digest
    for spans in range(len(kept.spans)):
        older = Kept(kept.stream, kept.units, kept.spans[:spans])
        if older.digest_of(number) == digest:
            return "what was forgotten of it is back"
    return "is another"


def remains(path: Path, model: Model, excused: str = "") -> list[str]:
    """Files that still hold the bytes of something that was forgotten, after a compaction.

    What a recording forgot, another one that was imported from it may remember: its files hold it rightly, and
    those that all recordings share. `excused`: what the compaction itself said that it left.
    """
    forgotten = _forgotten(model)
    if not forgotten:
        return []
    remembering = _remembering(path, model, forgotten)
    found = []
    for file in files_of(path):
        data = b"" if file.name in excused else file.read_bytes()
        name = file.relative_to(path)
        found += [
            f"{name} still holds the {what}"
            for mark, what in forgotten.items()
            if mark in data and not _may_hold(name, remembering.get(mark, []))
        ]
    return found


def _forgotten(model: Model) -> dict[bytes, str]:
    """What recordings forgot, in words, by its mark."""
    found: dict[bytes, str] = {}
    for kept in model.gone:
        for number in range(kept.units):
            for what, mark in marks(make_unit(kept.stream, number), kept.stream).items():
                found[mark] = f"{what} of unit {number} of {kept.stream.name}, forgotten as a whole"
    for kept in model.kept.values():
        for number in range(kept.units):
            if spans := kept.spans_of(number):
                before = marks(make_unit(kept.stream, number), kept.stream)
                left = marks(kept.remembered(number), kept.stream)
                for what in before.keys() - left.keys():
                    found[before[what]] = f"{what} of unit {number} of {kept.stream.name}, {spans}"
    return found


def _remembering(path: Path, model: Model, forgotten: Container[bytes]) -> dict[bytes, list[str]]:
    """The ids of the recordings that remember what another one forgot, by its mark."""
    with Store.open(path) as store:
        ids = {row.name: row.id for row in store.recordings()}
    found: dict[bytes, list[str]] = {}
    for name, kept in model.kept.items():
        for number in range(kept.units if name in ids else 0):
            for mark in marks(kept.remembered(number), kept.stream).values():
                if mark in forgotten:
                    found.setdefault(mark, []).append(ids[name])
    return found


def _may_hold(file: Path, remembering: Iterable[str]) -> bool:
    """Whether a file, relative to the store, is one of these recordings' or shared by all."""
    is_shared = file.parts[0] not in OWN_FOLDERS
    return any(is_shared or file.name.startswith(recording_id) for recording_id in remembering)


def finish(
    path: Path, model: Model, ops: Sequence[Op], start: int, *, derived_may_be_damaged: bool = False
) -> Findings:
    """Run the rest of a script, from the operation that was under way, and hold the end to the model."""
    for op in ops[start:]:
        model = model.after(op)
    try:
        with Runner(path) as runner:
            runner.run(ops, start)
    except Exception as error:
        return Findings([f"it does not go on: {type(error).__name__}: {error}"])
    return check(path, [model], derived_may_be_damaged=derived_may_be_damaged, excused=" ".join(runner.left))[
        0
    ]
