"""Which calls count for which stage."""

from __future__ import annotations

from memdb.index.mean_key import MeanKey
from memdb.ingest import encoder as encoder_module
from memdb.ingest.encode import caption_clip
from memdb.ingest.reduce.ctr import BesideTheLast, CausalTemporal
from memdb.ingest.reduce.identity import Identity
from memdb.ingest.reduce.merge_frames import MergeFrames, Merging
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.ingest.stages import IngestStages
from memdb.models.cache import AttentionProbe
from memdb.models.caption_vectors import InputEmbeddings
from memdb.models.protocol import VideoModel
from memdb.retain.attention import Listener
from memdb.retain.keep_all import KeepAll
from memdb.retain.select_kv import SelectKV
from tools.stages.meter import Call

# Those that the encoder's laps do not tell apart.
CALLS = (
    Call(BesideTheLast, "reduce", "reduce"),
    Call(Merging, "reduce", "reduce"),
    Call(Merging, "arrived", "reduce"),
    Call(MergeFrames, "merge", "reduce"),
    Call(AttentionProbe, "observe", "reduce", lambda probe, layer, *_: layer in probe.layers),
    Call(AttentionProbe, "mean", "reduce"),
    Call(Recurrent, "select", "reduce"),
    Call(Recurrent, "remember", "reduce"),
    Call(Listener, "hear", "retain"),
    Call(Listener, "heard", "retain"),
    Call(SelectKV, "select", "retain"),
    Call(encoder_module, "add_prototypes", "retain"),
    Call(MeanKey, "means", "index"),
    Call(MeanKey, "checked", "index"),
    Call(InputEmbeddings, "of_caption", "index"),
    Call(caption_clip, "prefill", "encode"),  # of a recipe without KV it is what sees the frames
)


def calls(model: VideoModel, stages: IngestStages) -> list[Call]:
    """What counts for these stages. Saliency is all of `salient_tokens` but the look itself."""
    found = [call for call in CALLS if call.label not in idle(stages)]
    if isinstance(stages.reduce, CausalTemporal):
        found += [Call(type(model), "salient_tokens", "reduce"), Call(type(model), "_see", "vision")]
    return found


def idle(stages: IngestStages) -> dict[str, str]:
    """The stages of which there is nothing to time, each with its reason."""
    found = {}
    if isinstance(stages.reduce, Identity) and stages.recurrent is None:
        found["reduce"] = "identity: every visual token goes to the language model"
    if isinstance(stages.retain, KeepAll):
        found["retain"] = "all: nothing is dropped"
    return found
