# SPDX-License-Identifier: Apache-2.0
"""No call depends on the state of the process around it: default device and dtype, inference mode, autocast,
deterministic algorithms, locale and encodings. One call of every public function under each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import flashinfer
from flashinfer import sampling
from tests.kit import finish, spawn
from tests.public_calls import ALIASES, CALLS, Inputs, forget_prepared_launches, public_names, tensors

# --------------------------------------------------------------------------------------------------------- torch's own


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Which fills new memory with NaN, and refuses what it cannot do."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


AMBIENTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default device meta": lambda: default_device("meta"),
    "default device cpu": lambda: default_device("cpu"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast cpu": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic algorithms": deterministic_algorithms,
}
OF_A_GPU: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default device cuda": lambda: default_device("cuda"),
    "autocast cuda": lambda: torch.autocast("cuda", torch.float16),
}


def test_every_public_function_is_called() -> None:
    assert public_names() - ALIASES <= set(CALLS)


def assert_same_under(ambient: AbstractContextManager[object], name: str, device: torch.device) -> None:
    """The same bits, on the same device: of the first call of its kind, and of the next one outside."""
    inputs = Inputs(device)
    call = CALLS[name]
    expected = tensors(call(inputs))
    forget_prepared_launches()
    with ambient:
        found = tensors(call(inputs))
    later = tensors(call(inputs))
    assert len(expected) == len(found) == len(later)
    for before, within, after in zip(expected, found, later):
        for result in (within, after):
            assert (result.dtype, result.device, result.shape) == (before.dtype, before.device, before.shape)
            assert torch.equal(bits(result), bits(before))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ambient", AMBIENTS)
def test_ambient_state(device: torch.device, ambient: str, name: str) -> None:
    assert_same_under(AMBIENTS[ambient](), name, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ambient", OF_A_GPU)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_ambient_state_of_a_gpu(kind: str, ambient: str, name: str) -> None:
    assert_same_under(OF_A_GPU[ambient](), name, torch.device(kind))


@pytest.mark.parametrize("ambient", AMBIENTS)
def test_the_generator_of_a_device(device: torch.device, ambient: str) -> None:
    """Without a seed, numbers come from the device's generator, of torch or of the caller's."""
    probs = torch.full((3, 5), 0.2, dtype=torch.float32, device=device)
    for generator in (None, torch.Generator(device=device)):

        def draw(generator: torch.Generator | None = generator) -> torch.Tensor:
            torch.manual_seed(0)
            if generator is not None:
                generator.manual_seed(0)
            result = sampling.sampling_from_probs(probs, generator=generator)
            assert isinstance(result, torch.Tensor)
            return result

        expected = draw()
        with AMBIENTS[ambient]():
            assert torch.equal(draw(), expected)


def test_wrappers_cross_inference_mode(device: torch.device) -> None:
    """Made in it, used outside, and the other way round."""
    inputs = Inputs(device)
    shapes = (4, 2, 64, 4)
    options = {"q_data_type": torch.bfloat16}

    def make() -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(inputs.workspace)
        wrapper.plan(*inputs.paged, *shapes, **options)
        return wrapper

    outside = make()
    expected = outside.run(inputs.q[:2], inputs.cache)
    with torch.inference_mode():
        within = make()
        assert torch.equal(outside.run(inputs.q[:2], inputs.cache), expected)
        outside.plan(*inputs.paged, *shapes, **options)
    within.plan(*inputs.paged, *shapes, **options)
    for wrapper in (outside, within):
        assert torch.equal(wrapper.run(inputs.q[:2], inputs.cache), expected)


# ------------------------------------------------------------------------------------------------ locale and encodings

ASCII = {
    "C locale": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    # Python otherwise takes the locale C for UTF-8.
    "C locale, taken at its word": {
        "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"
    },
}  # fmt: skip
COMPILE = """
    import sys, torch, flashinfer
    from flashinfer.families.norm import LAYERNORM
    from flashinfer.jit.source import render
    x, weight = torch.ones(2, 24), torch.ones(24)
    assert torch.allclose(flashinfer.rmsnorm(x, weight), x)
    # Headers that are not ASCII, digested for a target that this machine need not have.
    render(LAYERNORM.spec("sm_90a", dtype="fp32", weight_dtype="fp32", hidden_size=24, vec_size=4))
    print(sys.stdout.encoding)
"""


COMMANDS = (("doctor",), ("resolve", "--config", "smoke"), ("cache", "list"), ("misses", "report"), ("aot", "list"))
RUN_COMMANDS = f"""
    import sys
    from flashinfer.cli import main
    for command in {COMMANDS!r}:
        for file in (sys.stdout, sys.stderr):
            print("command:", *command, file=file, flush=True)
        try:
            main(list(command))
        except SystemExit as ending:
            print(ending.code, file=sys.stderr)
"""


@pytest.mark.parametrize("variables", ASCII)
def test_where_only_ascii_can_be_written(tmp_path: Path, variables: str) -> None:
    """Sources are read, kernels compiled, cached and found again, log lines written; then the commands."""
    settings = {"FLASHINFER_CACHE_DIR": tmp_path, **ASCII[variables]}
    out, err = finish(spawn(COMPILE, FLASHINFER_LOG_LEVEL="debug", **settings))
    assert "ascii" in out and "compiled rmsnorm" in err and "Error" not in err, err
    out, err = finish(spawn(COMPILE + RUN_COMMANDS, **settings))
    assert "ascii" in out and "from the JIT cache" in err
    assert "Traceback" not in err and "Error" not in err, err
    said = [text.split("command: ")[1:] for text in (out, err)]
    for command, of_out, of_err in zip(COMMANDS, *said, strict=True):
        assert of_out.partition("\n")[2] or of_err.partition("\n")[2], command
