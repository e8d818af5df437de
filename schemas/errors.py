"""Every error that memdb raises, as one tree.

MemdbError
├── UsageError                 exit 2: the call itself is wrong
│   ├── RecipeError            a recipe that cannot be composed
│   ├── QuestionError          an empty or over-long question, an unknown mode
│   ├── BudgetError            an absurd budget, rate, span or time
│   └── UnknownRecording
├── StoreError                 exit 1
│   ├── NotAStore              the folder holds no store
│   ├── FormatVersionError     written by a newer memdb
│   ├── LockedError            another process writes this recording
│   ├── StoreFull              the disk, or the store's own limit, has no room
│   └── CorruptionError        exit 3: bytes differ from what was written
├── ModelError                 exit 1
│   ├── ModelNotFound
│   ├── UnsupportedModel
│   ├── ModelMismatch          the store was made with another model
│   └── EncodingMismatch       the recording was encoded in another way
├── SourceError                exit 1: a film, folder or address that gives no frames
│   └── SourceMismatch         another film under the name of this recording
├── CodecError                 exit 1: values that a codec cannot hold
├── NoPlanFits                 exit 4: no plan fits the budget; nothing was computed
├── Interrupted                exit 130: stopped by the user after the batch in hand
└── MissingDependency          exit 1: what to install
"""

from __future__ import annotations

from collections.abc import Mapping


class MemdbError(Exception):
    """Base of every error that memdb raises on purpose. The message says what to do."""

    exit_code = 1


class UsageError(MemdbError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class QuestionError(UsageError):
    pass


class BudgetError(UsageError):
    pass


class UnknownRecording(UsageError):
    pass


class StoreError(MemdbError):
    pass


class NotAStore(StoreError):
    pass


class FormatVersionError(StoreError):
    pass


class LockedError(StoreError):
    pass


class StoreFull(StoreError):
    pass


class CorruptionError(StoreError):
    """Bytes on disk differ from what was written. `file` is relative to the store."""

    exit_code = 3

    def __init__(self, message: str, *, file: str = "") -> None:
        super().__init__(message)
        self.file = file


class ModelError(MemdbError):
    pass


class ModelNotFound(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class ModelMismatch(ModelError):
    pass


class EncodingMismatch(ModelError):
    pass


class SourceError(MemdbError):
    pass


class SourceMismatch(SourceError):
    pass


class CodecError(MemdbError):
    pass


class NoPlanFits(MemdbError):
    """No plan fits the budget. `nearest` is a budget that one would fit: the limits that were given, raised."""

    exit_code = 4

    def __init__(self, message: str, *, nearest: Mapping[str, float | int]) -> None:
        super().__init__(message)
        self.nearest = dict(nearest)


class Interrupted(MemdbError):
    exit_code = 130


class MissingDependency(MemdbError):
    pass
