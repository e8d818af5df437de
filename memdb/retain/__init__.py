"""Stage 5: what of the encoded KV is kept. A method is one file and one line here."""

from memdb.retain.bounded_recent import BoundedRecent
from memdb.retain.bounded_uniform import BoundedUniform
from memdb.retain.keep_all import KeepAll
from memdb.retain.uniform import Uniform
from memdb.retain.view import BoundedRetainer

# Bounded memories: at most a budget of tokens a layer after every chunk, of which the next chunk is encoded.
BOUNDED: dict[str, type[BoundedRetainer]] = {
    "uniform": BoundedUniform,
    "recent": BoundedRecent,
}
RETAINERS: dict[str, type[KeepAll] | type[BoundedRetainer]] = {
    "all": KeepAll,
    **BOUNDED,
}
# By these ageing thins blocks that are stored already: they choose by place alone, without a look at the values.
THINNERS: dict[str, type[Uniform]] = {
    "uniform": Uniform,
}
