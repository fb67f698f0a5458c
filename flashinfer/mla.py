"""Multi-head latent attention: queries over a cache of latent rows. The code is in flashinfer/attention/."""

from __future__ import annotations

from flashinfer.attention.mla.paged import BatchMLAPagedAttentionWrapper

__all__ = ["BatchMLAPagedAttentionWrapper"]
