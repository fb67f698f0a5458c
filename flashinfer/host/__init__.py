# SPDX-License-Identifier: Apache-2.0
"""What every operator needs on the host. Knows torch and the loader, no operator."""
