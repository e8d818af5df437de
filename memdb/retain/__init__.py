"""Stage 5: what of the encoded KV is kept. A method is one file and one line here."""

from memdb.retain.base import Bounded, Retainer
from memdb.retain.keep_all import KeepAll
from memdb.retain.recent import Recent
from memdb.retain.select_kv import SelectKV
from memdb.retain.tar_van import TarVan
from memdb.retain.template import Template
from memdb.retain.uniform import Uniform, UniformTokens
from memdb.retain.vision_sink import VisionSink

# These choose tokens, a layer for itself, so that a memory never exceeds its budget.
BOUNDED: dict[str, type[Bounded]] = {
    "recent": Recent,
    "tar_van": TarVan,
    "template": Template,
    "uniform": UniformTokens,
    "vision_sink": VisionSink,
}
RETAINERS: dict[str, type[Retainer]] = {
    "all": KeepAll,
    "select_kv": SelectKV,
    **BOUNDED,
}
# By these ageing thins blocks that are stored already: they choose by place alone, without a look at the values.
THINNERS: dict[str, type[Uniform]] = {
    "uniform": Uniform,
}
