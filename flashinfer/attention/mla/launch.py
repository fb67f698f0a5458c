# SPDX-License-Identifier: Apache-2.0
"""The kernel for a device, and a bound launch. Schedules are those of prefill."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Optional

import torch

from flashinfer import dtypes, target
from flashinfer.attention.mla import sm90
from flashinfer.attention.plan import BoundLaunch
from flashinfer.attention.prefill import launch as prefill
from flashinfer.attention.prefill.launch import PrefillKernel, Schedule
from flashinfer.families.attention import mla as families
from flashinfer.families.layout import fast_divisor
from flashinfer.jit import default_resolver


def load_kernel(
    device: torch.device,
    types: tuple[torch.dtype, torch.dtype],
    head_dims: tuple[int, int],
    short_queries: bool,
    page_size: int,
    mask: str,
    pdl: Optional[bool] = None,
) -> PrefillKernel:
    """types: of q and of the cache; head_dims: of ckv and kpe. Raises UnsupportedConfig where there is no kernel, or
    what `Resolver.load` does."""
    q_dtype = dtypes.short_name(types[0])
    kv_dtype = families.SCALED_ROWS if types[1] == torch.uint8 else dtypes.short_name(types[1])
    machine = target.of_device(device)
    request = functools.partial(
        families.mla,
        machine,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        head_dim_ckv=head_dims[0],
        head_dim_kpe=head_dims[1],
        page_size=page_size,
        mask=mask,
    )
    spec = request(short_queries=short_queries)
    if device.type == "cuda" and not default_resolver().holds(spec):
        default_resolver().expect([families.mla_plan(machine), request(short_queries=not short_queries)])
    kernel = prefill.load_spec(device, spec, pdl)
    return replace(kernel, num_blocks=min(kernel.num_blocks, families.MAX_BLOCKS))


def bind_launch(
    kernel: PrefillKernel,
    rows: dict[str, torch.Tensor],
    caches: dict[str, torch.Tensor],
    schedule: Optional[Schedule],
    options: dict[str, float],
    *,
    batch_size: int,
    page_size: int,
) -> BoundLaunch:
    """A launch with everything but the addresses laid out.

    rows: q_nope, q_pe and out, `[num_tokens, num_heads, head_dim]`; caches: ckv and kpe, `[num_pages, page_size,
    head_dim]`, or ckv alone, bytes of rows that hold both; options: sm_scale and v_scale.
    """
    kpe_offset = 0
    if "kpe" not in caches:
        kpe_offset = families.SCALED_KPE_OFFSET
        caches = {"ckv": caches["ckv"], "kpe": caches["ckv"][..., kpe_offset:].view(torch.bfloat16)}
    num_tokens, num_heads, _ = rows["q_nope"].shape
    values = {
        "kv.index.len": 0,
        **fast_divisor("kv.index.page_size", page_size),
        **_strides(rows, ("token", "head")),
        **_strides({f"kv.{name}": cache for name, cache in caches.items()}, ("page", "entry")),
        "batch_size": batch_size,
        "num_qo_heads": num_heads,
        "num_tokens": num_tokens,
        **options,
        **prefill.scratch(schedule),
    }
    launch: BoundLaunch
    if kernel.launcher.params is families.Sm90MlaParams:
        launch = sm90.bind_launch(kernel.launcher, kernel.num_blocks, values, page_size)
    else:
        launch = kernel.launcher.prepare((kernel.num_blocks or 1, 1, 1), values, varying=families.ADDRESSES)
    if kpe_offset == 0:
        return launch

    def launch_at(*addresses: int) -> None:
        launch(*addresses[:_KPE], addresses[_KPE] + kpe_offset, *addresses[_KPE + 1 :])

    return launch_at


_KPE = families.ADDRESSES.index("kv.kpe")


def _strides(tensors: dict[str, torch.Tensor], axes: tuple[str, ...]) -> dict[str, int]:
    return {f"{name}_{axis}_stride": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}
