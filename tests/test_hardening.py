"""How the extension and its library are linked: what an attacker who found a bug would not find."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from qaa import _core

PT_DYNAMIC, PT_GNU_STACK, PT_GNU_RELRO = 2, 0x6474E551, 0x6474E552
DT_TEXTREL, DT_FLAGS, DT_FLAGS_1 = 22, 30, 0x6FFFFFFB
DF_TEXTREL, DF_BIND_NOW, DF_1_NOW, PF_X = 4, 8, 1, 1


FOLDER = Path(_core.__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
@pytest.mark.parametrize("path", [Path(_core.__file__), FOLDER / "lib" / "libqaa.so"], ids=lambda path: path.name)
def test_the_extension_is_hardened(path: Path) -> None:
    """Tables of functions are read-only once it is loaded, the stack is not executable and has canaries."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02" and data[5] == 1  # 64 bits, little-endian
    (table,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    flags = {kind: flag for kind, flag, *_ in headers}
    assert PT_GNU_RELRO in flags
    assert not flags[PT_GNU_STACK] & PF_X
    (start, length), *_ = [(offset, bytes_) for kind, _, offset, _, _, bytes_ in headers if kind == PT_DYNAMIC]
    dynamic = dict(struct.iter_unpack("<QQ", data[start : start + length]))
    assert dynamic.get(DT_FLAGS, 0) & DF_BIND_NOW or dynamic.get(DT_FLAGS_1, 0) & DF_1_NOW
    assert DT_TEXTREL not in dynamic and not dynamic.get(DT_FLAGS, 0) & DF_TEXTREL
    assert b"\0__stack_chk_fail\0" in data
