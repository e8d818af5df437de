"""Stage 1: which frames make a unit. A method is one file and one line here."""

from memdb.ingest.units.base import UnitStage
from memdb.ingest.units.clip import Clip
from memdb.ingest.units.frame import OneFrame

UNITS: dict[str, type[UnitStage]] = {
    "frame": OneFrame,
    "clip": Clip,
}
