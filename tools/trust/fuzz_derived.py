"""Hostile key pages, encoder states and caption manifests through the public calls."""

from __future__ import annotations

import xxhash

from memdb.index.pages import _HEADER, HEADER_BYTES, PageHeader
from memdb.state import _HEAD, _digest
from tools.trust.fuzz_input import Input
from tools.trust.hostile_values import NUMBERS, Chance, hostile_json_file, mangled


def pages(given: Input) -> None:
    """Headers with other sizes under right checksums, tables too."""
    given.copy()
    file = given.one_of("keys/*.pages")
    data = bytearray(file.read_bytes())
    if given.chance.random() < 0.3:
        file.write_bytes(mangled(bytes(data), given.chance))
    else:
        at = given.chance.randrange(24, HEADER_BYTES - 8, 4)
        width = given.chance.choice((4, 8))
        data[at : at + width] = (given.chance.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        if given.chance.random() < 0.5:  # and sizes that fit it
            _fit_page(data, given.chance)
        head = bytes(data[: HEADER_BYTES - 8])
        data[HEADER_BYTES - 8 : HEADER_BYTES] = xxhash.xxh3_64_intdigest(head).to_bytes(8, "little")
        file.write_bytes(data)
    given.ask_all()
    given.write_on()


def _fit_page(data: bytearray, chance: Chance) -> None:
    """Let a page be as long as its header says, and its tables' checksum right."""
    fields = list(_HEADER.unpack(bytes(data[: _HEADER.size])))
    header = PageHeader(fields[1].hex(), *fields[2:10], *fields[12:14])
    if chance.random() < 0.5 and header.page_bytes < 1 << 26:
        data += bytes(max(0, header.page_bytes - len(data)))
    tables = bytes(data[HEADER_BYTES : HEADER_BYTES + min(header.tables_bytes, len(data))])
    fields[11:13] = [header.page_bytes % (1 << 64), xxhash.xxh3_64_intdigest(tables)]
    data[: _HEADER.size] = _HEADER.pack(*fields)


def state(given: Input) -> None:
    given.copy()
    file = given.one_of("state/*.state")
    data = file.read_bytes()
    fields = list(_HEAD.unpack(data[: _HEAD.size]))
    name_end = _HEAD.size + fields[2]
    name, payload = data[_HEAD.size : name_end], data[name_end + 16 :]
    if given.chance.random() < 0.3:
        file.write_bytes(mangled(data, given.chance))
    else:
        at = given.chance.randrange(1, len(fields))
        bits = 32 if at in (1, 2) else 63
        number = given.chance.choice(NUMBERS) % (1 << bits)
        fields[at] = number.to_bytes(16, "little") if isinstance(fields[at], bytes) else number
        name = mangled(name, given.chance) if given.chance.random() < 0.3 else name
        head = _HEAD.pack(*fields)
        file.write_bytes(head + name + _digest(head + name, payload) + payload)
    given.ask_all()
    given.write_on()


def manifest(given: Input) -> None:
    """The list of a caption table's files, with a right checksum."""
    given.copy()
    file = given.one_of("captions.lance/*.manifest")
    text = file.read_bytes()[:-17]

    def seal(data: bytes) -> bytes:
        data = data.rstrip(b"\n") + b"\n"
        return data + xxhash.xxh3_64_hexdigest(data).encode() + b"\n"

    file.write_bytes(hostile_json_file(text, given.chance, seal))
    given.ask_all()
    given.write_on()
