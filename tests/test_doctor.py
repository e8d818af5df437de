"""The doctor sees what is broken, says what to type, and never falls ill itself."""

from __future__ import annotations

import sqlite3
from importlib import metadata

import pytest

from memdb import doctor as clinic
from memdb.doctor import CHECKS, FAISS_WHEELS, Check, doctor


def found(name: str) -> Check:
    [check] = [check for check in doctor() if check.name == name]
    return check


def test_this_machine_has_what_memdb_needs() -> None:
    checks = doctor()
    assert [check for check in checks if check.state == "bad"] == []
    assert len({check.name for check in checks}) == len(checks)
    assert {"python", "torch", "lancedb", "faiss", "minilm", "sqlite", "video", "cuda", "cores"} <= {
        check.name for check in checks
    }
    assert all("\n" not in check.detail + check.mend for check in checks)
    assert found("sqlite").detail.startswith(sqlite3.sqlite_version)
    assert found("minilm").as_json()["state"] == "ok"


@pytest.mark.parametrize(("module", "name"), [("torch", "cuda"), ("faiss", "faiss"), ("av", "video")])
def test_a_broken_package_is_a_finding(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    check = found(name)
    assert check.state == "bad"
    assert check.mend.startswith("pip install")


def test_any_check_may_raise_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[Check]:
        raise ZeroDivisionError("first\nsecond")

    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, fails)
    assert [(check.name, check.state, check.detail) for check in doctor()] == [
        (name, "bad", "ZeroDivisionError: first") for name in CHECKS
    ]


def test_two_faiss_wheels_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name in FAISS_WHEELS[:2] else real(name))
    check = found("faiss")
    assert (check.state, check.mend) == (
        "bad",
        "pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-cpu",
    )


def test_a_missing_and_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "lancedb":
            raise metadata.PackageNotFoundError(name)
        return "5.1.0" if name == "transformers" else "99"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["transformers<6,>=5.17", "ruff>=1; extra == 'dev'"]
    )
    checks = {check.name: check for check in clinic._packages()}
    assert checks["lancedb"].mend == "pip install lancedb"
    assert checks["transformers"].state == "bad"
    assert checks["transformers"].mend == "pip install 'transformers<6,>=5.17'"
    assert checks["numpy"].state == "ok"
