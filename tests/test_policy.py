"""The policy: what may be written in it, how it lies in the store, and the clock that it goes by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from memdb.catalog import Catalog
from memdb.client import connect
from memdb.clock import LEAP_NS, believe, doubt, set_policy
from memdb.database import CATALOG
from memdb.files import watched
from memdb.folder import POLICY
from memdb.policy import (
    RETAINERS,
    STORE_BYTES_MIN,
    Age,
    Policy,
    as_toml,
    parse,
    read_policy,
    read_toml,
    write_policy,
)
from memdb.policy_check import check_policy
from memdb.records import canonical_ascii
from memdb.retain import THINNERS
from memdb.schemas.errors import CorruptionError, StoreError, StoreFull, UsageError
from memdb.store import Store
from tests.run_cases import command
from tests.store_cases import Steps, fill, flip, new_store

DAY_NS = 86_400 * 10**9
FULL = """
store_bytes_max = "500 GB"
when_full = "forget-oldest"
[[age]]
after = "7 d"
codec = "int8"
[[age]]
after = "30 d"
codec = "int4"
retainer = "uniform"
keep = 0.5
[[age]]
after = 5184000
retainer = "uniform"
keep = 0.25
[[age]]
after = "365 d"
keep = "captions"
"""
AS_POLICY = Policy(
    500_000_000_000,
    "forget-oldest",
    (
        Age(7 * DAY_NS, "int8"),
        Age(30 * DAY_NS, "int4", "uniform", 500_000),
        Age(60 * DAY_NS, "", "uniform", 250_000),
        Age(365 * DAY_NS, captions_only=True),
    ),
)


def toml(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text)
    return path


def test_what_is_written_is_what_is_meant(tmp_path: Path) -> None:
    assert read_toml(toml(tmp_path, FULL)) == AS_POLICY
    assert read_toml(toml(tmp_path, "")) == Policy()
    assert read_toml(toml(tmp_path, as_toml(AS_POLICY))) == AS_POLICY
    assert parse(AS_POLICY.as_table()) == AS_POLICY
    assert set(RETAINERS) == set(THINNERS)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ('"16 MiB"', 1 << 24),
        ('"17.5 MB"', 17_500_000),
        ('"20GB"', 20_000_000_000),
        ('"2 TiB"', 2 << 40),
        ("16777216", 1 << 24),
        ('"20000000 B"', 20_000_000),
    ],
)
def test_sizes(tmp_path: Path, text: str, size: int) -> None:
    assert read_toml(toml(tmp_path, f"store_bytes_max = {text}")).store_bytes_max == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [('"90 min"', 5400), ('"12 h"', 43_200), ('"1.5 d"', 129_600), ('"30 s"', 30), ("3600", 3600)],
)
def test_times(tmp_path: Path, text: str, seconds: int) -> None:
    (age,) = read_toml(toml(tmp_path, f'[[age]]\nafter = {text}\ncodec = "int4"')).ages
    assert age.after_ns == seconds * 10**9


AGE = '[[age]]\nafter = "7 d"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("store_bytes = 5", "has no 'store_bytes': its keys are store_bytes_max, when_full, age"),
        ('store_bytes_max = "plenty"', 'write a size like "500 GB"'),
        ('store_bytes_max = "5 gb"', 'write a size like "500 GB"'),
        ("store_bytes_max = true", 'write a size like "500 GB"'),
        ("store_bytes_max = 5.5", 'write a size like "500 GB"'),
        (f"store_bytes_max = {STORE_BYTES_MIN - 1}", f"write at least {STORE_BYTES_MIN} bytes"),
        (f"store_bytes_max = {1 << 70}", "at most 1 EiB"),
        ("store_bytes_max = -5", "write at least"),
        ('when_full = "panic"', 'write one of "refuse" or "forget-oldest"'),
        ("when_full = []", 'write one of "refuse" or "forget-oldest"'),
        ("age = 5", r"begin each with a line \[\[age\]\]"),
        ("age = [5]", r"begin each with a line \[\[age\]\]"),
        (AGE * 17, "at most 16"),
        ("[[age]]\ncodec = 'int4'", "names no time: add a line like after"),
        (AGE, 'age 1 changes nothing: write codec = "int4"'),
        (
            AGE + "codec = 'int4'\nshape = 1",
            "age 1 has no 'shape': its keys are after, codec, retainer, keep",
        ),
        ("[[age]]\nafter = '7 weeks'\ncodec = 'int4'", 'write a time like "30 d"'),
        ("[[age]]\nafter = 0\ncodec = 'int4'", "write at least a second"),
        ("[[age]]\nafter = -1\ncodec = 'int4'", "write at least a second"),
        ("[[age]]\nafter = '9999999 d'\ncodec = 'int4'", "at most 285 years"),
        ("[[age]]\nafter = inf\ncodec = 'int4'", 'write a time like "30 d"'),
        (AGE + "codec = 'fp16'", 'codec = \'fp16\': write one of "int8" or "int4"'),
        (AGE + "codec = 4", "write one of"),
        (AGE + "retainer = 'uniform'", 'write retainer = "uniform", keep = 0.5'),
        (AGE + "keep = 0.5", 'write retainer = "uniform", keep = 0.5'),
        (AGE + "retainer = 'best'\nkeep = 0.5", "retainer = 'best': write \"uniform\""),
        (AGE + "retainer = 'uniform'\nkeep = 0", "write a share above 0 and up to 1"),
        (AGE + "retainer = 'uniform'\nkeep = 1.01", "write a share above 0 and up to 1"),
        (AGE + "retainer = 'uniform'\nkeep = nan", "write a share above 0 and up to 1"),
        (AGE + "retainer = 'uniform'\nkeep = true", "write a share above 0 and up to 1"),
        (AGE + "retainer = 'uniform'\nkeep = 'half'", 'or "captions"'),
        (AGE + "retainer = 'uniform'\nkeep = 1.0", "age 1: keep = 1 frees nothing"),
        (AGE + "keep = 'captions'\ncodec = 'int4'", "take its codec and retainer away"),
        (AGE + "codec = 'int4'\n" + AGE + "keep = 'captions'", "age 2 comes no later than age 1"),
        (AGE + "keep = 'captions'\n[[age]]\nafter = '8 d'\ncodec = 'int4'", "nothing can follow"),
        (
            AGE + "codec = 'int4'\n[[age]]\nafter = '8 d'\ncodec = 'int8'",
            "codec int8 after int4 frees nothing",
        ),
        (
            AGE + "codec = 'int4'\n[[age]]\nafter = '8 d'\ncodec = 'int4'",
            "codec int4 after int4 frees nothing",
        ),
        (
            AGE
            + "retainer = 'uniform'\nkeep = 0.5\n[[age]]\nafter = '8 d'\nretainer = 'uniform'\nkeep = 0.5",
            "age 2: keep = 0.5 frees nothing: write a smaller share",
        ),
        ("store_bytes_max = ", "cannot read the policy"),
        ("\x00", "cannot read the policy"),
        ("a = " + "[" * 5000, "cannot read the policy"),
        ("#" * 70_000, "too long for a policy"),
    ],
)
def test_what_cannot_be_meant_says_what_to_write(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        read_toml(toml(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the policy"):
        read_toml(tmp_path / "none.toml")


# In the store


def test_it_is_kept_and_replaced_whole(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        assert read_policy(store.path) == Policy()
        assert check_policy(store.path) == []
        for policy in (AS_POLICY, Policy(), AS_POLICY):
            write_policy(store.path, policy)
            assert read_policy(store.path) == policy
        kept = json.loads((store.path / POLICY).read_bytes())
        assert kept["policy"]["store_bytes_max"] == 500_000_000_000
        full = Steps(lambda step: step.what == "write")
        with watched(full), pytest.raises(StoreFull):
            write_policy(store.path, Policy())
        assert read_policy(store.path) == AS_POLICY
        assert not (store.path / f"{POLICY}.tmp").exists()
        broken = Steps(lambda step: step.what == "sync", OSError(5, "Input/output error"))
        with watched(broken), pytest.raises(StoreError, match="Input/output"):
            write_policy(store.path, Policy())
        assert read_policy(store.path) == AS_POLICY


def test_every_flipped_bit_and_every_torn_length_is_damage(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        write_policy(store.path, AS_POLICY)
        path = store.path / POLICY
        data = path.read_bytes()
        for byte in range(len(data)):
            flip(path, byte, byte % 8)
            with pytest.raises(CorruptionError, match="memdb policy") as caught:
                read_policy(store.path)
            assert caught.value.file == POLICY
            path.write_bytes(data)
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            with pytest.raises(CorruptionError):
                read_policy(store.path)
        path.write_bytes(data * 200)
        (problem,) = check_policy(store.path)
        assert problem.file == POLICY


@pytest.mark.parametrize(
    "said",
    [
        *([], 5, None, "policy", {}),
        *({"policy": value, "serial": 1} for value in ([], [1], 5, None, "age", {"age": {}}, {"age": [[]]})),
        *({"policy": {}, "serial": value} for value in (float("inf"), float("nan"), [], None, "one")),
    ],
    ids=str,
)
def test_another_thing_where_a_table_or_a_number_is_expected_is_damage(tmp_path: Path, said: object) -> None:
    """Under a right checksum, as a hostile writer would have it."""
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = tmp_path / "lobby.memdb"
    if isinstance(said, dict) and said:
        digest = xxhash.xxh3_128_hexdigest(canonical_ascii([said["policy"], said["serial"]]))
        said = {"format": 1, **said, "xxh3": digest}
    (path / POLICY).write_bytes(canonical_ascii(said))
    with pytest.raises(CorruptionError, match="memdb policy"):
        read_policy(path)
    with connect(path) as client:
        assert [problem.file for problem in client.verify().problems] == [POLICY]
        with pytest.raises(CorruptionError):
            client.compact()


def test_damage_is_reported_and_a_policy_that_is_set_again_mends_it(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = tmp_path / "lobby.memdb"
    with connect(path) as client:
        client.policy(set=AS_POLICY)
        assert client.policy() == AS_POLICY
        flip(path / POLICY, 30)
        report = client.verify()
        assert [problem.file for problem in report.problems] == [POLICY]
        with pytest.raises(CorruptionError):
            client.compact()
        client.policy(set=AS_POLICY)
        assert client.verify().ok
        client.compact()


def test_the_command_sets_and_shows_it(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
    words = ["policy", "--store", str(tmp_path / "lobby.memdb")]
    assert command(*words).out == 'when_full = "refuse"\n'
    shown = command(*words, "--set", str(toml(tmp_path, FULL)))
    assert shown.code == 0
    assert read_toml(toml(tmp_path, shown.out)) == AS_POLICY
    found = command(*words, "--json").json
    assert parse({key: found[key] for key in ("store_bytes_max", "when_full", "age")}) == AS_POLICY
    assert found["due"] == {"lobby": 2}  # it began in 2023, and has KV
    wrong = command(*words, "--set", str(toml(tmp_path, "keep = 5")))
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("memdb: the policy has no 'keep'")
    assert command(*words, "--json").json == found


# The clock


def doubted(store: Store, now_ns: int) -> str:
    return doubt(store.catalog, now_ns)


def test_a_clock_is_believed_for_a_month_and_only_forward(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        assert "not known when" in doubted(store, 5)
        set_policy(store, AS_POLICY, now_ns=1000 * DAY_NS)
        assert doubted(store, 1000 * DAY_NS) == ""
        assert doubted(store, 1000 * DAY_NS + LEAP_NS) == ""
        assert "--age-now" in doubted(store, 1000 * DAY_NS + LEAP_NS + 1)
        assert "set the clock" in doubted(store, 1000 * DAY_NS - 1)
        catalog = Catalog(store.path / CATALOG, write=True)
        believe(catalog, 1020 * DAY_NS)
        believe(catalog, 1020 * DAY_NS + 5)  # within the hour: nothing is written
        assert doubted(store, 1020 * DAY_NS + 4) == ""
        assert doubted(store, 1020 * DAY_NS + LEAP_NS) == ""
        assert "--age-now" in doubted(store, 1020 * DAY_NS + LEAP_NS + 5)
        believe(catalog, 5 * DAY_NS)  # a clock that jumped back is not written down
        assert "set the clock" in doubted(store, 5 * DAY_NS)
        believe(catalog, 5 * DAY_NS, confirmed=True)
        assert doubted(store, 5 * DAY_NS) == ""
        catalog.close()
