# SPDX-License-Identifier: Apache-2.0
"""Sampling and filters."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch

import flashinfer
from flashinfer import sampling
from tests.fuzz.call import Call, Check, Refused, Unspecified, Wrong, equal, near, require_tensor
from tests.fuzz.draw import FLOATS, Draw
from tests.fuzz.table import Case
from tests.fuzz.table.indices import integers, whole
from tests.oracles import sampling as oracle

SLACK = 2e-5  # what fp32 sums over a vocabulary may differ by, as a part of the whole
Row = torch.Tensor  # FP64, [vocab_size]


def _draw_rows(d: Draw, kind: str, num_rows: int) -> torch.Tensor:
    dtype, vocab_size = d.kernel(*FLOATS), d.choice((1, 2, 7, 33, 130))
    logits = torch.randn(num_rows, vocab_size, generator=d.torch) * d.choice((0.1, 1.0, 5.0))
    if d.chance(0.2):
        logits = logits.round()  # ties
    rows = logits if kind == "logits" else logits.softmax(-1)
    if d.chance(0.2) and num_rows:
        row = d.random.randrange(num_rows)
        rows[row] = d.choice((math.nan, -math.inf if kind == "logits" else 0.0))
    return d.place(rows.to(dtype))


def _draw_parameter(d: Draw, name: str, num_rows: int) -> Any:
    values = {
        "top_k": (1, 2, 5, 1000),
        "top_p": (0.0, 0.3, 0.9, 1.0),
        "min_p": (0.0, 0.1, 0.9),
        "temperature": (0.3, 1.0, 2.0),
    }[name]
    if d.chance(0.6):
        return d.choice(values)
    dtype = d.choice((torch.int32, torch.int64)) if name == "top_k" else torch.float32
    return d.dense(torch.tensor([d.choice(values) for _ in range(num_rows)], dtype=dtype))


def _require_rows(rows: Any) -> None:
    if rows.dim() != 2 or rows.shape[1] < 1 or not rows.is_floating_point():
        raise Refused("rows that are no matrix of a vocabulary")


def _per_row(name: str, value: Any, num_rows: int) -> list[Any]:
    """One value a row."""
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bool or value.is_complex() or value.numel() not in (1, num_rows):
            raise Refused(f"{name} is no vector of numbers, one a row")
        if value.is_floating_point() == (name == "top_k"):
            raise Unspecified
        values = value.reshape(-1).tolist() * (num_rows if value.numel() == 1 and num_rows != 1 else 1)
        if any(v != v or (name == "temperature" and not 0 < v < math.inf) for v in values):
            raise Unspecified  # on a device, nobody looks at them
        return [min(v, 1.0) for v in values] if name == "min_p" else values
    if name == "top_k":
        value = whole(name, value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise Refused(f"{name} is no number")
    if name == "temperature" and not 0 < value < math.inf:
        raise Refused("a temperature that is not positive")
    return [min(value, 1.0) if name == "min_p" else value] * num_rows  # the most probable one always stays


def _weights(row: Row, kind: str) -> Optional[Row]:
    """None: there is nothing to draw."""
    if bool(row.isnan().any()):
        return None
    if kind == "logits":
        return None if float(row.max()) in (-math.inf, math.inf) else torch.softmax(row, -1)
    if bool((row < 0).any()) or bool(row.isinf().any()):
        raise Unspecified
    return row if float(row.sum()) > 0 else None


def _kept(row: Row, weights: Row, filters: dict[str, Any], slack: float, top_k_first: bool) -> torch.Tensor:
    return oracle.kept(row, weights, top_k_first=top_k_first, slack=slack, **filters)


# ---------------------------------------------------------------------------------------------------------------- draws


def _sample(name: str, kind: str, filters: tuple[str, ...], d: Draw) -> Iterator[Call]:
    input_name = kind
    num_inputs = d.size()
    rows = _draw_rows(d, kind, num_inputs)
    num_rows = num_inputs
    arguments: dict[str, Any] = {input_name: rows}
    indices = None
    if num_inputs and d.chance(0.3):
        num_rows = d.size(5)
        indices = d.index([d.random.randrange(num_inputs) for _ in range(num_rows)])
    for parameter in filters:
        arguments[parameter] = _draw_parameter(d, parameter, num_rows)
    arguments["indices"] = indices
    if len(filters) == 2:
        arguments["filter_apply_order"] = d.choice(("top_k_first", "joint"))
    arguments.update(
        deterministic=d.chance(0.5), generator=torch.Generator().manual_seed(3) if d.chance(0.2) else None,
        check_nan=d.chance(0.1), seed=d.choice((None, 7, d.index([11], torch.int64))),
        offset=d.choice((None, 4, d.index([8], torch.int64))), return_valid=d.chance(0.5),
    )  # fmt: skip
    if arguments["check_nan"] and bool(rows.isnan().any()):
        arguments["check_nan"] = False

    def expect(**given: Any) -> Mapping[str, Check]:
        rows, indices = given[input_name], given["indices"]
        _require_rows(rows)
        chosen = range(len(rows)) if indices is None else integers("indices", indices)
        if any(not 0 <= row < len(rows) for row in chosen):
            raise Refused("an index past the rows")
        order = given.get("filter_apply_order", "joint")
        if order not in ("top_k_first", "joint"):
            raise Refused("an unknown order")
        if given["check_nan"] and bool(rows.isnan().any()):
            raise Refused("NaN")
        if chosen:
            _require_random_state(**given)
        values = {parameter: _per_row(parameter, given[parameter], len(chosen)) for parameter in filters}
        allowed: list[Optional[torch.Tensor]] = []
        for i, row in enumerate(rows[list(chosen)].double()):
            weights = _weights(row, kind)
            of_row = {parameter: values[parameter][i] for parameter in filters}
            allowed.append(
                None if weights is None else _kept(row, weights, of_row, SLACK, order == "top_k_first") & (weights > 0)
            )
        return {"return": functools.partial(_check_tokens, allowed, bool(given["return_valid"]))}

    yield from d.maybe_hostile(Call(name, getattr(flashinfer, name), arguments, expect))


def _require_random_state(generator: Any, seed: Any, offset: Any, **_: Any) -> None:
    for part in (seed, offset):
        if isinstance(part, torch.Tensor):
            if part.is_floating_point() or part.is_complex() or part.numel() == 0:
                raise Refused("a tensor of no integer")
        elif part is not None and (isinstance(part, bool) or not isinstance(part, int)):
            raise Refused("a seed that is no integer")
    if generator is not None and not isinstance(generator, torch.Generator) and seed is None and offset is None:
        raise Refused("no generator")


def _check_tokens(allowed: list[Optional[torch.Tensor]], has_valid: bool, result: Any) -> None:
    if has_valid:
        if not isinstance(result, tuple) or len(result) != 2:
            raise Wrong("no pair")
        equal(torch.tensor([row is not None for row in allowed], dtype=torch.bool))(result[1])
        result = result[0]
    require_tensor(result, torch.Size([len(allowed)]), torch.int32)
    for token, row in zip(result.tolist(), allowed):
        if row is None:
            if token != 0:
                raise Wrong(f"token {token} of a row with nothing to draw; expected 0")
        elif not 0 <= token < len(row) or not bool(row[token]):
            raise Wrong(f"token {token} was not to be drawn")


# ----------------------------------------------------------------------------------------------------------- whole rows


def _normalize(name: str, kind: str, parameter: str, d: Draw) -> Iterator[Call]:
    input_name = "probs" if name.endswith("renorm_probs") else "logits"
    num_rows = d.size()
    arguments = {input_name: _draw_rows(d, kind, num_rows), parameter: _draw_parameter(d, parameter, num_rows)}
    if name == "softmax":
        arguments.update(temperature=d.choice((None, arguments["temperature"])), enable_pdl=None)
    elif name != "top_k_mask_logits":
        arguments["is_deterministic"] = False

    def expect(**given: Any) -> Mapping[str, Check]:
        rows, value = given[input_name], given[parameter]
        _require_rows(rows)
        values = _per_row(parameter, 1.0 if value is None else value, len(rows))
        if name == "softmax":
            temperature = torch.tensor(values, dtype=torch.float64)
            softmax = oracle.softmax(rows, temperature)
            bad = torch.tensor([_weights(row, "logits") is None for row in rows.double()], dtype=torch.bool)
            return {"return": near(torch.where(bad[:, None], math.nan, softmax), torch.float32)}
        check_row = _check_masked if name == "top_k_mask_logits" else _check_renormed
        wanted = [(row, {parameter: v}) for row, v in zip(rows.double(), values)]
        for row, _ in wanted:
            _weights(row, kind)

        def check(actual: Any) -> None:
            require_tensor(actual, rows.shape, rows.dtype)
            for ours, (row, filters) in zip(actual, wanted):
                check_row(ours, row, filters)

        return {"return": check}

    yield from d.maybe_hostile(Call(name, getattr(sampling, name), arguments, expect))


def _check_masked(ours: torch.Tensor, row: Row, filters: dict[str, Any]) -> None:
    count = torch.tensor([int((row > x).sum()) for x in row])
    kept = (count < max(filters["top_k"], 1)) & ~row.isnan()
    equal(torch.where(kept, row, -math.inf).to(ours.dtype))(ours)


def _check_renormed(ours: torch.Tensor, row: Row, filters: dict[str, Any]) -> None:
    if _weights(row, "probs") is None:
        if not (bool(ours.isnan().any()) if bool(row.isnan().any()) else bool((ours == 0).all())):
            raise Wrong("a row with NaN becomes NaN, one of zeros stays zero")
        return
    inner, outer = (_kept(row, row, filters, slack, False) for slack in (-SLACK, SLACK))
    kept, representable = ours > 0, row > 1e-30  # smaller ones may round to zero on the way
    if bool((~kept & inner & representable).any()) or bool((kept & ~outer).any()):
        raise Wrong("a kept element is missing, or a cut one present")
    exact = torch.where(kept | (inner & ~representable), row, 0.0)
    near((exact / exact.sum())[None], ours.dtype)(ours[None])


def _top_k(d: Draw) -> Iterator[Call]:
    rows = _draw_rows(d, "logits", d.size())
    arguments = {
        "input": rows, "k": d.random.randint(1, rows.shape[1]), "sorted": d.chance(0.5), "deterministic": d.chance(0.5),
        "tie_break": d.choice((0, 1, 2)), "dsa_graph_safe": d.chance(0.5),
    }  # fmt: skip

    def expect(input: Any, k: Any, sorted: Any, tie_break: Any, **_: Any) -> Mapping[str, Check]:
        _require_rows(input)
        k, tie_break = whole("k", k), whole("tie_break", tie_break)
        if not 1 <= k <= input.shape[1] or tie_break not in (0, 1, 2):
            raise Refused("more than there are, or an unknown preference")

        def check(result: Any) -> None:
            values, indices = result
            require_tensor(values, torch.Size([len(input), k]), input.dtype)
            require_tensor(indices, values.shape, torch.int64)
            for row, kept, at in zip(input.detach(), values, indices):
                equal(row[at].nan_to_num(3.0))(kept.nan_to_num(3.0))  # a NaN may change its payload
                _check_largest(row.tolist(), at.tolist(), bool(sorted), tie_break)

        return {"return": check}

    yield from d.maybe_hostile(Call("top_k", flashinfer.top_k, arguments, expect))


def _transform(name: str, d: Draw) -> Iterator[Call]:
    rows, is_paged = _draw_rows(d, "logits", d.size()), name == "top_k_page_table_transform"
    count, width = rows.shape
    starts = [d.random.randint(0, width - 1) for _ in range(count)] if d.chance(0.5) else None
    lengths = [d.random.randint(0, width - start) for start in starts or [0] * count]
    page_size = d.choice((1, 4)) if is_paged else 1
    arguments: dict[str, Any] = {
        "input": rows, "lengths": d.index(lengths, torch.int32), "k": d.random.randint(1, width + 2),
        "deterministic": d.chance(0.5), "tie_break": d.choice((0, 1, 2)), "dsa_graph_safe": d.chance(0.5),
        "row_starts": None if starts is None else d.index(starts, torch.int32),
    }  # fmt: skip
    if is_paged:
        table = torch.randint(0, 99, (count, width + max(starts or [0])), generator=d.torch, dtype=torch.int32)
        table_starts = None
        if page_size > 1 and starts is not None:
            table_starts = d.index([0] * count, torch.int32)
        arguments.update(src_page_table=d.dense(table), page_table_row_starts=table_starts, page_size=page_size)
        arguments["out"] = d.dense(torch.zeros(count, arguments["k"], dtype=torch.int32)) if d.chance(0.3) else None
    else:
        arguments["offsets"] = d.index([d.random.randint(0, 99) for _ in range(count)], torch.int32)

    def expect(
        input: Any, lengths: Any, k: Any, tie_break: Any, row_starts: Any, src_page_table: Any = None,
        page_table_row_starts: Any = None, page_size: Any = 1, out: Any = None, offsets: Any = None, **_: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        if input.dim() != 2 or input.dtype not in FLOATS:
            raise Refused("rows that are no matrix of floats")
        count, width = input.shape
        k, tie_break, page_size = whole("k", k), whole("tie_break", tie_break), whole("page_size", page_size)
        if k < 1 or tie_break not in (0, 1, 2) or page_size < 1:
            raise Refused("none, an unknown preference, or no pages")
        if is_paged and page_size > 1 and row_starts is not None and page_table_row_starts is None:
            raise Refused("starts of scores for pages")
        vectors = [lengths, row_starts, page_table_row_starts, *([] if is_paged else [offsets])]
        for vector in (vector for vector in vectors if vector is not None):
            if vector.dtype != torch.int32 or vector.shape != (count,):
                raise Refused("no entry for each row")
        if not is_paged and any(abs(offset) > 1 << 30 for offset in offsets.tolist()):
            raise Unspecified  # sums that int32 does not hold
        firsts = [0] * count if row_starts is None else row_starts.tolist()
        ends = [min(width, first + length) for first, length in zip(firsts, lengths.tolist())]
        if is_paged:
            if src_page_table.dim() != 2 or src_page_table.dtype != torch.int32 or len(src_page_table) < count:
                raise Refused("no page table")
            if out is not None and (out.shape != (count, k) or out.dtype != torch.int32 or not out.is_contiguous()):
                raise Refused("out does not fit")
            at = firsts if page_table_row_starts is None else page_table_row_starts.tolist()
            if any(max(first, 0) - first > 0 for first in firsts) or any(place < 0 for place in at):
                raise Unspecified
            reach = [
                place + (end - 1 - first) // page_size for place, first, end in zip(at, firsts, ends) if end > first
            ]
            if any(entry >= src_page_table.shape[1] for entry in reach):
                raise Unspecified  # refused where such a score is chosen

        def check(actual: Any) -> None:
            require_tensor(actual, torch.Size([count, k]), torch.int32)
            for i, (row, first, end) in enumerate(zip(input.detach(), firsts, ends)):
                window = list(range(max(first, 0), max(end, 0)))
                number = min(k, len(window))
                taken = actual[i, :number].tolist()
                if any(place != -1 for place in actual[i, number:].tolist()):
                    raise Wrong("something behind the last")
                if not is_paged:
                    columns = [place - int(offsets[i]) for place in taken]
                    _check_largest(row[window].tolist(), [c - (window[0] - first) for c in columns], True, tie_break)

        return {"return": check, **({} if out is None else {"out": check})}

    outputs = ("out",) if is_paged else ()
    yield from d.maybe_hostile(Call(name, getattr(flashinfer, name), arguments, expect, outputs))


def _check_largest(row: list[float], taken: list[int], in_order: bool, tie_break: int) -> None:
    rank = [(x != x, 0.0 if x != x else x) for x in row]  # NaN above all
    largest = sorted(range(len(row)), key=lambda i: (rank[i], i if tie_break == 2 else -i), reverse=True)[: len(taken)]
    ranks = [rank[i] for i in taken]
    if len(set(taken)) != len(taken) or sorted(ranks, reverse=True) != [rank[i] for i in largest]:
        raise Wrong(f"{taken} are not the {len(taken)} largest, each once")
    if tie_break and set(taken) != set(largest):
        raise Wrong(f"{taken}; of equal elements expected those of {largest}")
    if in_order and ranks != sorted(ranks, reverse=True):
        raise Wrong(f"{taken} do not descend")


# ---------------------------------------------------------------------------------------------------------- speculative


def _speculative(d: Draw) -> Iterator[Call]:
    num_rows, num_draft, vocab_size, dtype = d.size(), d.random.randint(0, 3), d.choice((1, 5, 33)), d.kernel(*FLOATS)

    def probs(steps: int) -> torch.Tensor:
        rows = (torch.randn(num_rows, steps, vocab_size, generator=d.torch) * 2).softmax(-1)
        if d.chance(0.3):
            rows[..., 0] = 0.0
        return d.place(rows.to(dtype), 2)

    ids = torch.randint(0, vocab_size, (num_rows, num_draft), generator=d.torch, dtype=torch.int32)
    arguments: dict[str, Any] = {
        "draft_probs": probs(num_draft), "draft_token_ids": d.dense(ids.to(d.choice((torch.int32, torch.int64)))),
        "target_probs": probs(num_draft + 1),
        "maybe_output_accepted_token_num": d.index([5] * num_rows, torch.int32) if d.chance(0.4) else None,
        "maybe_output_emitted_draft_token_num": d.index([3] * num_rows, torch.int32) if d.chance(0.4) else None,
        "deterministic": True, "generator": None, "seed": d.choice((None, 5)), "offset": None,
    }  # fmt: skip
    names = ("maybe_output_accepted_token_num", "maybe_output_emitted_draft_token_num")

    def expect(draft_probs: Any, draft_token_ids: Any, target_probs: Any, **given: Any) -> Mapping[str, Check]:
        if target_probs.dim() != 3 or min(target_probs.shape[1:]) < 1 or not target_probs.is_floating_point():
            raise Refused("a target that is no steps of a vocabulary")
        num_rows, num_steps, vocab_size = target_probs.shape
        if draft_probs.shape != (num_rows, num_steps - 1, vocab_size) or draft_token_ids.shape != (
            num_rows,
            num_steps - 1,
        ):
            raise Refused("a draft of other steps than the target")
        if (
            draft_probs.dtype != target_probs.dtype
            or draft_token_ids.is_floating_point()
            or draft_token_ids.is_complex()
        ):
            raise Refused("a draft of another dtype than the target, or tokens of no integer type")
        _require_random_state(**given)
        begins = []
        for name in names:
            count = given[name]
            if count is not None and (count.shape != (num_rows,) or count.dtype != torch.int32):
                raise Refused(f"{name} is no int32 vector of the rows")
            begins.append([0] * num_rows if count is None else count.tolist())
        if any(abs(begin) > 1 << 30 for of_rows in begins for begin in of_rows):
            raise Unspecified  # a count that may run over
        p, q = draft_probs.double(), target_probs.double()
        if bool((p < 0).any()) or bool((q < 0).any()) or not bool(p.isfinite().all()) or not bool(q.isfinite().all()):
            raise Unspecified

        def check(result: Any) -> None:
            tokens, accepted, emitted = result
            require_tensor(tokens, target_probs.shape[:2], torch.int32)
            for count in (accepted, emitted):
                require_tensor(count, torch.Size([num_rows]), torch.int32)
            for row in range(num_rows):
                counts = int(accepted[row]) - begins[0][row], int(emitted[row]) - begins[1][row]
                _check_chain(tokens[row].tolist(), *counts, draft_token_ids[row].tolist(), p[row], q[row])

        return {"return": check}

    call = Call("chain_speculative_sampling", flashinfer.chain_speculative_sampling, arguments, expect, names)
    yield from d.maybe_hostile(call)


def _check_chain(
    tokens: list[int], accepted: int, emitted: int, ids: list[int], p: torch.Tensor, q: torch.Tensor
) -> None:
    """One row: what must pass, what must not, and where the last token may come from."""
    vocab_size = q.shape[1]
    legal = [0 <= token < vocab_size for token in ids]
    may = [ok and float(q[i, ids[i]]) > 0 for i, ok in enumerate(legal)]
    must = [ok and float(q[i, ids[i]]) >= float(p[i, ids[i]]) > 0 for i, ok in enumerate(legal)]
    if not sum(must) <= accepted <= sum(may) or not 0 <= emitted <= min(len(ids), accepted):
        raise Wrong(f"{accepted} accepted and {emitted} emitted; {sum(must)} must pass and {sum(may)} may")
    if not all(may[:emitted]) or (emitted < len(ids) and must[emitted]):
        raise Wrong(f"{emitted} tokens emitted, which must have ended earlier or later")
    if tokens[:emitted] != ids[:emitted] or any(token != -1 for token in tokens[emitted + 1 :]):
        raise Wrong(f"tokens {tokens} of the draft {ids}, {emitted} emitted")
    source = q[emitted] if emitted == len(ids) else (q[emitted] - p[emitted]).clamp(min=0)
    if not bool((source > 0).any()):
        source = q[emitted]
    last = tokens[emitted]
    if bool((source > 0).any()) and not (0 <= last < vocab_size and float(source[last]) > 0):
        raise Wrong(f"last token {last}, which was not to be drawn")


_SAMPLERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sampling_from_logits": ("logits", ()),
    "sampling_from_probs": ("probs", ()),
    "top_p_sampling_from_probs": ("probs", ("top_p",)),
    "top_k_sampling_from_probs": ("probs", ("top_k",)),
    "min_p_sampling_from_probs": ("probs", ("min_p",)),
    "top_k_top_p_sampling_from_logits": ("logits", ("top_k", "top_p")),
    "top_k_top_p_sampling_from_probs": ("probs", ("top_k", "top_p")),
}
CASES: dict[str, Case] = {
    **{name: functools.partial(_sample, name, kind, filters) for name, (kind, filters) in _SAMPLERS.items()},
    "softmax": functools.partial(_normalize, "softmax", "logits", "temperature"),
    "top_p_renorm_probs": functools.partial(_normalize, "top_p_renorm_probs", "probs", "top_p"),
    "top_k_renorm_probs": functools.partial(_normalize, "top_k_renorm_probs", "probs", "top_k"),
    "top_k_mask_logits": functools.partial(_normalize, "top_k_mask_logits", "logits", "top_k"),
    "chain_speculative_sampling": _speculative,
    "top_k": _top_k,
    "top_k_page_table_transform": functools.partial(_transform, "top_k_page_table_transform"),
    "top_k_ragged_transform": functools.partial(_transform, "top_k_ragged_transform"),
}
