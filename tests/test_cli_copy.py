"""`memdb repair`, `backup`, `export` and `import`: what they print, in words and as JSON, and their exit codes."""

from __future__ import annotations

import os
from pathlib import Path

from memdb.client import connect
from memdb.database import CATALOG
from memdb.locks import FileLock
from memdb.records import Kind
from memdb.store import Store
from tests.repair_cases import digests, find, spoil
from tests.run_cases import command
from tests.store_cases import flip


def test_a_store_without_a_catalog_is_repaired(furnished: Path, copied: Path) -> None:
    path, record = find(copied, "lobby", Kind.UNIT, 3)
    spoil(path, record, "footer")
    (copied / CATALOG).unlink()
    told = command("recordings", "--store", str(copied))
    assert told.code == 1
    assert "memdb repair" in told.err
    ran = command("repair", "--store", str(copied))
    assert (ran.code, ran.err) == (0, "")
    assert "lobby: unit 3 (6 to 8 s) is lost" in ran.out
    assert "lobby: 9 units up to 00:00:18" in ran.out
    assert ran.out.endswith(
        "4 recordings with 22 units are in a new catalog; 1 forgotten recordings stay forgotten\n"
    )
    assert command("recordings", "--store", str(copied)).code == 0
    again = command("repair", "--store", str(copied), "--json").json
    assert again.keys() == {"recordings", "spans", "forgotten", "dropped", "notes"}
    assert {row["name"]: row["units"] for row in again["recordings"]} == {
        "attic": 5,
        "hall": 8,
        "lobby": 9,
        "shed": 0,
    }
    good = {name: digest for name, digest in digests(furnished).items() if name != "lobby"}
    assert good.items() <= digests(copied).items()


def test_a_repair_that_cannot_be_says_what_to_do(copied: Path, tmp_path: Path) -> None:
    with FileLock(copied / "locks" / "names.lock"):
        ran = command("repair", "--store", str(copied), "--json")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert "run memdb repair again" in ran.err
    assert command("repair", "--store", str(tmp_path / "nowhere")).code == 1


def test_a_backup_is_made_and_damage_is_exit_code_3(furnished: Path, copied: Path, tmp_path: Path) -> None:
    ran = command("backup", str(tmp_path / "monday"), "--store", str(copied), "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["path"] == str(tmp_path / "monday")
    assert ran.json["problems"] == []
    assert digests(tmp_path / "monday") == digests(furnished)
    full = command("backup", str(tmp_path / "monday"), "--store", str(copied))
    assert full.code == 2
    assert "is not empty" in full.err
    path, record = find(copied, "lobby", Kind.UNIT, 3)
    spoil(path, record, "body")
    ran = command("backup", str(tmp_path / "tuesday"), "--store", str(copied))
    assert ran.code == 3
    assert f"segments/{path.name}" in ran.out
    assert "lobby: 9 units" in ran.out
    assert digests(tmp_path / "tuesday")["hall"] == digests(furnished)["hall"]


def test_a_recording_is_exported_and_imported(furnished: Path, copied: Path, tmp_path: Path) -> None:
    out, new = str(tmp_path / "hall"), str(tmp_path / "new.memdb")
    words = ["export", "--store", str(copied), "--recording", "hall", "--format", "memdb", "--out", out]
    assert command(*words, "--json").json == {"units": 8, "out": out}
    assert command(*words).out == f"8 units written to {out}\n"
    ran = command("import", out, "--store", new, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json.keys() == {"recording", "units", "watermark_s", "bytes", "notes"}
    assert digests(Path(new)) == {"hall": digests(furnished)["hall"]}
    taken = command("import", out, "--store", new)
    assert taken.code == 2
    assert "--recording" in taken.err
    again = command("import", out, "--store", new, "--recording", "hall 2")
    assert again.out == "hall 2: 8 units up to 00:00:16 came in\n"
    flip(tmp_path / "hall", 9000)
    damaged = command("import", out, "--store", new, "--recording", "hall 3")
    assert damaged.code == 1
    assert out in damaged.err
    none = command("import", __file__, "--store", str(tmp_path / "none.memdb"))
    assert none.code == 2
    assert not (tmp_path / "none.memdb").exists(), "no copied is made for what is no export"


def test_the_client_has_the_same(furnished: Path, tmp_path: Path) -> None:
    with connect(furnished, create=False) as client:
        assert client.export("attic", tmp_path / "attic", format="memdb") == 5
        report = client.backup(tmp_path / "copy")
        assert report.problems == []
    with connect(tmp_path / "new.memdb") as client:
        assert client.import_(tmp_path / "attic", recording="loft").units == 5
        assert [row.name for row in client.recordings()] == ["loft"]
        assert client.store.recording("loft").spec.name == "loft"
    with Store.open(tmp_path / "copy") as copy:
        assert [row.name for row in copy.recordings()] == ["attic", "hall", "lobby", "shed"]
    assert "captions.lance" in os.listdir(tmp_path / "copy")
