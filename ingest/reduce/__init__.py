"""Stage 2: what is done to visual tokens before the language model. A method is one file and one line here."""

from memdb.ingest.reduce.base import Reducer
from memdb.ingest.reduce.ctr import CausalTemporal
from memdb.ingest.reduce.identity import Identity
from memdb.ingest.reduce.merge_frames import MergeFrames
from memdb.ingest.reduce.recurrent import Recurrent

REDUCERS: dict[str, type[Reducer]] = {
    "identity": Identity,
    "merge": MergeFrames,
    "ctr": CausalTemporal,
    "recurrent": Recurrent,
}
