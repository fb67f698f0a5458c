# SPDX-License-Identifier: Apache-2.0
"""What machine code says about itself: the ELF headers, notes and symbols of a cubin or a CPU library.

Layouts: the System V ABI (gabi) for ELF64, the x86-64 psABI for GNU properties. NVIDIA's own were read off cubins of
CUDA 12.9 and 13.0: machine 190; a version in byte 8; in e_flags the SM number and, from CUDA 12, a bit for code that is
architecture-specific; from CUDA 13, a note `tkinfo` with the arguments of ptxas.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional

_MACHINES = {62: "x86-64", 183: "arm64", 190: "cuda"}
_SHT_SYMTAB, _SHT_NOTE, _SHT_DYNSYM = 2, 7, 11
_STT_FUNC = 2
_NT_GNU_PROPERTY_TYPE_0, _X86_ISA_1_NEEDED = 5, 0xC0008002
_X86_LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")  # bits 0 to 3 of X86_ISA_1_NEEDED


@dataclass(frozen=True)
class MachineCode:
    """What could be read; None where the file does not say."""

    machine: str  # "cuda", "x86-64", "arm64" or "machine <number>"
    capability: Optional[tuple[int, int]]  # of a cubin
    target: Optional[str]  # "sm_90a", or the CPU level the linker noted
    functions: frozenset[str]  # defined and visible


class _Section(NamedTuple):
    name_offset: int
    type: int
    offset: int
    size: int
    link: int


def inspect(content: bytes) -> MachineCode:
    """Read an ELF file. Raises ValueError when it is not a whole 64-bit little-endian ELF file."""
    if content[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        machine, flags = struct.unpack_from("<H", content, 18)[0], struct.unpack_from("<I", content, 48)[0]
        sections = list(_sections(content))
        if any(section.offset + section.size > len(content) for section in sections):
            raise ValueError("the ELF file is cut short")
        notes = list(_notes(content, sections))
        functions = frozenset(_functions(content, sections))
    except struct.error:
        raise ValueError("the ELF file is cut short") from None
    if _MACHINES.get(machine) != "cuda":
        return MachineCode(_MACHINES.get(machine, f"machine {machine}"), None, _x86_level(notes), functions)
    number, target = _cuda_target(content[8], flags, _ptxas_arch(notes))
    return MachineCode("cuda", (number // 10, number % 10), target, functions)


def _cuda_target(version: int, flags: int, noted: Optional[str]) -> tuple[int, Optional[str]]:
    """SM number, and the whole target if it can be told."""
    if version < 8:
        number = flags & 0xFF
        return number, f"sm_{number}{'a' if flags & 0x800 else ''}"
    number = flags >> 8 & 0xFF
    return number, noted or (f"sm_{number}a" if flags & 8 else None)


def _sections(content: bytes) -> Iterator[_Section]:
    table = struct.unpack_from("<Q", content, 40)[0]
    size, count = struct.unpack_from("<2H", content, 58)
    for index in range(count):
        name, type_, _, _, offset, length, link = struct.unpack_from("<2I4QI", content, table + index * size)
        if type_ not in (0, 8):  # SHT_NULL; SHT_NOBITS has no bytes in the file
            yield _Section(name, type_, offset, length, link)
        else:
            yield _Section(name, type_, 0, 0, link)


def _notes(content: bytes, sections: list[_Section]) -> Iterator[tuple[str, int, bytes]]:
    """(owner, type, description) of every note."""
    for section in sections:
        if section.type != _SHT_NOTE:
            continue
        position, end = section.offset, section.offset + section.size
        while position + 12 <= end:
            name_size, size, type_ = struct.unpack_from("<3I", content, position)
            owner = content[position + 12 : position + 12 + name_size].rstrip(b"\0").decode(errors="replace")
            start = position + 12 + name_size + -name_size % 4
            yield owner, type_, content[start : start + size]
            position = start + size + -size % 4


def _functions(content: bytes, sections: list[_Section]) -> Iterator[str]:
    for section in sections:
        if section.type not in (_SHT_SYMTAB, _SHT_DYNSYM):
            continue
        strings = sections[section.link]
        for offset in range(section.offset, section.offset + section.size, 24):
            name, info, _, index = struct.unpack_from("<IBBH", content, offset)
            if info & 15 == _STT_FUNC and info >> 4 and index:  # a function, not local, defined here
                start = strings.offset + name
                yield content[start : content.index(b"\0", start)].decode(errors="replace")


def _ptxas_arch(notes: list[tuple[str, int, bytes]]) -> Optional[str]:
    for owner, _, description in notes:
        match = owner.startswith("NVIDIA") and re.search(rb"-arch[= ](sm_\d+[af]?)\b", description)
        if match:
            return match[1].decode()
    return None


def _x86_level(notes: list[tuple[str, int, bytes]]) -> Optional[str]:
    """The level in the GNU property x86 ISA needed, which linkers write when asked to."""
    for owner, type_, description in notes:
        if owner != "GNU" or type_ != _NT_GNU_PROPERTY_TYPE_0:
            continue
        position = 0
        while position + 8 <= len(description):
            property_type, size = struct.unpack_from("<2I", description, position)
            if property_type == _X86_ISA_1_NEEDED and size >= 4:
                bits = struct.unpack_from("<I", description, position + 8)[0]
                return _X86_LEVELS[min(bits.bit_length(), 4) - 1] if bits else None
            position += 8 + size + -size % 8
    return None
