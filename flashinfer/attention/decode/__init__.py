# SPDX-License-Identifier: Apache-2.0
"""One query token a request."""
