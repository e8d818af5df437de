"""Stage 6: what blocks are found by. A method is one file and one line here."""

from memdb.index.frame_embedding import FrameEmbedding
from memdb.index.mean_key import MeanKey


class ByCaption(MeanKey):
    """Nothing of its own: captions carry their vectors, and a recipe without KV has no block to find."""


class PageKey(MeanKey):
    """Blocks keep their mean keys; pages of a memory's tokens are cut when a question comes (`query/paged.py`)."""


INDEXED: dict[str, type[MeanKey]] = {
    "mean_key": MeanKey,
    "frame_embedding": FrameEmbedding,
    "page_key": PageKey,
    "caption": ByCaption,
}
