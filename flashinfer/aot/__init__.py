"""Building, packaging and checking sets of precompiled kernels. Needs no GPU and no torch.

models.py  model -> kernels it needs     config.py  TOML files and miss records -> specs
build.py   specs -> folder + registry    worker.py  one compile process
verify.py  registry -> problems          elf.py     what a cubin or shared library says about itself
"""
