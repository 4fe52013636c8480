"""Each kernel against the plain formula that it replaces."""

from __future__ import annotations

from array import array
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tests.slow import slow
from trtqwen.executor.attention import AttentionBatch, PlainAttention
from trtqwen.executor.choose import NONE_LEFT, NOT_FINITE, Choice, choose
from trtqwen.executor.cuda.batch import context_tiles
from trtqwen.executor.cuda.kernels.activation import silu_mul
from trtqwen.executor.cuda.kernels.all_reduce import BLOCK as SUMMED
from trtqwen.executor.cuda.kernels.all_reduce import PROGRAMS, all_reduce
from trtqwen.executor.cuda.kernels.choose import choose_fused
from trtqwen.executor.cuda.kernels.context_attention import context_attention
from trtqwen.executor.cuda.kernels.decode_attention import DecodeWorkspace, decode_attention
from trtqwen.executor.cuda.kernels.embed import embed
from trtqwen.executor.cuda.kernels.gemv import gemv
from trtqwen.executor.cuda.kernels.int8_matmul import w8a8, w8a16
from trtqwen.executor.cuda.kernels.matmul import matmul
from trtqwen.executor.cuda.kernels.norm import add_norm
from trtqwen.executor.cuda.kernels.penalize import penalize_fused
from trtqwen.executor.cuda.kernels.quantize import PER_TOKEN, STATIC, Quantization, Quantized, quantize_rows
from trtqwen.executor.cuda.kernels.rotary import rotary_store
from trtqwen.executor.cuda.kernels.silu_matmul import silu_matmul
from trtqwen.executor.cuda.kernels.w8a8_wide import w8a8_wide
from trtqwen.executor.inputs import pack
from trtqwen.executor.penalties import penalize
from trtqwen.executor.request import Request
from trtqwen.executor.sequence import Chunk, SequenceState, Step
from trtqwen.nn.ops import rms_norm
from trtqwen.nn.rotary import make_rotary, rotate

BLOCK = 8
DTYPES = (torch.float32, torch.float16)


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def codes_of(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (values.float() / step).round().clamp(-128, 127)


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("quantization", [None, Quantization(PER_TOKEN), Quantization(STATIC, 20.0)])
def test_norm(device: torch.device, with_delta: bool, quantization: Quantization | None) -> None:
    hidden, gain = random(5, 96, device=device), random(96, device=device)
    delta = random(5, 96, device=device) * 0.5 if with_delta else None
    total = hidden + delta if delta is not None else hidden.clone()
    expected = rms_norm(total, gain, 1e-6)
    got = add_norm(hidden, delta, gain, 1e-6, quantization)
    torch.testing.assert_close(hidden, total)
    if isinstance(got, torch.Tensor):
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
        return
    step = torch.full((5,), 1 / 20.0, device=device) if got.steps is None else got.steps
    if got.steps is not None:
        torch.testing.assert_close(step, expected.float().abs().amax(-1) / 127, rtol=2e-3, atol=0)
    assert (got.codes.float() - codes_of(expected, step[:, None])).abs().max() <= 1


@pytest.mark.parametrize("mode", [None, PER_TOKEN, STATIC])
def test_silu_mul_and_quantize(device: torch.device, mode: int | None) -> None:
    gate_up = random(3, 2 * 1100, device=device)
    inverse = random(1100, device=device, dtype=torch.float32).abs() + 0.5
    expected = F.silu(gate_up[:, :1100]) * gate_up[:, 1100:]
    if mode is None:
        torch.testing.assert_close(silu_mul(gate_up, None), expected, atol=2e-3, rtol=2e-3)
        return
    smoothed = expected.float() * inverse
    for got, values in (
        (silu_mul(gate_up, Quantization(mode, 11.0)), expected.float()),
        (quantize_rows(expected, Quantization(mode, 11.0, inverse)), smoothed),
    ):
        assert isinstance(got, Quantized)
        step = values.abs().amax(-1, keepdim=True) / 127 if mode == PER_TOKEN else torch.tensor(1 / 11.0)
        assert (got.codes.float() - codes_of(values, step.to(device))).abs().max() <= 1


@pytest.mark.parametrize("kv_step", [None, 0.05])
def test_rotary_and_store(device: torch.device, kv_step: float | None) -> None:
    heads, kv_heads, size, tokens = 6, 2, 16, 5
    qkv = random(tokens, (heads + 2 * kv_heads) * size, device=device)
    query, key, value = qkv.clone().view(tokens, -1, size).split([heads, kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]
    rotary = make_rotary(10000.0, size, None, device)
    positions = torch.tensor([0, 1, 9, 30, 4], device=device)
    slots = torch.tensor([3, 8, 9, 31, -1], device=device)
    cos, sin = rotary.cos_sin(positions, torch.float32)
    kind = torch.float16 if kv_step is None else torch.int8
    keys, values = torch.zeros(2, 4, kv_heads, BLOCK, size, dtype=kind, device=device)
    table = torch.stack(rotary.cos_sin(torch.arange(40, device=device), torch.float32), 1)[:, :, 0, : size // 2]
    rotary_store(qkv, table.contiguous(), positions.int(), slots.int(), keys, values, kv_step)
    expected = rotate(query.float(), cos, sin).half()
    turned = rotate(key.float(), cos, sin).half()
    expected = torch.cat([expected, turned, value], dim=1)
    torch.testing.assert_close(qkv.view(tokens, -1, size), expected, atol=2e-3, rtol=2e-3)
    for token, slot in enumerate(slots.tolist()[:4]):
        for cache, source in ((keys, turned), (values, value)):
            stored = cache[slot // BLOCK, :, slot % BLOCK].float()
            want = source[token].float() if kv_step is None else codes_of(source[token], torch.tensor(kv_step))
            assert (stored - want).abs().max() <= (2e-3 if kv_step is None else 1)
    assert keys.count_nonzero() <= 4 * kv_heads * size


@pytest.mark.parametrize("rows", [1, 3, 16, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul(device: torch.device, rows: int, bias: bool) -> None:
    hidden, weight = random(rows, 320, device=device), random(70, 320, device=device) * 0.1
    added = random(70, device=device) if bias else None
    expected = F.linear(hidden.float(), weight.float(), None if added is None else added.float())
    torch.testing.assert_close(matmul(hidden, weight, added).float(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("rows", "columns"), [(1, 70), (17, 70), (70, 70), slow(1, 8197)])
@pytest.mark.parametrize("per_token", [False, True])
def test_w8a8(device: torch.device, rows: int, columns: int, per_token: bool) -> None:
    codes = torch.randint(-128, 128, (rows, 320), generator=torch.Generator().manual_seed(1)).to(device, torch.int8)
    weight = torch.randint(-128, 128, (columns, 320), generator=torch.Generator().manual_seed(2)).to(
        device, torch.int8
    )
    scales = random(columns, device=device, dtype=torch.float32).abs() * 1e-3
    bias = random(columns, device=device, dtype=torch.float32)
    steps = random(rows, device=device, dtype=torch.float32).abs() if per_token else None
    exact = codes.double() @ weight.double().T * scales.double()
    expected = exact * (1.0 if steps is None else steps.double()[:, None]) + bias.double()
    got = w8a8(Quantized(codes, steps), weight, scales, bias, torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 17, 70, 400])
def test_w8a16(device: torch.device, rows: int) -> None:
    hidden = random(rows, 320, device=device)
    weight = torch.randint(-128, 128, (70, 320), generator=torch.Generator().manual_seed(2)).to(device, torch.int8)
    scales = (random(70, device=device, dtype=torch.float32).abs() * 1e-3).half().float()
    scratch = torch.empty(70 * 320, dtype=torch.float16, device=device)
    expected = F.linear(hidden.float(), weight.float() * scales[:, None])
    got = w8a16(hidden, weight, scales, None, scratch)
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=1e-2)


def make_batch(spans: list[tuple[int, int]], device: torch.device) -> AttentionBatch:
    """Sequences with (tokens before, tokens in this step), in shuffled blocks."""
    order = torch.randperm(128, generator=torch.Generator().manual_seed(5)).tolist()
    chunks = []
    for start, count in sorted(spans, key=lambda span: span[1] > 1):
        blocks = array("i", [order.pop() for _ in range(-(-(start + count) // BLOCK))])
        sequence = SequenceState(Request(id="a", input_token_ids=(1,), max_tokens=1), 1, [1], slot=0)
        chunks.append(Chunk(sequence, tuple(range(count)), start, blocks, samples=True, num_logits=1))
    return AttentionBatch(pack(Step(tuple(chunks)), BLOCK), device)


QUICK = [
    (3, 1, torch.float16, True),
    (14, 2, torch.float32, False),
]
ALL = [(*heads, *kind) for heads in ((4, 4), (14, 2), (3, 1)) for kind in product(DTYPES, (False, True))]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "int8"), [case if case in QUICK else slow(*case) for case in ALL]
)
def test_attention(device: torch.device, heads: int, kv_heads: int, dtype: torch.dtype, int8: bool) -> None:
    """The new keys and values of one-token sequences are stored by `decode_attention`, others by `rotary_store`."""
    size = 16
    batch = make_batch([(0, 1), (7, 1), (99, 1), (260, 1), (0, 150), (37, 9), (64, 2)], device)
    counts, views = batch.inputs.counts, batch.views
    cases, slots = counts.generation, views["kv_slots"].long()
    qkv = random(counts.tokens, heads + 2 * kv_heads, size, device=device, dtype=dtype)
    query, key, value = qkv.clone().split([heads, kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]
    rotary = make_rotary(10000.0, size, None, device)
    cos, sin = rotary.cos_sin(views["positions"], torch.float32)
    query, key = (rotate(heads.float(), cos, sin).to(dtype) for heads in (query, key))
    table = torch.stack(rotary.cos_sin(torch.arange(512, device=device), torch.float32), 1)[:, :, 0, : size // 2]
    keys, values = random(2, 128, kv_heads, BLOCK, size, device=device, dtype=dtype)
    step = 0.03 if int8 else None
    whole = []
    for cache, new in ((keys, key), (values, value)):
        cache = cache.clone()
        cache[slots // BLOCK, :, slots % BLOCK] = new
        whole.append(cache if step is None else codes_of(cache, torch.tensor(step)))
    plain = whole if step is None else [(cache.float() * step).to(dtype) for cache in whole]
    expected = PlainAttention()(query, plain[0], plain[1], batch).flatten(1)
    if step is not None:
        keys, values = (codes_of(cache, torch.tensor(step)).to(torch.int8) for cache in (keys, values))
    out = torch.full((counts.tokens, heads * size), float("nan"), device=device, dtype=dtype)
    workspace = DecodeWorkspace(8, heads, kv_heads, size, device)
    packed, untouched, table = qkv.flatten(1), qkv.flatten(1).clone(), table.contiguous()
    rotary_store(packed, table, views["positions"], views["kv_slots"], keys, values, step, first_token=cases)
    assert torch.equal(packed[:cases], untouched[:cases])
    for _ in range(2):  # the kernel leaves its counters as it found them
        decode_attention(
            packed, table, views["kv_slots"], keys, values, views["block_ids"], views["block_begins"],
            views["context_lengths"][:cases], out, workspace, longest=512, kv_step=step,
        )  # fmt: skip
    tiles = torch.from_numpy(context_tiles(batch.inputs)).to(device)
    context_attention(
        packed[:, : heads * size].contiguous(), keys, values, tiles, views["block_ids"], views["block_begins"],
        views["query_begins"], views["context_lengths"], out, kv_step=step, packed=False,
    )  # fmt: skip
    for cache, stored in zip(whole, (keys, values), strict=True):
        assert (cache.float() - stored.float()).abs().max() <= (2e-3 if step is None else 1)
    bound = 2e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(out, expected, atol=bound, rtol=bound)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "cached"), [(4, 4, True), (4, 4, False), slow(14, 2, True), slow(3, 1, True)]
)
def test_attention_to_packed_keys_and_values(device: torch.device, heads: int, kv_heads: int, cached: bool) -> None:
    """The cache has nothing of this step's tokens; values of one sequence that are not numbers reach no other."""
    size, dtype = 16, torch.float16
    spans = [(5, 1), (0, 150), (37, 9), (64, 130), (0, 2), (130, 3)]
    batch = make_batch([(start * cached, count) for start, count in spans], device)
    views, counts = batch.views, batch.inputs.counts
    qkv = random(counts.tokens, heads + 2 * kv_heads, size, device=device, dtype=dtype)
    begins = views["query_begins"]
    qkv[int(begins[2]) : int(begins[3]), -1] = float("nan")
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]
    keys, values = random(2, 128, kv_heads, BLOCK, size, device=device, dtype=dtype)
    whole = keys.clone(), values.clone()
    slots = views["kv_slots"].long()
    for cache, poisoned, rows in ((whole[0], keys, key), (whole[1], values, value)):
        cache[slots // BLOCK, :, slots % BLOCK] = rows
        poisoned[slots // BLOCK, :, slots % BLOCK] = float("nan")
    expected = PlainAttention()(query.contiguous(), *whole, batch).flatten(1)
    out = torch.zeros((counts.tokens, heads * size), device=device, dtype=dtype)
    context_attention(
        qkv.flatten(1), keys, values, torch.from_numpy(context_tiles(batch.inputs)).to(device), views["block_ids"],
        views["block_begins"], views["query_begins"], views["context_lengths"], out, cached=cached, packed=True,
    )  # fmt: skip
    for sequence in (1, 3, 4, 5):
        rows = slice(int(begins[sequence]), int(begins[sequence + 1]))
        torch.testing.assert_close(out[rows], expected[rows], atol=5e-3, rtol=5e-3)


def test_embed(device: torch.device) -> None:
    table = random(10, 1030, device=device)
    sampled = torch.tensor([4, 12, 9], device=device)
    token_ids = torch.tensor([3, -1, 11, -2, -3], dtype=torch.int32, device=device)
    rows = [3, 4, None, None, 9]
    expected = torch.stack([table[row] if row is not None else torch.zeros_like(table[0]) for row in rows])
    assert torch.equal(embed(token_ids, sampled, table, 0), expected)
    shifted = embed(token_ids, sampled, table, 3)
    assert torch.equal(shifted[0], table[0])
    assert torch.equal(shifted[3], table[9])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize(
    ("dtype", "filters"), [(torch.float16, False), slow(torch.float32, False), slow(torch.float16, True)]
)
def test_choosing(device: torch.device, dtype: torch.dtype, filters: bool) -> None:
    rows, vocab_size = 12, 20000  # more than a part of 8192
    logits = random(rows, vocab_size, device=device, dtype=torch.float32) * 3
    logits[8:10] /= 100  # more tokens stay than are gathered
    logits[10:12] *= 20  # one or two stay
    logits[3, :8192] = logits[4, 8192:16384] = float("-inf")  # a part has nothing
    logits = logits.to(dtype)
    generator = torch.Generator().manual_seed(3)
    values = torch.zeros(5, rows)
    values[0] = torch.rand(rows, generator=generator) * 2
    values[0, :3] = 0
    values[1, ::2] = 0.8
    values[2, ::3] = 0.05
    values[3] = torch.rand(rows, generator=generator)
    values[3, 3], values[3, 9] = 0, 1 - 2**-24
    values[4, ::4] = 40
    logits[5, 77] = float("nan")
    logits[6, 78] = float("inf")
    logits[7] = float("-inf")
    choice = Choice(values.to(device), draws=True, filters=filters)
    got, expected = choose_fused(logits, choice), choose(logits.float(), choice)
    assert torch.equal(got, expected)
    assert got[5:8].tolist() == [NOT_FINITE, NOT_FINITE, NONE_LEFT]
    greedy = Choice(torch.zeros(5, rows, device=device), draws=False, filters=False)
    assert torch.equal(choose_fused(logits, greedy)[8:], logits[8:].argmax(-1))


FILTERS = list(product([0.0, 0.1, 0.8, 0.9999], [0, 1, 40, 700, 5000], [0.0, 0.05]))[1:]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize(("spread", "every"), [(3.0, 13), slow(0.01, 1), slow(1.0, 1), slow(3.0, 1), slow(20.0, 1)])
def test_filtered_draws(device: torch.device, spread: float, every: int) -> None:
    """Few tokens near the best one, many, and more than are gathered. Rounding may choose a neighbor."""
    filters = FILTERS[::every]
    logits = random(len(filters), 12000, device=device, dtype=torch.float32) * spread
    values = torch.tensor([[0.7, top_p, min_p, 0.0, top_k] for top_p, top_k, min_p in filters]).T.contiguous()
    values[3] = torch.rand(len(filters), generator=torch.Generator().manual_seed(4))
    choice = Choice(values.to(device), draws=True, filters=True)
    got, expected = choose_fused(logits, choice), choose(logits, choice)
    sums = (logits.double() / 0.7).softmax(dim=-1).cumsum(dim=-1)
    between = (sums.gather(1, got[:, None]) - sums.gather(1, expected[:, None]))[:, 0].abs()
    assert (between < 1e-3).all()
    assert (got != expected).sum() <= len(filters) // 20


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_penalties(device: torch.device) -> None:
    rows, vocab_size = 6, 5000
    logits = random(rows, vocab_size, device=device) * 10
    logits[5, 3], logits[5, 4] = float("nan"), float("inf")
    dice = torch.Generator().manual_seed(3)
    table = torch.randint(0, 6, (8, vocab_size), generator=dice, dtype=torch.int32).to(device)
    slots = torch.tensor([7, 0, 3, 2, 5, 1], device=device)
    values = [[1.3, 0.7, 1.0, 1.0, 1.0, 1.1], [0.0, 0.5, -0.5, 0.0, 3e38, 0.0], [0.0, 0.1, 0.2, 0.0, -3e38, 0.0]]
    penalties = torch.tensor(values, device=device)
    got = penalize_fused(logits, table, slots, penalties)
    torch.testing.assert_close(got, penalize(logits, table, slots, penalties), equal_nan=True)
    assert torch.equal(got[3], logits[3].float())


@pytest.mark.parametrize("int8", [False, True])
def test_gemv_with_norm_and_silu(device: torch.device, int8: bool) -> None:
    width, rows = 2300, 12
    hidden, gain = random(1, width, device=device), random(width, device=device)
    if int8:
        weight = torch.randint(-128, 128, (2 * rows, width), generator=torch.Generator().manual_seed(2)).to(device)
        weight, scales = weight.to(torch.int8), random(2 * rows, device=device, dtype=torch.float32).abs() * 1e-3
        full = weight.float() * scales[:, None]
    else:
        weight, scales = random(2 * rows, width, device=device) * 0.05, None
        full = weight.float()
    bias = random(2 * rows, device=device)
    normed = rms_norm(hidden.float(), gain.float(), 1e-6)
    whole = F.linear(normed, full, bias.float())
    got = gemv(hidden, weight, torch.float16, scales=scales, bias=bias, gain=gain, epsilon=1e-6, silu=True)
    expected = F.silu(whole[:, :rows]) * whole[:, rows:]
    torch.testing.assert_close(got.float(), expected, atol=3e-2, rtol=1e-2)
    residual = random(1, 2 * rows, device=device)
    before = residual.float().clone()
    gemv(hidden, weight, torch.float16, scales=scales, residual=residual)
    torch.testing.assert_close(residual.float(), before + F.linear(hidden.float(), full), atol=5e-2, rtol=1e-2)


@pytest.mark.parametrize("persistent", [False, True])
def test_wide_w8a8(device: torch.device, persistent: bool) -> None:
    rows, columns, width = (300, 200, 320) if device.type == "cuda" else (70, 40, 160)
    codes = torch.randint(-128, 128, (rows, width), generator=torch.Generator().manual_seed(1)).to(device, torch.int8)
    weight = torch.randint(-128, 128, (columns, width), generator=torch.Generator().manual_seed(2))
    weight = weight.to(device, torch.int8)
    scales, bias = torch.rand(columns, device=device) * 1e-3, torch.randn(columns, device=device)
    steps = torch.rand(rows, device=device)
    out = torch.full((rows, columns), float("nan"), device=device)
    tile = (128, 64, 128, 4, 3) if device.type == "cuda" else (32, 16, 64, 4, 3)
    w8a8_wide(codes, weight, steps, scales, bias, out, (*tile, persistent))
    expected = codes.double() @ weight.double().T * scales.double() * steps.double()[:, None] + bias.double()
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("two_shot", [False, True])
def test_sums_over_cards(device: torch.device, two_shot: bool) -> None:
    """Both cards' buffers lie on one device; kernels run one after the other, with the other's signals set before."""
    count, room = 2 * SUMMED + 96, 3 * SUMMED
    buffers = [torch.zeros(4 * room, dtype=torch.float16, device=device) for _ in range(2)]
    signals = [torch.full((PROGRAMS * 2,), 1 << 20, dtype=torch.int32, device=device) for _ in range(2)]
    places = [torch.tensor([tensor.data_ptr() for tensor in found], device=device) for found in (buffers, signals)]
    counted = [torch.zeros(PROGRAMS, dtype=torch.int32, device=device) for _ in range(2)]
    for call in range(3):
        values = [random(count, device=device) for _ in range(2)]
        expected = (values[0].float() + values[1].float()).half()
        # Rank 1 leaves its values; rank 0 finds them, and leaves its own; rank 1 then finds both.
        for rank in (1, 0, 1):
            counted[rank].fill_(call)
            signals[rank].fill_(1 << 20)
            result = values[rank].clone()
            all_reduce(result, places[0], places[1], counted[rank], room=room, rank=rank, two_shot=two_shot)
        assert torch.equal(result, expected)
        assert [int(calls[0]) for calls in counted] == [call + 1, call + 1]
    assert int(signals[0].view(PROGRAMS, 2)[0, 1]) == 2 * 2 + 1 + two_shot  # rank 1's word to rank 0
    assert int(signals[0].view(PROGRAMS, 2)[5, 1]) == 1 << 20  # a program without values meets none


def test_silu_inside_the_product(device: torch.device) -> None:
    hidden, weight = random(70, 64, device=device), random(2 * 72, 64, device=device) * 0.2
    gate, up = F.linear(hidden, weight).chunk(2, dim=1)
    got = silu_matmul(hidden, weight, (32, 16, 32, 4, 2))
    torch.testing.assert_close(got, F.silu(gate) * up, atol=2e-3, rtol=2e-3)
