"""Stage 7: what a question brings back. A method is one file and one line here."""

from memdb.query.retrieve.all import ActivateAll
from memdb.query.retrieve.groups import GroupTopK
from memdb.query.retrieve.mmr import CaptionMMR
from memdb.query.retrieve.topk import BlockTopK

RETRIEVERS: dict[str, type[BlockTopK] | type[GroupTopK] | type[CaptionMMR] | type[ActivateAll]] = {
    "topk": BlockTopK,
    "groups": GroupTopK,
    "mmr": CaptionMMR,
    "all": ActivateAll,
}
