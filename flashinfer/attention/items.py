# SPDX-License-Identifier: Apache-2.0
"""Multi-item scoring: the items of a request follow its prefix, each after a delimiter, and do not see each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks, indices
from flashinfer.host.uploads import upload

_ARGUMENTS = ("prefix_len_ptr", "token_pos_in_items_ptr", "token_pos_in_items_len", "max_item_len_ptr")
_INTEGERS = (torch.uint16, torch.int16, torch.int32, torch.uint32, torch.int64, torch.uint8)
_MAX_PREFIX = 1 << 30


@dataclass(frozen=True)
class Items:
    """As plan() was given them."""

    prefix_lens: torch.Tensor  # [batch_size]
    places: torch.Tensor  # of tokens behind the prefix, each request from a multiple of `places_len` on
    places_len: int

    def take(
        self, op: str, device: torch.device, batch_size: int, kv_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What kernels read: uint16 places, and int32 `[batch_size, 3]`, ItemsOfRequest of visibility.cuh. Places that
        are on the device and of 16 bits are used in place. Nothing waits for the device."""
        places_len = self.places_len or (self.places.numel() if batch_size == 1 else 0)
        checks.require(
            self.prefix_lens.shape == (batch_size,), op,
            f"prefix_len_ptr has shape {list(self.prefix_lens.shape)}; expected [{batch_size}], one for each request",
        )  # fmt: skip
        checks.require(
            self.places.numel() >= batch_size * places_len and (places_len > 0 or batch_size == 0), op,
            f"token_pos_in_items_ptr holds {self.places.numel()} positions; expected {batch_size} requests times "
            f"token_pos_in_items_len, {self.places_len}, padded with zeros",
        )  # fmt: skip
        if indices.are_visible(self.prefix_lens, kv_lens):
            longest = max((kv_lens.long() - self.prefix_lens.long().to(kv_lens.device)).tolist(), default=0)
            checks.require(
                longest <= places_len, op,
                f"token_pos_in_items_len is {places_len}; expected {longest} or more, the longest kv_len but for its "
                "prefix",
            )  # fmt: skip
        places = upload(self.places, device).reshape(-1)
        if places.dtype not in (torch.uint16, torch.int16):
            places = places.to(torch.int16)
        prefix_lens = upload(self.prefix_lens, device).long().clamp(0, _MAX_PREFIX)
        begins = torch.arange(batch_size, device=device) * places_len
        table = torch.stack([prefix_lens, begins, torch.full_like(begins, places_len)], dim=1).int()
        places = places.contiguous()
        if places.is_cpu:
            places = places.clone()  # the caller may go on to change them
        return places, table


def items_of(op: str, later: dict[str, Any], is_masked: bool, is_captured: bool) -> Optional[Items]:
    """The items among arguments of plan() that later releases added, which are left without them; None without items.

    Raises TypeError, ValueError or UnsupportedConfig.
    """
    if later.get("prefix_len_ptr") is None and later.get("token_pos_in_items_ptr") is None:
        return None
    prefix_lens, places, places_len, _ = (later.pop(name, None) for name in _ARGUMENTS)
    for name, tensor in (("prefix_len_ptr", prefix_lens), ("token_pos_in_items_ptr", places)):
        checks.require_addresses(op, **{name: tensor})
        checks.require(
            tensor.dtype in _INTEGERS, op, f"{name} is {tensor.dtype}; expected integers, as prefix_len_ptr of uint32 "
            "and token_pos_in_items_ptr of uint16 are",
        )  # fmt: skip
    if is_captured:
        raise UnsupportedConfig(
            f"{op}: prefix_len_ptr asks for multi-item scoring, which has no buffers under use_cuda_graph. Next step: "
            "a wrapper without it"
        )
    checks.require(not is_masked, op, "prefix_len_ptr says what is visible, and so does custom_mask; expected one")
    length = 0 if places_len is None else checks.integer(op, "token_pos_in_items_len", places_len, 0)
    return Items(prefix_lens, places, length)
