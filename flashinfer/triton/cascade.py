# SPDX-License-Identifier: Apache-2.0
"""`flashinfer.cascade`'s merging of attention states, under the other path that upstream has for it."""

from __future__ import annotations

from flashinfer.cascade import merge_state, merge_state_in_place, merge_states, variable_length_merge_states

__all__ = ["merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states"]
