"""What a store keeps, for how long and in how many bytes: one declarative table.

    store_bytes_max = "500 GB"      # everything in the store's directory
    when_full = "forget-oldest"     # or "refuse"
    [[age]]
    after = "7 d"                   # of a unit's end, on the wall clock
    codec = "int4"
    [[age]]
    after = "30 d"
    retainer = "uniform"
    keep = 0.5                      # of the tokens of each block
    [[age]]
    after = "90 d"
    keep = "memory"                 # of what a bounded memory stored, the tokens that it holds now
    [[age]]
    after = "365 d"
    keep = "captions"               # captions and key frames only

It lies in policy.json, in one byte form under a checksum, so that every flipped bit shows.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from memdb import policy_seal
from memdb.catalog import Catalog
from memdb.database import CATALOG
from memdb.files import write_whole
from memdb.folder import POLICY
from memdb.locks import FileLock
from memdb.records import canonical_ascii
from memdb.room import refused
from memdb.schemas.errors import CorruptionError, UsageError
from memdb.schemas.rows import ALL_PPM
from memdb.schemas.times import NS_PER_S, TIME_S_MAX

REFUSE, FORGET_OLDEST = "refuse", "forget-oldest"
WHEN_FULL = (REFUSE, FORGET_OLDEST)
CODECS = ("int8", "int4")  # that ageing turns KV into, the wider first
RETAINERS = ("uniform",)
CAPTIONS = "captions"
MEMORY = "memory"
AGES_MAX = 16
STORE_BYTES_MIN = 16 << 20  # the catalog and its WAL alone take some of that
_STORE_BYTES_MAX = 1 << 60
_FILE_BYTES_MAX = 1 << 16
_FORMAT = 1
_KEYS = ("store_bytes_max", "when_full", "age")
_AGE_KEYS = ("after", "codec", "retainer", "keep")
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", re.ASCII)
_BYTES = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Age:
    """What becomes of a unit's KV once its end is `after_ns` ago."""

    after_ns: int
    codec: str = ""  # "": the one that it has
    retainer: str = ""
    keep_ppm: int = ALL_PPM  # of the tokens of each block, in millionths
    captions_only: bool = False
    memory_only: bool = False  # of recordings with a bounded memory; others stay as they are

    def as_table(self) -> dict[str, object]:
        table: dict[str, object] = {"after": self.after_ns // NS_PER_S}
        if self.codec:
            table["codec"] = self.codec
        if self.retainer:
            table |= {"retainer": self.retainer, "keep": self.keep_ppm / ALL_PPM}
        if self.memory_only:
            table |= {"keep": MEMORY}
        return table | ({"keep": CAPTIONS} if self.captions_only else {})


@dataclass(frozen=True)
class Policy:
    store_bytes_max: int | None = None
    when_full: str = REFUSE
    ages: tuple[Age, ...] = ()  # the youngest first

    def as_table(self) -> dict[str, object]:
        """The table that `parse` takes."""
        table: dict[str, object] = {
            "when_full": self.when_full,
            "age": [age.as_table() for age in self.ages],
        }
        return table | ({} if self.store_bytes_max is None else {"store_bytes_max": self.store_bytes_max})


def as_toml(policy: Policy) -> str:
    """The policy as it is written by hand."""
    lines = [] if policy.store_bytes_max is None else [f"store_bytes_max = {policy.store_bytes_max}"]
    lines.append(f'when_full = "{policy.when_full}"')
    for age in policy.ages:
        seconds = age.after_ns // NS_PER_S
        unit, size = next((unit, size) for unit, size in reversed(_SECONDS.items()) if not seconds % size)
        rest = {key: value for key, value in age.as_table().items() if key != "after"}
        lines += ["[[age]]", f'after = "{seconds // size} {unit}"']
        lines += [f"{key} = {json.dumps(value)}" for key, value in rest.items()]
    return "\n".join(lines)


def read_toml(path: Path) -> Policy:
    """A policy from a TOML file. Raises UsageError."""
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise UsageError(f"{path} is too long for a policy: a few lines are enough")
        return parse(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:  # no TOML, no text, or a number without end
        raise UsageError(f"cannot read the policy {path}: {error}") from None


def parse(table: object) -> Policy:
    """A policy from its table. Raises UsageError that says what to write."""
    if not isinstance(table, Mapping):
        raise UsageError(f"a policy is a table of {', '.join(_KEYS)}, not a {type(table).__name__}")
    _known(table, _KEYS, "the policy")
    size = table.get("store_bytes_max")
    when_full = table.get("when_full", REFUSE)
    if when_full not in WHEN_FULL:
        raise UsageError(f"when_full = {when_full!r}: write one of {_quoted(WHEN_FULL)}")
    ages = table.get("age", [])
    if not isinstance(ages, list) or not all(isinstance(age, Mapping) for age in ages):
        raise UsageError("age must be tables: begin each with a line [[age]]")
    if len(ages) > AGES_MAX:
        raise UsageError(f"{len(ages)} ages are too many: write at most {AGES_MAX}")
    found = tuple(_age(age, number) for number, age in enumerate(ages, 1))
    _check_order(found)
    return Policy(None if size is None else _store_bytes(size), str(when_full), found)


def _age(table: Mapping[str, object], number: int) -> Age:
    where = f"age {number}"
    _known(table, _AGE_KEYS, where)
    if "after" not in table:
        raise UsageError(f'{where} names no time: add a line like after = "30 d"')
    after_ns = _duration_ns(table["after"], where)
    codec, retainer, keep = (table.get(key) for key in ("codec", "retainer", "keep"))
    if keep == CAPTIONS:
        if codec is not None or retainer is not None:
            raise UsageError(f'{where}: keep = "captions" leaves no KV: take its codec and retainer away')
        return Age(after_ns, captions_only=True)
    if keep == MEMORY and retainer is not None:
        raise UsageError(f'{where}: keep = "memory" leaves what the memory holds: take its retainer away')
    if codec is not None and codec not in CODECS:
        raise UsageError(f"{where}: codec = {codec!r}: write one of {_quoted(CODECS)}")
    if keep == MEMORY:
        return Age(after_ns, str(codec or ""), memory_only=True)
    if retainer is not None and retainer not in RETAINERS:
        raise UsageError(f"{where}: retainer = {retainer!r}: write {_quoted(RETAINERS)}")
    if (retainer is None) != (keep is None):
        raise UsageError(
            f'{where}: a retainer and a share go together: write retainer = "uniform", keep = 0.5'
        )
    if codec is None and keep is None:
        raise UsageError(f'{where} changes nothing: write codec = "int4", keep = 0.5 or keep = "captions"')
    return Age(
        after_ns, str(codec or ""), str(retainer or ""), ALL_PPM if keep is None else _ppm(keep, where)
    )


def _check_order(ages: tuple[Age, ...]) -> None:
    codec, keep_ppm, before, gathered = "", ALL_PPM, 0, False
    for number, age in enumerate(ages, 1):
        where = f"age {number}"
        if number > 1 and age.after_ns <= before:
            raise UsageError(f"{where} comes no later than age {number - 1}: write the youngest age first")
        if age.captions_only and number < len(ages):
            raise UsageError(f'{where}: nothing can follow keep = "captions": let it be the last age')
        if age.codec and codec and CODECS.index(age.codec) <= CODECS.index(codec):
            raise UsageError(f"{where}: codec {age.codec} after {codec} frees nothing: write a narrower one")
        if age.retainer and age.keep_ppm >= keep_ppm:
            raise UsageError(
                f"{where}: keep = {age.keep_ppm / ALL_PPM:g} frees nothing: write a smaller share"
            )
        if age.memory_only and gathered:
            raise UsageError(f'{where}: keep = "memory" a second time frees nothing: leave one of them')
        codec, keep_ppm, before = age.codec or codec, min(keep_ppm, age.keep_ppm), age.after_ns
        gathered = gathered or age.memory_only


def _known(table: Mapping[str, object], keys: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(keys))
    if unknown:
        raise UsageError(f"{where} has no {unknown[0]!r}: its keys are {', '.join(keys)}")


def _store_bytes(value: object) -> int:
    size = _amount(value, _BYTES, "store_bytes_max", 'a size like "500 GB", or a number of bytes')
    if not STORE_BYTES_MIN <= size <= _STORE_BYTES_MAX:
        raise UsageError(
            f"store_bytes_max = {value!r}: write at least {STORE_BYTES_MIN} bytes, at most 1 EiB"
        )
    return size


def _duration_ns(value: object, where: str) -> int:
    seconds = _amount(
        value, _SECONDS, f"{where}: after", 'a time like "30 d", "12 h" or "90 min", or seconds'
    )
    if not 1 <= seconds <= TIME_S_MAX:
        raise UsageError(f"{where}: after = {value!r}: write at least a second, at most 285 years")
    return seconds * NS_PER_S


def _amount(value: object, units: Mapping[str, int], where: str, wanted: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = _AMOUNT.fullmatch(value) if isinstance(value, str) and len(value) <= 32 else None
    if found is None or found[2] not in units:
        raise UsageError(f"{where} = {value!r}: write {wanted}")
    return round(float(found[1]) * units[found[2]])


def _ppm(value: object, where: str) -> int:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return max(1, round(value * ALL_PPM))
    raise UsageError(f'{where}: keep = {value!r}: write a share above 0 and up to 1, or "captions"')


def _quoted(names: tuple[str, ...]) -> str:
    return " or ".join(f'"{name}"' for name in names)


# In the store


def read_policy(store_path: Path) -> Policy:
    """The store's policy; where none was set, nothing ages and only the disk is the limit.

    Raises CorruptionError where the file is damaged, gone, or not the one that was set last: then nobody knows
    what was wanted, and nothing is aged or removed by it.
    """
    policy = _read(store_path)
    try:
        policy_seal.check_seal(store_path)
    except OSError as error:
        raise CorruptionError(f"{POLICY} cannot be read: {error.strerror}", file=POLICY) from None
    return policy


def _read(store_path: Path) -> Policy:
    damaged = CorruptionError(
        f"{POLICY} is damaged: set it again with memdb policy --store {store_path} --set FILE.toml",
        file=POLICY,
    )
    try:
        with open(store_path / POLICY, "rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return Policy()
    except OSError as error:
        raise CorruptionError(f"{POLICY} cannot be read: {error.strerror}", file=POLICY) from None
    try:
        table = json.loads(data)
        policy, serial = parse(table["policy"]), int(table["serial"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, UsageError):
        raise damaged from None
    if _bytes_of(policy, serial) != data:
        raise damaged
    return policy


def write_policy(store_path: Path, policy: Policy) -> None:
    """Put a policy in place, whole or not at all; the catalog knows of it: see memdb/policy_seal.py.

    Raises UsageError for one that makes no sense, StoreError.
    """
    parse(policy.as_table())
    with FileLock(store_path / "locks" / "policy.lock", wait=True):
        catalog = Catalog(store_path / CATALOG, write=True)
        try:
            data = _bytes_of(policy, policy_seal.next_serial(catalog.database, store_path))
            seal = policy_seal.seal_of(data)
            policy_seal.admit_beside(catalog.database, store_path, seal)
            write_whole(
                store_path / POLICY,
                [data],
                sync="the store's policy",
                sync_name="the name of the store's policy",
            )
            policy_seal.admit(catalog.database, [seal])
        except OSError as error:
            raise refused(error, "cannot set the policy") from error
        finally:
            catalog.close()


def _bytes_of(policy: Policy, serial: int) -> bytes:
    """`serial` counts the policies of a store: see memdb/policy_seal.py."""
    table = policy.as_table()
    digest = xxhash.xxh3_128_hexdigest(canonical_ascii([table, serial]))
    return canonical_ascii({"format": _FORMAT, "policy": table, "serial": serial, "xxh3": digest})
