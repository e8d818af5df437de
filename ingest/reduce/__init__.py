"""Stage 2: what is done to visual tokens before the language model. A method is one file and one line here."""

from memdb.ingest.reduce.identity import Identity
from memdb.ingest.reduce.recurrent import Recurrent

REDUCERS: dict[str, type[Identity] | type[Recurrent]] = {
    "identity": Identity,
    "recurrent": Recurrent,
}
