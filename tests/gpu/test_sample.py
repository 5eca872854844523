"""Sampling on the GPU gives the engine sampler's tokens at real vocabulary sizes, and the distribution it should."""

import math

import pytest
import torch

from hasten.engine.sampler import filter_scores, penalize
from hasten.engine.sequence import uniform
from hasten.request import SamplingParams
from sampling_checks import check_drawn_token

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

VOCAB_SIZES = [32000, 128256, 151936]
SAMPLINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
    SamplingParams(temperature=1.0, top_p=0.95, repetition_penalty=1.2),
    SamplingParams(temperature=1.5, top_k=5000, min_p=0.01),
    SamplingParams(temperature=0.2, top_k=1),
    SamplingParams(frequency_penalty=0.5, presence_penalty=0.5),
    SamplingParams(temperature=3.0, top_p=0.5, frequency_penalty=-0.5),
]


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_tokens_are_those_of_the_engines_sampler(vocab_size: int, rows: int, scale: float) -> None:
    from hasten.kernels.cuda.sample import SamplingState, sample_rows

    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows + 1, vocab_size, generator=generator) * scale
    if scale == 0.05:
        logits[:, 11] = -60.0  # all others in few bins: more than the list of candidates holds
    history = torch.randint(0, vocab_size, (rows, 60), generator=generator).tolist()
    samplings = [SAMPLINGS[row % len(SAMPLINGS)] for row in range(rows)]
    state = SamplingState(rows, vocab_size, "cuda", max_rows=rows + 1)
    slots = list(reversed(range(rows)))
    state.set_slots(slots, samplings, [each[:40] for each in history], [each[40:] for each in history])
    uniforms = torch.tensor([uniform(7, row) for row in range(rows + 1)], dtype=torch.float64, device="cuda")
    on_device = logits.cuda()
    out = torch.full((rows + 1,), -7, device="cuda")
    slot_rows = torch.tensor([*slots, -1], dtype=torch.int32, device="cuda")
    sample_rows(on_device, slot_rows, uniforms, state, out)
    tokens = out.tolist()
    assert tokens[-1] == -7
    assert torch.equal(on_device[-1].cpu(), logits[-1])
    for row, sampling in enumerate(samplings):
        penalized = logits[row].cuda()
        penalize(penalized, sampling, history[row], 40)
        torch.testing.assert_close(on_device[row], penalized, rtol=1e-6, atol=1e-6)
        if sampling.is_greedy:
            assert tokens[row] == int(on_device[row].max(-1).indices)
        else:
            check_drawn_token(on_device[row], sampling, uniforms[row].item(), tokens[row], state.borders[row].item())


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_graph_replay_and_any_batch_give_the_same_tokens(sampling: SamplingParams) -> None:
    from hasten.kernels.cuda.sample import SamplingState, sample_rows

    rows, vocab_size = 130, 128256
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab_size, device="cuda") * 2
    uniforms = torch.rand(rows, dtype=torch.float64, device="cuda")
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    state = SamplingState(rows, vocab_size, "cuda")

    def enter() -> None:
        state.set_slots(list(range(rows)), [sampling] * rows, [[1, 2, 3]] * rows, [[row] for row in range(rows)])

    def tokens_of(start: int, end: int) -> list[int]:
        part, out = logits[start:end].clone(), torch.zeros(end - start, dtype=torch.int64, device="cuda")
        enter()
        sample_rows(part, slots[start:end], uniforms[start:end], state, out)
        return out.tolist()

    together = tokens_of(0, rows)
    assert [token for row in range(0, rows, 13) for token in tokens_of(row, row + 1)] == together[::13]
    assert tokens_of(40, 57) == together[40:57]
    static, out = logits.clone(), torch.zeros(rows, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_rows(static, slots, uniforms, state, out)
    for _ in range(2):
        static.copy_(logits)
        enter()
        graph.replay()
        assert out.tolist() == together
        out.fill_(-7)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0.9), SamplingParams(temperature=0.9, top_k=400, top_p=0.95)]
)
def test_draws_follow_the_distribution(sampling: SamplingParams) -> None:
    from hasten.kernels.cuda.sample import SamplingState, sample_rows

    rows, num_calls, vocab_size = 256, 400, 128256
    torch.manual_seed(1)
    logits = torch.randn(vocab_size, device="cuda") * 2
    state = SamplingState(rows, vocab_size, "cuda")
    state.set_slots(list(range(rows)), [sampling] * rows, [[]] * rows, [[]] * rows)
    batch, slots = logits.repeat(rows, 1), torch.arange(rows, dtype=torch.int32, device="cuda")
    numbers = torch.tensor(
        [[uniform(row, call) for row in range(rows)] for call in range(num_calls)], dtype=torch.float64, device="cuda"
    )
    out = torch.zeros(num_calls, rows, dtype=torch.int64, device="cuda")
    for call in range(num_calls):
        sample_rows(batch, slots, numbers[call], state, out[call])
    scores = logits.unsqueeze(0).clone()
    filter_scores(scores, [sampling])
    probabilities = scores[0].double().softmax(-1)
    # Tokens by probability, so that the likely ones are compared one by one and the others in lots.
    order = probabilities.argsort(descending=True)
    lots = torch.empty_like(order)
    lots[order] = (probabilities[order].cumsum(-1) * 100).long().clamp(max=99)
    expected = torch.zeros(100, dtype=torch.float64, device="cuda").index_add_(0, lots, probabilities) * out.numel()
    counts = torch.bincount(lots[out.flatten()], minlength=100)
    assert probabilities[out.flatten()].min() > 0
    filled = expected > 0
    chi_squared = ((counts - expected)[filled] ** 2 / expected[filled]).sum()
    freedom = int(filled.sum()) - 1
    assert chi_squared < freedom + 3.1 * math.sqrt(2 * freedom) + 7  # probability below 0.001


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy_rows_takes_the_first_of_the_largest(vocab_size: int, dtype: torch.dtype, rows: int) -> None:
    from hasten.kernels.cuda.sample import GreedyWorkspace, greedy_rows

    torch.manual_seed(0)
    workspace = GreedyWorkspace(rows, "cuda")
    for _ in range(5):
        logits = torch.randn(rows, vocab_size, device="cuda").to(dtype)  # bfloat16 has ties
        out = torch.full((rows,), -7, dtype=torch.int32, device="cuda")
        greedy_rows(logits, out, workspace)
        first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        assert out.tolist() == first.tolist()
    logits[-1, 7] = math.nan
    greedy_rows(logits, out, workspace)
    assert out[-1] == -1
