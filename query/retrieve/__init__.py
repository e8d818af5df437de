"""Stage 7: what a question brings back. A method is one file and one line here."""

from memdb.query.retrieve.all import ActivateAll
from memdb.query.retrieve.layer_adaptive import LayerAdaptive
from memdb.query.retrieve.mmr import CaptionMMR
from memdb.query.retrieve.topk import BlockTopK

RETRIEVERS: dict[str, type[BlockTopK] | type[LayerAdaptive] | type[CaptionMMR] | type[ActivateAll]] = {
    "topk": BlockTopK,
    "layer_adaptive": LayerAdaptive,
    "mmr": CaptionMMR,
    "all": ActivateAll,
}
