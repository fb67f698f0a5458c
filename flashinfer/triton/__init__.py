# SPDX-License-Identifier: Apache-2.0
"""Upstream's place for kernels in Triton. Of its names those of cascade attention are here, with the kernels of
`flashinfer.cascade`; nothing uses Triton."""
