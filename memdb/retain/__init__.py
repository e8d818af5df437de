"""Stage 5: what of the encoded KV is kept. A method is one file and one line here."""

from memdb.retain.keep_all import KeepAll

RETAINERS: dict[str, type[KeepAll]] = {
    "all": KeepAll,
}
