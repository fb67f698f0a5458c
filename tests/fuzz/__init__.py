# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of the public functions: legal and illegal calls on the CPU target, each judged by an FP64 oracle.

    python -m tests.fuzz --minutes 5                     # a campaign; ends with a table of findings
    python -m tests.fuzz --seed 1017 --only rmsnorm      # one case, told in full

A case is drawn from its name and its seed alone. It is one call, or a sequence of calls on one wrapper; each is either
legal, and must return what the oracle says, or differs from a legal one in one or two drawn ways, and must return what
the oracle says of the arguments as they then are or raise an exception that is meant for callers. Tensors lie in
fenced, poisoned memory (memory.py), and cases run in child processes (runner.py), so that a crash or a hang is a
finding like any other.

`table` holds one generator per public function: the arguments of a legal call, and its oracle.
"""
