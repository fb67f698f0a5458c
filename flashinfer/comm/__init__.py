"""No communication kernels; engines fall back to their own. The names that they import all the same are in mnnvl.py."""
