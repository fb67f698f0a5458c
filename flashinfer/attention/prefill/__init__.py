# SPDX-License-Identifier: Apache-2.0
"""Many query tokens a request."""
