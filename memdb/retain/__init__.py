"""Stage 5: what of the encoded KV is kept. A method is one file and one line here."""

from memdb.retain.keep_all import KeepAll
from memdb.retain.uniform import Uniform

RETAINERS: dict[str, type[KeepAll]] = {
    "all": KeepAll,
}
# By these ageing thins blocks that are stored already: they choose by place alone, without a look at the values.
THINNERS: dict[str, type[Uniform]] = {
    "uniform": Uniform,
}
