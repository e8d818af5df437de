"""Stage 1: which frames make a unit. A method is one file and one line here."""

from memdb.ingest.units.base import UnitStage
from memdb.ingest.units.block import FixedBlock
from memdb.ingest.units.clip import Clip
from memdb.ingest.units.frame import OneFrame
from memdb.ingest.units.segment import SemanticSegment

UNITS: dict[str, type[UnitStage]] = {
    "frame": OneFrame,
    "block": FixedBlock,
    "clip": Clip,
    "segment": SemanticSegment,
}
