"""From a model's public shape to the kernels that serve it: the one place that knows which those are.

An expansion is a generator `(model, dtype, target) -> specs`; `EXPANSIONS` lists them. To make the core set cover a new
family, write one and add it to the list. What two models share comes out equal and is built once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flashinfer import target as targets
from flashinfer.jit.spec import KernelSpec
from flashinfer.kernels import activation, attention, norm


@dataclass(frozen=True)
class Model:
    """A transformer as its published config.json describes it."""

    name: str
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_sizes: tuple[int, ...]  # of each gated MLP: dense, expert, shared expert
    qk_norm: bool = False  # RMSNorm over the head_dim of queries and keys
    tensor_parallel: tuple[int, ...] = (1,)  # degrees to serve; heads and intermediate sizes are divided by them
    dtypes: tuple[str, ...] = ("bf16", "fp16")  # on CUDA targets
    cpu_dtypes: tuple[str, ...] = ("fp32", "bf16")

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Query heads per KV head on one rank, at each degree; KV heads are replicated when ranks outnumber them."""
        heads = [(self.num_qo_heads // degree, max(1, self.num_kv_heads // degree)) for degree in self.tensor_parallel]
        return tuple(dict.fromkeys(num_qo // num_kv for num_qo, num_kv in heads))


def expand(model: Model, target: str) -> Iterator[KernelSpec]:
    """The kernels that serve a model on a target; the same spec may come more than once."""
    for dtype in model.dtypes if targets.kind(target) == "cuda" else model.cpu_dtypes:
        for expansion in EXPANSIONS:
            yield from expansion(model, dtype, target)


def _norms(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    def rmsnorm(hidden_size: int, add_residual: bool) -> KernelSpec:
        return norm.RMSNORM.spec(
            target,
            dtype=dtype,
            hidden_size=hidden_size,
            vec_size=norm.vec_size(dtype, hidden_size),
            add_residual=add_residual,
            gemma=False,
        )

    yield rmsnorm(model.hidden_size, add_residual=False)
    yield rmsnorm(model.hidden_size, add_residual=True)
    if model.qk_norm:
        yield rmsnorm(model.head_dim, add_residual=False)


def _activations(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    for degree in model.tensor_parallel:
        for size in model.intermediate_sizes:
            vec_size = norm.vec_size(dtype, size // degree)
            yield activation.ACT_AND_MUL.spec(target, dtype=dtype, gate="silu", vec_size=vec_size)


def _decode(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    is_cuda = targets.kind(target) == "cuda"
    for kv_dtype in (dtype, "fp8_e4m3") if is_cuda else (dtype,):
        for group_size in model.group_sizes:
            for kv_storage in ("paged", "single"):
                yield attention.decode(
                    target,
                    q_dtype=dtype,
                    kv_dtype=kv_dtype,
                    head_dim=model.head_dim,
                    group_size=group_size,
                    kv_storage=kv_storage,
                )
    if is_cuda:
        yield attention.DECODE_PLAN.spec(target)


EXPANSIONS: tuple[Callable[[Model, str, str], Iterator[KernelSpec]], ...] = (_norms, _activations, _decode)
