# SPDX-License-Identifier: Apache-2.0
"""What to precompile: TOML files that name models and single kernels, and miss records.

    [defaults]                     # optional; any key of a model but its name and shape
    dtypes = ["bf16", "fp16"]

    [[model]]                      # expanded by models.py
    name = "Llama-3.1-8B"
    hidden_size = 4096
    …

    [[kernel]]                     # one kernel, as `flashinfer misses report --format toml` prints it
    family = "rmsnorm"
    dtype = "bf16"
    …

A kernel of attention may have variant = "module:function", of a function of scores, of a mask, or one of each with a
comma between them (flashinfer/variants.py); records and reports hold their text instead.

A row says what to build, never for which machine: targets are named where the set is built.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from flashinfer import families, log
from flashinfer import target as targets
from flashinfer.aot import records
from flashinfer.aot.models import WINDOWED_LAYERS, Model, expand
from flashinfer.errors import FlashInferError, UnsupportedConfig
from flashinfer.families import activation
from flashinfer.jit import spec as specs
from flashinfer.jit.spec import KernelSpec

_SHAPE = ("name", "hidden_size", "num_qo_heads", "intermediate_sizes")
_ORDINARY = ("num_kv_heads", "head_dim")  # of rows without latent attention, and these of rows with it
_LATENT = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_OF_LATENT = ("q_lora_rank", "scaled_rows")  # and may be left out
_OF_ORDINARY = ("rotary_dim", "interleave", "windowed_layers", "soft_cap", "mixed_batches")  # and may be left out
_DTYPES = ("fp16", "bf16", "fp32")


class ConfigError(FlashInferError, ValueError):
    """A config file is wrong. The message starts with the file, the line and the row."""


@dataclass(frozen=True)
class KernelRow:
    """One kernel by family and arguments."""

    family: str
    args: dict[str, Any]
    kinds: tuple[str, ...] = ("cuda", "cpu")  # of targets it is wanted for

    def specs(self, target: str) -> Iterator[KernelSpec]:
        kind = targets.kind(target)
        family = specs.family(self.family)
        if kind in self.kinds and family.runs_on(target):
            yield family.spec(target, **self.args)


@dataclass(frozen=True)
class Row:
    content: Union[Model, KernelRow]
    where: str  # "core.toml:12: [[model]] row 3 (Llama-2-7B)"

    def specs(self, target: str) -> Iterator[KernelSpec]:
        yield from expand(self.content, target) if isinstance(self.content, Model) else self.content.specs(target)


def read_specs(
    configs: Sequence[Union[str, Path]], target_names: Sequence[str], misses: Sequence[Union[str, Path]] = ()
) -> list[KernelSpec]:
    """Every kernel that the configs and miss records ask for on the targets, each once, in the order of the files.

    A file that asks for nothing on these targets is warned of, and so is a target that nothing is asked for on.

    Args:
        configs: paths, or names of the files this library brings (`"core"`, `"smoke"`).
        target_names: e.g. `["sm_80", "sm_90a", "x86-64-v3"]`.
        misses: records of `flashinfer misses`, files or folders, compacted or not. A record of a GPU is wanted for
            every CUDA target, one of a CPU for every CPU target; records this version has no kernel for are skipped
            with a warning.

    Raises:
        ConfigError: a file is missing or wrong, in which case the message names file, line and row; or no kernel is
            asked for at all.
        UnsupportedConfig: a target is unknown.
    """
    for target in target_names:
        targets.kind(target)
    families.register_all()
    found: dict[KernelSpec, None] = {}
    silent = []  # what asks for nothing here, and why
    for config in configs:
        path = find_config(config)
        asked = _asked_by_config(path, target_names)
        found.update(asked)
        if not asked:
            silent.append(f"{path} has no row for {', '.join(target_names)}")
    for path in map(Path, misses):
        asked, of = _asked_by_misses(path, target_names)
        found.update(asked)
        if not asked:
            records = f"records of {', '.join(sorted(of))} alone" if of else "no usable record"
            silent.append(f"{path} holds {records}")
    if not found:
        raise ConfigError(
            f"no kernel is asked for on {', '.join(target_names)}: {'; '.join(silent) or 'no file is named'}"
        )
    for why in silent:
        log.warn_once(f"{why}: nothing of it is built for {', '.join(target_names)}")
    for target in target_names:
        if not any(spec.target == target for spec in found):
            log.warn_once(f"nothing is asked for on {target}")
    return list(found)


def _asked_by_config(path: Path, target_names: Sequence[str]) -> dict[KernelSpec, None]:
    found: dict[KernelSpec, None] = {}
    for row in read_config(path):
        try:
            found.update(dict.fromkeys(_legal_specs(row, target_names)))
        except UnsupportedConfig as error:
            raise ConfigError(f"{row.where}: {error}") from None
    return found


def _asked_by_misses(path: Path, target_names: Sequence[str]) -> tuple[dict[KernelSpec, None], set[str]]:
    """The kernels, and the targets that the records are of."""
    found: dict[KernelSpec, None] = {}
    recorded = set()
    for row, target in _read_misses(path):
        try:
            found.update(dict.fromkeys(_legal_specs(row, target_names)))
            recorded.add(target)
        except UnsupportedConfig as error:
            log.warn_once(f"{row.where} is skipped: {error}")
    return found, recorded


def _legal_specs(row: Row, target_names: Sequence[str]) -> list[KernelSpec]:
    """The kernels of a row. One that some targets cannot have (too little shared memory, say) is left out there with a
    warning; raises UnsupportedConfig for one that none can have."""
    legal: list[KernelSpec] = []
    refused: dict[str, tuple[str, str]] = {}  # name -> target, why
    for target in target_names:
        for spec in row.specs(target):
            try:
                specs.family(spec.family).config(spec)
                legal.append(spec)
            except UnsupportedConfig as error:
                refused[spec.name] = target, str(error)
    for name, (target, why) in refused.items():
        if not any(spec.name == name for spec in legal):
            raise UnsupportedConfig(why)
        log.warn_once(f"{row.where}: left out for {target}: {why}")
    return legal


def why_unbuildable(text: str) -> Optional[str]:
    """What is wrong with the text of a config, or which kernel of it no GPU can have; None when it builds."""
    families.register_all()
    try:
        for row in _rows(Path("this row"), text):
            _legal_specs(row, ["sm_80", "sm_90a"])
    except (ConfigError, UnsupportedConfig) as error:
        return str(error)
    return None


def find_config(name: Union[str, Path]) -> Path:
    """The path itself when it is one, else the config of that name this library brings. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).resolve().parent.parent
    inside = package / "aot_configs"  # beside the package in a source tree, like csrc/
    brought = sorted((inside if inside.is_dir() else package.parent / "aot_configs").glob("*.toml"))
    for candidate in brought:
        if candidate.stem == str(name):
            return candidate
    raise ConfigError(f"{name}: no such config; expected a file, or one of {', '.join(file.stem for file in brought)}")


def read_config(path: Path) -> list[Row]:
    """The rows of one config file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return _rows(path, text)


def _rows(path: Path, text: str) -> list[Row]:
    try:
        data = _parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    unknown = data.keys() - {"defaults", "model", "kernel"}
    if unknown:
        expected = "expected [defaults], [[model]] and [[kernel]]"
        raise ConfigError(f"{path}: unknown table {', '.join(sorted(unknown))}; {expected}")
    defaults = _checked(f"{path}: [defaults]", data.get("defaults", {}), legal=_DEFAULTS)
    rows = []
    for where, table in _tables(path, text, data, "model"):
        rows.append(Row(_model(where, {**defaults, **_checked(where, table, legal=_MODEL_KEYS)}), where))
    for where, table in _tables(path, text, data, "kernel"):
        rows.append(Row(_kernel(where, table), where))
    return rows


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    data: dict[str, Any] = tomllib.loads(text)
    return data


def _tables(path: Path, text: str, data: dict[str, Any], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one kind, each with its place in the file for messages."""
    tables = data.get(kind, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: {kind} is not a list of tables; write [[{kind}]] above each row")
    header = re.compile(rf"\s*\[\[\s*{kind}\s*\]\]")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if header.match(line)]
    for number, table in enumerate(tables):
        line = f"{lines[number]}:" if len(lines) == len(tables) else ""
        name = table.get("name" if kind == "model" else "family", "?")
        yield f"{path}:{line} [[{kind}]] row {number + 1} ({name})", table


# ---------------------------------------------------------------------------------------------------------------- rows

_TYPES: dict[str, Any] = typing.get_type_hints(Model)
_MODEL_KEYS = frozenset(field.name for field in dataclasses.fields(Model))
_DEFAULTS = _MODEL_KEYS - {*_SHAPE, *_ORDINARY, *_OF_ORDINARY, *_LATENT, *_OF_LATENT}


def _model(where: str, table: dict[str, Any]) -> Model:
    is_latent = "kv_lora_rank" in table
    missing = [key for key in (*_SHAPE, *(_LATENT if is_latent else _ORDINARY)) if key not in table]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} is missing")
    strange = [key for key in (_ORDINARY if is_latent else (*_LATENT, *_OF_LATENT)) if key in table]
    if strange:
        kind = "with" if is_latent else "without"
        raise ConfigError(f"{where}: {', '.join(strange)} is given; a model {kind} kv_lora_rank has none")
    if is_latent:
        table = {**table, "num_kv_heads": 1, "head_dim": table["qk_nope_head_dim"] + table["qk_rope_head_dim"]}
    model = Model(**table)
    for key, value, legal in (
        ("activation", model.activation, activation.GATES),
        ("windowed_layers", model.windowed_layers, WINDOWED_LAYERS),
    ):
        if value not in legal:
            raise ConfigError(f"{where}: {key} is {value!r}; expected {', '.join(legal)}")
    if model.rotary_dim > model.head_dim:
        raise ConfigError(f"{where}: rotary_dim is {model.rotary_dim}; expected at most head_dim {model.head_dim}")
    unused = [key for key in _OF_ORDINARY if is_latent and key in table]
    if unused:
        raise ConfigError(f"{where}: {', '.join(unused)} is given; a model with kv_lora_rank has none")
    if model.num_qo_heads % model.num_kv_heads:
        raise ConfigError(
            f"{where}: num_qo_heads is {model.num_qo_heads}; expected a multiple of num_kv_heads {model.num_kv_heads}"
        )
    for degree in model.tensor_parallel:
        for key, sizes in (("num_qo_heads", (model.num_qo_heads,)), ("intermediate_sizes", model.intermediate_sizes)):
            if any(size % degree for size in sizes):
                raise ConfigError(f"{where}: {key} {list(sizes)} is not divisible by tensor_parallel {degree}")
    return model


def _kernel(where: str, table: dict[str, Any]) -> KernelRow:
    args = dict(table)
    family = args.pop("family", None)
    if not isinstance(family, str):
        raise ConfigError(f'{where}: family is missing; expected for example family = "rmsnorm"')
    try:
        specs.family(family)
    except UnsupportedConfig as error:
        raise ConfigError(f"{where}: {error}") from None
    if isinstance(args.get("variant"), str) and _NAMES.fullmatch(args["variant"]):
        args["variant"] = _text_of_functions(where, args["variant"])
    return KernelRow(family, args)


_NAMES = re.compile(r"\s*[\w.]+:[\w.]+\s*(,\s*[\w.]+:[\w.]+\s*)?")


def _text_of_functions(where: str, names: str) -> str:
    """Of functions of scores and masks, by "module:function". Raises ConfigError."""
    try:
        from flashinfer.variants import text_of
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: variant names {names}, and {error.name} is not installed, which functions take. Next step: name "
            "them by their text, which `flashinfer variants show` prints"
        ) from None
    try:
        return text_of(names.split(","))
    except UnsupportedConfig as error:
        raise ConfigError(f"{where}: {error}") from None


def _checked(where: str, table: dict[str, Any], legal: Iterable[str]) -> dict[str, Any]:
    """The values of a table in the types of Model. Raises ConfigError naming the key."""
    legal = set(legal)
    values = {}
    for key, value in table.items():
        if key not in legal:
            raise ConfigError(f"{where}: unknown key {key!r}; expected one of {', '.join(sorted(legal))}")
        values[key] = _typed(f"{where}: {key}", value, _TYPES[key])
        if key.endswith("dtypes") and (wrong := set(values[key]) - set(_DTYPES)):
            raise ConfigError(f"{where}: {key} has {', '.join(wrong)}; expected {', '.join(_DTYPES)}")
    return values


def _typed(what: str, value: Any, expected: Any) -> Any:
    if typing.get_origin(expected) is tuple:
        element = typing.get_args(expected)[0]
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{what} is {value!r}; expected a list of {element.__name__}")
        return tuple(_typed(what, item, element) for item in value)
    if type(value) is not expected:  # bool is an int to isinstance
        raise ConfigError(f"{what} is {value!r}; expected {expected.__name__}")
    if expected is int and value <= 0:
        raise ConfigError(f"{what} is {value}; expected a positive number")
    return value


# ------------------------------------------------------------------------------------------------------------- misses


def _read_misses(path: Path) -> Iterator[tuple[Row, str]]:
    """A row for each record of a file or folder, and the target it is of."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder of miss records")
    seen = set()  # a fleet has few kernels and many records
    for file in records.files(path):
        for number, data in enumerate(records.lines(file), 1):
            where = f"{file}:{number}"
            try:
                spec = data["spec"]
                family, target = spec["family"], spec["target"]
                if not isinstance(family, str):
                    raise TypeError
                row = KernelRow(family, dict(spec["args"]), (targets.kind(target),))
            except (ValueError, KeyError, TypeError):
                log.warn_once(f"{where} is not a miss record and is skipped")
                continue
            kernel = repr(spec)
            if kernel not in seen:
                seen.add(kernel)
                yield Row(row, where), target
