# SPDX-License-Identifier: Apache-2.0
"""Random numbers of the operators of sampling: where the Philox words of a launch begin.

They come from `seed` and `offset` if one of these is given, else from the generator, else from PyTorch's own of that
device. Whatever is a tensor on the device stays there: the kernel reads it.
"""

from __future__ import annotations

from typing import Optional, Union

import torch

from flashinfer.host import checks, memo, traced

Seed = Union[int, torch.Tensor, None]

# What a launch takes: addresses of seeds and of offsets, 0 for none; the numbers that hold where there is none.
State = tuple[int, int, int, int]
FIELDS = ("random.seeds", "random.offsets", "random.seed", "random.offset")
# Of the tensors at those addresses. A prepared launch reads an entry for each row, or one for all.
Signature = tuple[object, object]

_LARGEST = (1 << 64) - 1
_WORDS = (torch.int64, getattr(torch, "uint64", torch.int64))  # what a kernel reads
_new_word = memo.allocator((), torch.int64, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------ seed and offset


def given(op: str, seed: Seed, offset: Seed) -> tuple[State, Signature]:
    seeds, seed_value, seeds_like = _word(op, "seed", seed, -(1 << 63))
    offsets, offset_value, offsets_like = _word(op, "offset", offset, 0)
    return (seeds, offsets, seed_value, offset_value), (seeds_like, offsets_like)


def _word(op: str, name: str, value: Seed, low: int) -> tuple[int, int, object]:
    if value.__class__ is int and 0 <= value <= _LARGEST:
        return 0, value, None
    if value is None:
        return 0, 0, None
    if isinstance(value, torch.Tensor):
        return value.data_ptr() or checks.no_address(op, name, value), 0, memo.signature(value)
    return 0, checks.integer(op, name, value, low, _LARGEST) & _LARGEST, None


def _split_seed(seed: Seed) -> tuple[Optional[torch.Tensor], Optional[int]]:
    if isinstance(seed, torch.Tensor) or seed is None:
        return seed, None
    return None, seed - (1 << 64) if 1 << 63 <= seed <= _LARGEST else seed  # an operator's integers have a sign


# A seed as arguments of an operator.
SEED = traced.INTEGER._replace(split=_split_seed)


def readable(op: str, seed: Seed, offset: Seed, num_rows: int, input: torch.Tensor) -> tuple[Seed, Seed]:
    """The two as a kernel can read them; the same objects if they are so already."""
    return _readable(op, "seed", seed, num_rows, input), _readable(op, "offset", offset, num_rows, input)


def _readable(op: str, name: str, value: Seed, num_rows: int, input: torch.Tensor) -> Seed:
    if not isinstance(value, torch.Tensor):
        return value
    checks.require(
        not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool),
        op,
        f"{name} is a tensor of {value.dtype}; expected an integer type",
    )
    checks.require(
        value.numel() == 1 or value.shape == (num_rows,),
        op,
        f"{name} is a tensor {list(value.shape)}; expected one number, or [{num_rows}], one for each output row",
    )
    if value.is_cpu and not input.is_cpu and value.numel() == 1:
        return int(value)  # on the host already: looking at it waits for nothing
    checks.require_device(op, name, value, input)
    return (value if value.dtype in _WORDS else value.to(torch.int64)).contiguous()


def per_row(seed: Seed, offset: Seed) -> dict[str, bool]:
    """Of what a launch takes: whether the tensors have an entry for each row."""
    given = {"seeds_per_row": seed, "offsets_per_row": offset}
    return {name: isinstance(value, torch.Tensor) and value.numel() != 1 for name, value in given.items()}


# ----------------------------------------------------------------------------------------------------------- generators


def drawn(
    op: str, input: torch.Tensor, generator: Optional[torch.Generator], num_words: int
) -> tuple[State, Optional[torch.Tensor]]:
    """A state from a generator, which moves on by `num_words` words; and the tensor in which it lies, if it does."""
    if generator is not None:
        _check_generator(op, generator, input)
    if not input.is_cuda:
        return (0, 0, int(_new_word().random_(generator=generator).item()), 0), None
    if generator is None:
        generator = torch.cuda.default_generators[input.get_device()]
    try:
        position = generator.get_offset()
    except RuntimeError:  # refused while the stream is captured; asking first would cost each call as much
        if not memo.is_capturing(input):
            raise
        # The generator's state lives on the device while a graph is captured: draw ours there, once a replay.
        words = torch.empty(2, dtype=torch.int64, device=input.device).random_(generator=generator)
        return (words.data_ptr(), words.data_ptr() + 8, 0, 0), words
    generator.set_offset(position + num_words)
    return (0, 0, generator.initial_seed(), position), None


def _check_generator(op: str, generator: torch.Generator, input: torch.Tensor) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator is {generator!r:.60}; expected a torch.Generator or None")
    device = generator.device
    checks.require(
        device == input.device or (device.index is None and device.type == input.device.type),
        op,
        f"generator is on {device}, the input on {input.device}; make one for that device",
    )


# A graph of torch.compile holds plain values. So it names a generator by a number, and the operator finds it again when
# the graph runs, eager code to the last. Held for good, as is the code that names them: a number never means another.
_named: dict[int, torch.Generator] = {}


def _name(generator: torch.Generator) -> int:
    _named[id(generator)] = generator
    return id(generator)


# As torch.compiler.assume_constant_result does, which would import all of dynamo for it: this function runs while a
# call is traced, and its result becomes a constant, guarded by the identity of the generator.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


TRACES_GENERATORS = torch.__version__ >= "2.13"  # earlier ones know a generator as no constant


def _traced_name(generator: Optional[torch.Generator]) -> tuple[Optional[int]]:
    if generator is None:
        return (None,)
    if not TRACES_GENERATORS:
        raise ValueError("torch.compile traces a generator from torch 2.13 on; leave it out, or pass seed and offset")
    return (_name(generator),)


GENERATOR = traced.Bundle(
    ("int? {}",),
    _traced_name,
    lambda name: None if name is None else _named[name],
)
