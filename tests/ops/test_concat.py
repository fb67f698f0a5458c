# SPDX-License-Identifier: Apache-2.0
"""Keys of latent attention from their parts, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashinfer.concat_ops import concat_mla_k
from flashinfer.errors import UnsupportedConfig

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def draw(device: torch.device, dtype: torch.dtype, *shape: int, pad: int = 0) -> torch.Tensor:
    """Rows of a wider tensor."""
    values = torch.randn(*shape[:-1], shape[-1] + pad, generator=torch.Generator().manual_seed(sum(shape)))
    return values.to(device, dtype)[..., : shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16, E4M3], ids=str)
@pytest.mark.parametrize(
    "tokens, heads, nope, rope, pad",
    [
        (5, 128, 128, 64, 0), (3, 16, 128, 64, 64), (7, 5, 128, 64, 16), (1, 1, 24, 8, 3), (33, 3, 192, 64, 0),
        (2, 2, 7, 5, 1),
    ],
    ids=str,
)  # fmt: skip
def test_against_cat(
    device: torch.device, dtype: torch.dtype, tokens: int, heads: int, nope: int, rope: int, pad: int
) -> None:
    k_nope, k_rope = draw(device, dtype, tokens, heads, nope, pad=pad), draw(device, dtype, tokens, 1, rope, pad=pad)
    whole = torch.full((tokens, heads, nope + rope + pad), 7.0, device=device).to(dtype)
    assert concat_mla_k(whole[..., : nope + rope], k_nope, k_rope) is None
    expected = torch.cat([k_nope.float(), k_rope.float().expand(-1, heads, -1)], dim=-1)
    assert torch.equal(whole[..., : nope + rope].float(), expected)
    assert (whole[..., nope + rope :].float() == 7.0).all()


def test_views_of_one_row(device: torch.device) -> None:
    """As DeepSeek's layers have them: k_nope beside the values of each head, k_rope behind the latent row."""
    projected, latent = draw(device, BF16, 9, 16, 256), draw(device, BF16, 9, 576)
    k = torch.empty(9, 16, 192, dtype=BF16, device=device)
    concat_mla_k(k, projected[..., :128], latent[:, None, 512:])
    assert torch.equal(k, torch.cat([projected[..., :128], latent[:, None, 512:].expand(-1, 16, -1)], dim=-1))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_nothing_to_do(device: torch.device, shape: tuple[int, int]) -> None:
    tokens, heads = shape
    parts = (torch.zeros(tokens, heads, 128, device=device), torch.zeros(tokens, 1, 64, device=device))
    concat_mla_k(torch.zeros(tokens, heads, 192, device=device), *parts)


def test_torch_compile(device: torch.device) -> None:
    k_nope, k_rope = draw(device, BF16, 5, 4, 128), draw(device, BF16, 5, 1, 64)

    def layer(k_nope: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        k = k_nope.new_empty(5, 4, 192)
        concat_mla_k(k, k_nope * 2, k_rope)
        return k + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k_nope, k_rope), layer(k_nope, k_rope))


def test_bad_arguments(device: torch.device) -> None:
    k, nope, rope = (
        torch.zeros(3, heads, dim, dtype=BF16, device=device) for heads, dim in ((4, 192), (4, 128), (1, 64))
    )
    cases: list[tuple[tuple[Any, Any, Any], type[Exception], str]] = [
        ((k, nope, rope[:, 0]), ValueError, r"k_rope has shape \[3, 64\]"),
        ((k, nope, rope.expand(3, 4, 64)), ValueError, r"k_rope has shape \[3, 4, 64\]; expected \[3, 1, 64\]"),
        ((k, nope, rope[:2]), ValueError, r"k_rope has shape"),
        ((k[..., :191], nope, rope), ValueError, r"k has shape \[3, 4, 191\]; expected \[3, 4, 192\]"),
        ((k, nope.float(), rope), ValueError, "k_nope is torch.float32"),
        ((k[:1].expand(3, 4, 192), nope, rope), ValueError, "elements of k overlap"),
        ((k, nope.transpose(1, 2).contiguous().transpose(1, 2), rope), ValueError, "k_nope has stride"),
        ((k.to("meta"), nope, rope), ValueError, "no memory"),
        ((k, nope, None), TypeError, "k_rope is NoneType"),
        ((k.int(), nope.int(), rope.int()), ValueError, "int32"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            concat_mla_k(*given)
    with pytest.raises(UnsupportedConfig, match="nope_dim=600"):
        wide = torch.zeros(3, 4, 664, dtype=BF16, device=device)
        concat_mla_k(wide, wide[..., :600].clone(), rope)
