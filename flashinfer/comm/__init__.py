# SPDX-License-Identifier: Apache-2.0
"""No communication kernels; engines fall back to their own. The names that they import all the same are in mnnvl.py."""
