# SPDX-License-Identifier: Apache-2.0
"""What TVM's compiler asks `flashinfer.jit` for: modules to link into a model. There is nothing to link here; a model
then finds the functions among the global ones, which `flashinfer_tvm.register` makes them in the process that runs it.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi

from flashinfer.errors import UnsupportedConfig
from flashinfer_tvm import FUNCTIONS

_SCALARS = ("sm_scale", "rope_rcp_scale", "rope_rcp_theta")


class Module(dict[str, Any]):
    """Functions of the FFI by name, as a loaded module has them."""


class JitSpec:
    """Stands for upstream's, as far as TVM's compiler knows it."""

    sources: tuple[Any, ...] = ()  # which TVM rewrites

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def build(self, verbose: bool = False) -> None:
        """Nothing: kernels are compiled when they are first asked for."""

    def get_object_paths(self) -> list[Any]:
        """None to link."""
        return []

    def build_and_load(self) -> Module:
        """The functions themselves."""
        names = [name for name in FUNCTIONS if name.startswith(self._prefix)]
        return Module({name: tvm_ffi.convert(FUNCTIONS[name]) for name in names})


def _attention(
    prefix: str,
    *,
    pos_encoding_mode: int = 0,
    additional_tensor_names: Any = (),
    additional_scalar_names: Any = _SCALARS,
    variant_name: str = "",
    **others: Any,
) -> JitSpec:
    op = f"gen_customize_{prefix}_module"
    if pos_encoding_mode != 0:
        raise UnsupportedConfig(
            f"{op}: pos_encoding_mode is {pos_encoding_mode}; expected 0: TVM does not say at which positions to "
            "rotate. Next step: RopeMode.NORMAL"
        )
    is_plain = variant_name.replace(" ", "").startswith("DefaultAttention<false,false,false,false")
    if not is_plain or list(additional_tensor_names) or tuple(additional_scalar_names) != _SCALARS:
        raise UnsupportedConfig(
            f"{op}: the variant is {variant_name!r:.80} with tensors {list(additional_tensor_names)} and scalars "
            f"{list(additional_scalar_names)}; expected DefaultAttention as TVM asks for it: upstream's C++ does not "
            "compile against these kernels. Next step: docs/variants.md"
        )
    return JitSpec(prefix)


def gen_customize_batch_prefill_module(*arguments: Any, **options: Any) -> JitSpec:
    """`batch_prefill_plan`, `batch_prefill_paged_run` and `batch_prefill_ragged_run`, for TVM's compiler."""
    return _attention("batch_prefill", **options)


def gen_customize_batch_decode_module(*arguments: Any, **options: Any) -> JitSpec:
    """`batch_decode_plan` and `batch_decode_run`, for TVM's compiler."""
    return _attention("batch_decode", **options)


def gen_batch_mla_module(*arguments: Any, **options: Any) -> JitSpec:
    """`batch_mla_plan` and `batch_mla_run`, for TVM's compiler."""
    return JitSpec("batch_mla")
