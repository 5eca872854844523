"""Runs steps on a GPU: decode steps and short steps with prompts as CUDA graphs, longer ones kernel by kernel.

A decode step is one copy of a small array and the launch of one graph, captured for each batch
size of a few (a batch is padded to the next of them), with sampling inside. A step of a few hundred
tokens, of prompts and of decodes, is a graph as well: kernel by kernel the CPU would need longer to
launch it than the GPU to compute it. What a sequence needs from step to step stays on the GPU, in
the row of its slot: block table, last token, sampling parameters. So the host can launch a step
before it knows the tokens of the one before.
Where a row has a grammar or biases, the step draws its tokens a second time, after its graph: the masks
are computed while the model is.

The invariant: steps run in the order of their launch, on one stream. At most two are under way,
so the pinned memory that steps exchange with the host is used in turn.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from hasten.engine.config import EngineConfig, decode_buckets
from hasten.engine.cuda_rows import mask_logits, row_logprobs, sampled_token, to_gpu
from hasten.engine.logit_bias import add_biases, biases
from hasten.engine.model_runner import Collect, ModelRunner, OnCaptured
from hasten.engine.sampler import SampledToken, is_plain
from hasten.engine.scheduler import Schedule, ScheduledChunk
from hasten.engine.sequence import Sequence, uniform
from hasten.engine.step_graph import StepGraph
from hasten.engine.step_tokens import TokenLayout, chunk_tiles, step_array
from hasten.kernels.cuda.attention import CudaAttention, DecodeRows, StepTokens
from hasten.kernels.cuda.ragged_attention import tokens_per_tile
from hasten.kernels.cuda.sample import GreedyWorkspace, SamplingState, greedy_rows, sample_rows
from hasten.kernels.cuda.step_io import begin_step, end_step
from hasten.kernels.kv_cache import KVCache
from hasten.kernels.phase import phase
from hasten.models.decoder import Decoder

STEPS_UNDER_WAY = 2

RING = STEPS_UNDER_WAY + 1
"""Pinned buffers: those of the steps under way, and one that the host fills."""

MIXED_LENGTHS = (
    *(16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 512),
    *(640, 768, 896, 1024, 1280, 1536, 1792, 2048),
)
"""Tokens that captured steps with prompts are filled up to. Not 448: cuBLAS takes longer for it than for 512."""

MIN_MIXED_LENGTH, MIXED_BYTES = 512, 16.8e12
"""Such steps are captured up to so many tokens, or up to this over the bytes of the weights: an H200 takes 22 ms for as
many, more than twice what a CPU needs to launch a step kernel by kernel."""

MIXED_SEQUENCES = 64
"""Sequences at most of such a step: more of them decode for longer than it takes to launch."""

MIXED_CONTEXT = 4096
"""Tokens at most that one of its sequences may see: a tile reads its context alone (`ragged_attention`)."""

HEADER = 4
"""int32 values before the rows of a step's input; the first says which pinned row takes its tokens."""

WORDS = 5
"""int32 values of a row: its random number takes two, its slot, position and block one each."""


@dataclass(frozen=True)
class Rows:
    """A step's rows on the GPU.

    Args:
        uniforms: [rows] float64.
        slots, positions, blocks: [rows] int32, see `kernels.cuda.step_io`.
    """

    uniforms: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor

    def first(self, count: int) -> "Rows":
        return Rows(self.uniforms[:count], self.slots[:count], self.positions[:count], self.blocks[:count])


class CudaRunner(ModelRunner):
    """Runs steps of one model on one GPU."""

    is_asynchronous = True

    def __init__(self, decoder: Decoder, kv_cache: KVCache, config: EngineConfig) -> None:
        super().__init__(decoder, kv_cache, "cuda")
        assert isinstance(decoder.attention, CudaAttention)
        self._decoder, self._attention = decoder, decoder.attention
        self._buckets = decode_buckets(config.max_num_seqs)
        self._attention.prepare(config.max_num_seqs, config.max_model_tokens)
        max_seqs, max_blocks = config.max_num_seqs, -(-config.max_model_tokens // config.block_size)
        self._block_tables = torch.zeros(max_seqs, max_blocks, dtype=torch.int32, device="cuda")
        self._last_tokens = torch.zeros(max_seqs, dtype=torch.int32, device="cuda")
        self._greedy = GreedyWorkspace(max_seqs, "cuda")
        self._sampling = SamplingState(max_seqs, decoder.config.vocab_size, "cuda")
        self._input = torch.zeros(HEADER + WORDS * max_seqs, dtype=torch.int32, device="cuda")
        self._host_inputs = torch.zeros(RING, self._input.numel(), dtype=torch.int32).pin_memory()
        self._host_tokens = torch.zeros(RING, max_seqs, dtype=torch.int32).pin_memory()
        self._input_arrays, self._token_arrays = self._host_inputs.numpy(), self._host_tokens.numpy()
        self._num_steps = 0
        self._sampled_slots: set[int] = set()
        self._graphs: dict[tuple[str, int, bool], StepGraph] = {}
        self._mixed_rows = min(MIXED_SEQUENCES, max_seqs)
        self._max_model_tokens = config.max_model_tokens
        self._max_prompt_tokens = min(config.max_model_tokens, config.max_num_batched_tokens)
        longest = min(
            max(MIN_MIXED_LENGTH, MIXED_BYTES / decoder.weight_bytes_per_token), config.max_num_batched_tokens
        )
        self._lengths = tuple(length for length in MIXED_LENGTHS if length <= longest)
        largest = max((self._layout(length).size for length in self._lengths), default=0)
        self._step = torch.zeros(largest, dtype=torch.int32, device="cuda")
        self._tokens = torch.zeros(max_seqs, dtype=torch.int32, device="cuda")
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream()
        with torch.cuda.stream(self._capture_stream):
            self._reserve = torch.empty(1, device="cuda")  # room for a graph's state: product_tuning.time_in_turns

    def prepare(self, on_captured: OnCaptured | None = None) -> None:
        """Captures every step, greedy and with sampling, so that no request waits for a capture."""
        # the largest first: the others fit into its memory
        steps = [("mixed", length, True) for length in reversed(self._lengths)]
        for bucket in reversed(self._buckets):
            has_long = self._attention.is_long(bucket, self._max_model_tokens)
            kinds = ("decode", "long decode") if has_long else ("decode",)
            steps += [(kind, bucket, is_greedy) for kind in kinds for is_greedy in (True, False)]
        for number, (kind, bucket, is_greedy) in enumerate(steps, 1):
            self._graph(kind, bucket, is_greedy=is_greedy)
            if on_captured is not None:
                on_captured(number, len(steps))
        with torch.inference_mode():
            self._attention.prepare_prompts(self._max_prompt_tokens, self._kv_cache)

    def launch(self, schedule: Schedule) -> Collect:
        decodes = [chunk for chunk in schedule.chunks if chunk.is_decode]
        prompts = [chunk for chunk in schedule.chunks if not chunk.is_decode]
        drawing = [*decodes, *(chunk for chunk in prompts if chunk.samples)]
        for chunk in drawing[len(decodes) :]:
            self._enter(chunk.sequence)
        ring = self._num_steps % RING
        self._num_steps += 1
        is_plain_step = all(is_plain(chunk.sequence.sampling) for chunk in drawing)
        masked = {row: matcher for row, chunk in enumerate(drawing) if (matcher := chunk.sequence.matcher) is not None}
        added = biases((chunk.sequence, _num_output_tokens(chunk)) for chunk in drawing)
        is_drawn_twice = bool(masked or added)
        is_greedy = is_plain_step or is_drawn_twice  # a first draw that a second follows must not count its tokens
        with torch.inference_mode():
            if prompts:
                with phase("prefill", on_gpu=True):
                    logits, tokens = self._run_prompts(decodes, prompts, drawing, ring, is_greedy=is_greedy)
            else:
                with phase("decode", on_gpu=True):
                    logits, tokens = self._run_decodes(decodes, ring, is_greedy=is_greedy)
            if masked:
                mask_logits(logits, masked)
            if added:
                add_biases(logits, added, to_gpu)
            if is_drawn_twice:
                self._draw(logits, self._rows(len(tokens)), tokens, is_greedy=is_plain_step)
            logprobs = row_logprobs(drawing, logits, tokens)
        done = torch.cuda.Event()
        done.record()
        places = {id(chunk): row for row, chunk in enumerate(drawing)}
        rows = [places[id(chunk)] for chunk in schedule.chunks if chunk.samples]

        def collect() -> list[SampledToken]:
            done.synchronize()
            token_ids = self._token_arrays[ring].tolist()
            return [sampled_token(token_ids[row], logprobs.get(row)) for row in rows]

        return collect

    def _enter(self, sequence: Sequence) -> None:
        """Writes a sequence's sampling parameters to its slot, when its prompt is about to be complete."""
        slot, is_sampled = sequence.slot, not is_plain(sequence.sampling)
        assert slot is not None, "it runs"
        if is_sampled or slot in self._sampled_slots:
            num_prompt_tokens = sequence.num_prompt_tokens
            prompt, output = sequence.token_ids[:num_prompt_tokens], sequence.token_ids[num_prompt_tokens:]
            self._sampling.set_slot(slot, sequence.sampling, prompt, output)
            (self._sampled_slots.add if is_sampled else self._sampled_slots.discard)(slot)

    def _run_decodes(
        self, chunks: Items[ScheduledChunk], ring: int, *, is_greedy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bucket = next(bucket for bucket in self._buckets if bucket >= len(chunks))
        is_long = self._attention.is_long(bucket, max(chunk.start for chunk in chunks) + 1)
        captured = self._graph("long decode" if is_long else "decode", bucket, is_greedy=is_greedy)
        self._send(chunks, bucket, ring)
        captured.graph.replay()
        return captured.logits, self._tokens[:bucket]

    def _run_prompts(
        self,
        decodes: Items[ScheduledChunk],
        prompts: Items[ScheduledChunk],
        drawing: Items[ScheduledChunk],
        ring: int,
        *,
        is_greedy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = self._captured_length((*decodes, *prompts))
        if length is not None:
            self._graph("mixed", length)  # a capture overwrites the rows that are sent
        rows = self._send(drawing, len(drawing), ring)
        if length is not None:
            logits = self._replay_prompts(decodes, prompts, rows, length)
        else:
            logits = self._compute_prompts(decodes, prompts, rows)
        tokens = self._tokens[: len(drawing)]
        if drawing:
            self._draw(logits, rows, tokens, is_greedy=is_greedy)
        return logits, tokens

    def _replay_prompts(
        self, decodes: Items[ScheduledChunk], prompts: Items[ScheduledChunk], rows: Rows, length: int
    ) -> torch.Tensor:
        """The logits of a step that is filled up to a captured one."""
        layout, captured = self._layout(length), self._graph("mixed", length)
        tiles = chunk_tiles((*decodes, *prompts), 0, self._attention.group)
        step = self._step[: layout.size].copy_(self._send_tokens(decodes, prompts, tiles, layout))
        if decodes:
            self._begin(rows.first(len(decodes)), step[: len(decodes)])
        captured.graph.replay()
        return captured.logits[: len(rows.slots)]

    def _compute_prompts(
        self, decodes: Items[ScheduledChunk], prompts: Items[ScheduledChunk], rows: Rows
    ) -> torch.Tensor:
        """The logits of a step, launched kernel by kernel."""
        tiles = chunk_tiles(prompts, len(decodes), self._attention.group)
        num_tokens = sum(chunk.num_tokens for chunk in (*decodes, *prompts))
        layout = TokenLayout(num_tokens, len(tiles), len(rows.slots))
        step = self._send_tokens(decodes, prompts, tiles, layout)
        token_ids, tokens, wanted = self._split(step, layout)
        if decodes:
            first = rows.first(len(decodes))
            self._begin(first, token_ids[: len(decodes)])
            decode_rows = DecodeRows(first.slots, first.positions, self._block_tables)
            attend = self._attention.mixed(decode_rows, tokens, self._kv_cache)
        elif len(prompts) == 1 and prompts[0].start == 0:
            attend = self._attention.prompt(tokens, self._kv_cache)
        else:
            attend = self._attention.ragged(tokens, self._kv_cache)
        return self._decoder.compute(token_ids, attend, wanted)

    def _captured_length(self, chunks: Items[ScheduledChunk]) -> int | None:
        """Tokens that a step with prompts is filled up to if there is a graph for it."""
        context = max(chunk.start + chunk.num_tokens for chunk in chunks)
        if len(chunks) > self._mixed_rows or context > MIXED_CONTEXT:
            return None
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        return next((length for length in self._lengths if length >= num_tokens), None)

    def _layout(self, length: int) -> TokenLayout:
        """Of a captured step with prompts."""
        num_tiles = length // tokens_per_tile(self._attention.group) + self._mixed_rows
        return TokenLayout(length, num_tiles, self._mixed_rows)

    def _send_tokens(
        self, decodes: Items[ScheduledChunk], prompts: Items[ScheduledChunk], tiles: np.ndarray, layout: TokenLayout
    ) -> torch.Tensor:
        """The step on the GPU; the prompts' block tables are written as well."""
        array = step_array((*decodes, *prompts), tiles, layout, self._block_size)
        owners = np.array([chunk.sequence.slot for chunk in prompts], dtype=np.int32)
        num_blocks = [-(-(chunk.start + chunk.num_tokens) // self._block_size) for chunk in prompts]
        blocks = np.zeros((len(prompts), max(num_blocks)), dtype=np.int32)
        for row, chunk, count in zip(blocks, prompts, num_blocks, strict=True):
            row[:count] = chunk.sequence.table.block_ids[:count]
        sent = to_gpu(np.concatenate((array, owners, blocks.ravel())))
        step, sent_owners, sent_blocks = sent.split([len(array), len(owners), blocks.size])
        self._block_tables[:, : blocks.shape[1]].index_copy_(0, sent_owners.long(), sent_blocks.view(blocks.shape))
        return step

    def _split(self, step: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, StepTokens, torch.Tensor]:
        """Token ids, what attention reads, and the tokens whose logits are wanted."""
        token_ids, positions, slots, tiles, wanted = layout.split(step)
        return token_ids, StepTokens(positions, slots, tiles, self._block_tables), wanted

    def _send(self, chunks: Items[ScheduledChunk], num_rows: int, ring: int) -> Rows:
        """Copies the input of the chunks' rows to the GPU; rows without a chunk fill up a bucket."""
        count, num_values = len(chunks), HEADER + WORDS * num_rows
        array = self._input_arrays[ring, :num_values]
        array[0] = ring
        uniforms = array[HEADER : HEADER + 2 * num_rows].view(np.float64)
        slots, positions, blocks = array[HEADER + 2 * num_rows :].reshape(3, num_rows)
        last = [chunk.start + chunk.num_tokens - 1 for chunk in chunks]
        uniforms[:count] = [_uniform(chunk) for chunk in chunks]
        slots[:count] = [chunk.sequence.slot for chunk in chunks]
        positions[:count] = last
        blocks[:count] = [
            chunk.sequence.table.block_ids[position // self._block_size]
            for chunk, position in zip(chunks, last, strict=True)
        ]
        slots[count:] = positions[count:] = -1
        self._input[:num_values].copy_(self._host_inputs[ring, :num_values], non_blocking=True)
        return self._rows(num_rows)

    def _rows(self, num_rows: int) -> Rows:
        uniforms = self._input[HEADER : HEADER + 2 * num_rows].view(torch.float64)
        ints = self._input[HEADER + 2 * num_rows : HEADER + WORDS * num_rows].view(3, num_rows)
        return Rows(uniforms, *ints.unbind())

    def _begin(self, rows: Rows, token_ids: torch.Tensor) -> None:
        begin_step(
            rows.slots,
            rows.positions,
            rows.blocks,
            self._last_tokens,
            self._block_tables,
            token_ids,
            self._block_size,
        )

    def _draw(self, logits: torch.Tensor, rows: Rows, tokens: torch.Tensor, *, is_greedy: bool) -> None:
        """Chooses a token for each row, keeps it and sends it to the host."""
        with phase("sampling", on_gpu=True):
            if is_greedy:
                greedy_rows(logits, tokens, self._greedy)
            else:
                sample_rows(logits, rows.slots, rows.uniforms, self._sampling, tokens)
        end_step(tokens, rows.slots, rows.positions, self._input[:1], self._last_tokens, self._host_tokens)

    def _graph(self, kind: str, bucket: int, *, is_greedy: bool = True) -> StepGraph:
        key = kind, bucket, is_greedy
        if key not in self._graphs:
            if kind == "mixed":
                step = self._mixed_step(bucket)
            else:
                step = self._decode_step(bucket, is_long=kind == "long decode", is_greedy=is_greedy)
            self._graphs[key] = self._captured(step)
        return self._graphs[key]

    def _decode_step(self, bucket: int, *, is_long: bool, is_greedy: bool) -> Callable[[], torch.Tensor]:
        rows = self._rows(bucket)
        token_ids = torch.zeros(bucket, dtype=torch.int32, device="cuda")
        decode_rows = DecodeRows(rows.slots, rows.positions, self._block_tables)
        attend = self._attention.decode(decode_rows, self._kv_cache, is_long=is_long)

        def step() -> torch.Tensor:
            self._begin(rows, token_ids)
            logits = self._decoder.compute(token_ids, attend)
            self._draw(logits, rows, self._tokens[:bucket], is_greedy=is_greedy)
            return logits

        return step

    def _mixed_step(self, length: int) -> Callable[[], torch.Tensor]:
        """A step with prompts, filled up to the length; whoever replays it draws the tokens."""
        layout = self._layout(length)
        token_ids, tokens, wanted = self._split(self._step[: layout.size], layout)
        attend = self._attention.ragged(tokens, self._kv_cache)
        self._step.zero_()
        tokens.slot_mapping.fill_(-1)  # nothing is written to the cache while kernels are loaded
        return lambda: self._decoder.compute(token_ids, attend, wanted)

    def _captured(self, step: Callable[[], torch.Tensor]) -> StepGraph:
        with torch.inference_mode():
            self._input.fill_(-1)  # rows that fill up a bucket: nothing is written while kernels are loaded
            self._input[0] = 0
            return StepGraph.capture(step, self._pool, self._capture_stream)


def _uniform(chunk: ScheduledChunk) -> float:
    sequence = chunk.sequence
    if sequence.random_seed is None:
        return 0.0
    return uniform(sequence.random_seed, _num_output_tokens(chunk))


def _num_output_tokens(chunk: ScheduledChunk) -> int:
    """Tokens of the output before the one that the chunk draws."""
    return chunk.start + chunk.num_tokens - chunk.sequence.num_prompt_tokens
