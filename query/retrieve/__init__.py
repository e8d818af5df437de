"""Stage 7: what a question brings back. A method is one file and one line here."""

from memdb.query.retrieve.all import ActivateAll
from memdb.query.retrieve.external import External
from memdb.query.retrieve.groups import GroupTopK
from memdb.query.retrieve.layer_adaptive import LayerAdaptive
from memdb.query.retrieve.mmr import CaptionMMR
from memdb.query.retrieve.pages import MemoryPages
from memdb.query.retrieve.topk import BlockTopK

RETRIEVERS: dict[
    str,
    type[BlockTopK]
    | type[LayerAdaptive]
    | type[GroupTopK]
    | type[External]
    | type[CaptionMMR]
    | type[ActivateAll]
    | type[MemoryPages],
] = {
    "topk": BlockTopK,
    "layer_adaptive": LayerAdaptive,
    "groups": GroupTopK,
    "external": External,
    "mmr": CaptionMMR,
    "all": ActivateAll,
    "pages": MemoryPages,
}
