"""Stage 8: from what was retrieved to a context that the Video-LLM can read on from."""

from memdb.query.rebuild.consecutive import Consecutive
from memdb.query.rebuild.original import Original
from memdb.query.rebuild.restored import Restored
from memdb.query.rebuild.text import TextOnly
from memdb.query.rebuild.written import Written
from memdb.query.rebuild.yarn import Yarn

REBUILDERS: dict[str, type[Consecutive] | type[TextOnly] | type[Original] | type[Written]] = {
    "consecutive": Consecutive,
    "text": TextOnly,
    "original": Original,
    "restored": Restored,
    "yarn": Yarn,
    "written": Written,
}
