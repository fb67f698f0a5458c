# SPDX-License-Identifier: Apache-2.0
"""Building, packaging and checking sets of precompiled kernels. Needs no GPU and no torch.

models.py  model -> kernels it needs     config.py      TOML files and miss records -> specs
build.py   specs -> a set of them        kernel_set.py  the folder of a set, and how it changes without losing anything
worker.py  one compile process           verify.py      registry -> problems
elf.py     what a cubin or shared library says about itself
estimate.py  seconds and bytes beforehand; shards   merge.py  sets of several machines -> one
hf.py      a model's config.json -> a [[model]] row
tools.py   what compiling takes, and what of it is missing here
"""
