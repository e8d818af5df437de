"""What a stub does to a store: a list of operations that follows from a seed.

Every operation can be run again after a death on the way and then brings about what it would have: so a
resumed stub begins with the one that was under way.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from tools.trust.units import CODECS, UNIT_NS, Stream

UNITS_IN_PROTOCOLS = 3
AGEING = 2  # of the policies: nothing but captions is to be left
OPEN_END = -1  # of a span: everything up to now
BASIC = ("append", "state", "gap", "epoch", "end", "close", "pages", "forget", "forget_all")


@dataclass(frozen=True)
class Op:
    kind: str
    stream: Stream | None = None  # the recording that it is about, None: the store
    first: int = 0  # append: the first unit; state, gap, epoch, end: the number of units by then
    count: int = (
        0  # append: how many units; compact: 1 beside open writers; policy: which; wound: 1 with the catalog
    )
    start_ns: int = 0  # forget
    end_ns: int = 0
    why: str = ""  # die: the sync at which the writer dies; backup, import, export: the name of the copy

    def __str__(self) -> str:
        name = f" {self.stream.name}" if self.stream else ""
        if self.kind in ("append", "die"):
            return f"append{name} {self.first} to {self.first + self.count - 1}"
        if self.kind == "forget":
            return f"forget{name} {self.start_ns} to {self.end_ns}"
        return self.kind + name


@dataclass
class _Recording:
    stream: Stream
    units: int = 0


class ScriptMaker:
    """Draws operations one after another, each of which makes sense where it stands."""

    def __init__(
        self, seed: int, *, names: Sequence[str] = ("lobby", "door"), codecs: Sequence[str] = CODECS
    ):
        self._seed, self._random = seed, random.Random(seed)
        self._copied = 0
        self._alive = {
            name: _Recording(Stream(seed, name, 0, codecs[at % len(codecs)])) for at, name in enumerate(names)
        }

    def append(self, name: str, count: int) -> Op:
        found = self._alive[name]
        op = Op("append", found.stream, found.units, count)
        found.units += count
        return op

    def begin(self, name: str) -> Op:
        """A recording without units."""
        return Op("begin", self._alive[name].stream)

    def anew(self, name: str) -> Op:
        """The same name for a recording that is encoded in another way."""
        stream = self._alive[name].stream
        self._alive[name] = _Recording(Stream(stream.seed, name, stream.life + 1, stream.codec))
        return self.append(name, 1)

    def dying(self, name: str, count: int, why: str) -> Op:
        """An append in which the writer dies before a sync; another writer brings it to its end."""
        return replace(self.append(name, count), kind="die", why=why)

    def about(self, kind: str, name: str) -> Op:
        return Op(kind, self._alive[name].stream, self._alive[name].units)

    def forget(self, name: str, start_ns: int, end_ns: int) -> Op:
        found = self._alive[name]
        return Op("forget", found.stream, found.units, 0, start_ns, end_ns)

    def wound_tail(self, name: str) -> Op:
        """The last unit and the catalog are damaged: nobody knows any more that there was such a unit."""
        found = self._alive[name]
        found.units -= 1
        return Op("wound", found.stream, found.units, 1)

    def forget_all(self, name: str) -> Op:
        found = self._alive[name]
        stream = found.stream
        self._alive[name] = _Recording(Stream(stream.seed, name, stream.life + 1, stream.codec))
        return Op("forget_all", stream, found.units)

    def units(self, name: str) -> int:
        return self._alive[name].units

    def span(self, name: str) -> tuple[int, int]:
        """A span that begins in the recording: often inside a unit, sometimes without an end."""
        end_ns = self._alive[name].units * UNIT_NS
        start_ns = self._random.randrange(end_ns)
        if self._random.random() < 0.1:
            return start_ns, OPEN_END
        return start_ns, start_ns + 1 + self._random.randrange(2 * UNIT_NS)

    def draw(self, kinds: Sequence[str]) -> Op:
        """One of the plain operations."""
        weights = {"append": 10, "close": 1, "gap": 1, "epoch": 1, "end": 1, "forget_all": 1}
        names = sorted(self._alive)
        while True:
            kind = self._random.choices(kinds, [weights.get(kind, 3) for kind in kinds])[0]
            name = self._random.choice(names)
            if kind == "append":
                return self.append(name, self._random.randint(1, 3))
            if not self.units(name):
                continue
            if kind == "forget":
                return self.forget(name, *self.span(name))
            if kind == "forget_all":
                if self.units(name) > 2:
                    return self.forget_all(name)
                continue
            return self.about(kind, name)

    def once(self, kind: str) -> list[Op]:
        """An operation that is dear, or is wanted in any case, with what must come before it."""
        name = self._random.choice([name for name in sorted(self._alive) if self.units(name)] or ["lobby"])
        before = [] if self.units(name) else [self.append(name, 2)]
        about = self.about(kind, name)
        self._copied += 1
        match kind:
            case "compact":
                return [
                    *before,
                    self.forget(name, *self.span(name)),
                    Op(kind, count=self._random.choice([0, 1])),
                ]
            case "ageing":
                return [*before, Op("policy", count=AGEING), Op("compact", why=kind)]
            case "policy":
                return [Op(kind, count=1)]
            case "backup":
                return [*before, Op(kind, why=f"copy-{self._copied}.memdb")]
            case "import":
                return [*before, replace(about, why=f"copy {self._copied}")]
            case "export":
                return [*before, replace(about, why=f"{name}-{self._copied}.export")]
            case "wound":
                if self._random.random() < 0.3:
                    return [*before, self.append(name, 1), self.wound_tail(name), Op("compact")]
                hurt = replace(about, first=self._random.randrange(self.units(name)))
                return [*before, hurt, self.append(name, 1), Op("compact")]
            case "forget":
                return [*before, self.forget(name, *self.span(name))]
            case "forget_all":
                return [*before, self.forget_all(name)]
        return [*before, Op(kind) if kind in ("captions", "repair", "reopen") else about]


# Operations that `script` takes in on demand; plain ones come by chance.
ONCE = frozenset(
    {"state", "pages", "captions", "forget", "forget_all", "compact", "ageing", "repair", "wound", "backup"}
    | {"import", "export", "policy", "close", "gap"}
)
MIGRATION = "migration"  # as a script: opening a store for writing is all there is to do


def script(seed: int, length: int, once: Collection[str] = ()) -> list[Op]:
    """About `length` plain operations, and each of `once` at some moment: see ONCE.

    The first two begin the recordings, the last two append to them.
    """
    if MIGRATION in once:
        return [Op("reopen")]
    maker, chance = ScriptMaker(seed), random.Random(f"{seed} once")
    ops = [maker.append("lobby", 3), maker.append("door", 2)]
    moments: dict[int, list[str]] = {}
    for kind in sorted(once):
        moments.setdefault(chance.randrange(2, length - 4), []).append(kind)
    for index in range(length - 4):
        ops.append(maker.draw(BASIC))
        for kind in moments.get(index, []):
            ops += maker.once(kind)
    return [*ops, maker.append("lobby", 2), maker.append("door", 1)]


def protocols(seed: int) -> list[Op]:
    """A script that goes through every protocol by which a store changes, with numbers of the seed's."""
    chance = random.Random(f"{seed} protocols")
    maker = ScriptMaker(seed)
    units = UNITS_IN_PROTOCOLS
    ops = [maker.begin("lobby"), maker.append("lobby", units), maker.about("state", "lobby")]
    ops += [maker.begin("door"), maker.about("close", "door"), maker.anew("door")]  # it held nothing
    for kind in ("gap", "epoch", "end"):
        ops.append(maker.about(kind, "lobby"))
    ops += [maker.append("door", units), maker.append("lobby", 1), maker.append("lobby", units)]
    ops += [maker.about("state", "lobby"), maker.about("state", "door"), maker.about("pages", "lobby")]
    ops += [
        maker.append("lobby", 1),
        maker.about("state", "lobby"),
        Op("captions"),
    ]  # the first state is removed
    ops += [maker.forget(name, *maker.span(name)) for name in chance.sample(["lobby", "door"], 2)]
    ops += [maker.dying("lobby", 1, "a unit's bytes, before it is committed"), maker.append("lobby", 1)]
    ops += [maker.about("close", "door"), maker.dying("door", 1, "the name of a new segment")]
    ops += [maker.about("pages", "door"), Op("compact", count=1), maker.append("lobby", 1), Op("compact")]
    ops += [maker.about("state", "door"), maker.forget_all("door"), maker.append("door", 2)]
    ops += [maker.about("state", "lobby"), maker.append("lobby", 1), maker.about("pages", "lobby")]
    ops += [replace(maker.about("wound", "lobby"), first=chance.randrange(maker.units("lobby")))]
    ops.append(Op("compact"))
    ops += [maker.append("lobby", 1), maker.forget("lobby", *maker.span("lobby")), Op("compact")]
    ops += [replace(maker.about("import", "lobby"), why="copy"), Op("policy", count=1), Op("repair")]
    ops += [maker.append("lobby", 2), maker.about("state", "lobby"), Op("policy", count=AGEING)]
    ops += [Op("compact"), maker.append("lobby", 2), maker.about("state", "lobby"), maker.wound_tail("lobby")]
    ops += [Op("compact"), maker.append("lobby", 2), maker.about("state", "lobby")]
    return [*ops, replace(maker.about("export", "lobby"), why="lobby.export"), Op("backup", why="copy.memdb")]
