"""Stage 3: the language model over the stream (`ENCODERS`) and over a clip for its caption (`CAPTIONERS`)."""

from memdb.ingest.encode.base import Captioner, Encoder
from memdb.ingest.encode.caption_blocks import CaptionOverBlocks
from memdb.ingest.encode.caption_clip import CaptionOverClip
from memdb.ingest.encode.chunk import Chunk
from memdb.ingest.encode.groups import Groups
from memdb.ingest.encode.nothing import NoCaption, NoKV
from memdb.ingest.encode.segment import SegmentWithSummary
from memdb.ingest.encode.window import SlidingWindow

ENCODERS: dict[str, type[Encoder]] = {
    "window": SlidingWindow,
    "segment": SegmentWithSummary,
    "groups": Groups,
    "chunk": Chunk,
    "none": NoKV,
}
CAPTIONERS: dict[str, type[Captioner]] = {
    "none": NoCaption,
    "clip": CaptionOverClip,
    "blocks": CaptionOverBlocks,
}
