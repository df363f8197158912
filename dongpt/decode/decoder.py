"""Autoregressive decoding: KV cache, prefill, decode steps and CUDA graphs.

GPT.generate, dongpt.load and chat.py use stream(). `model` is always a GPT; the class is not imported because model.py
imports this module. Shapes are as in model.py. R is the number of sequences being encoded, out of a batch of B.
"""

import contextlib
from itertools import chain, takewhile
from typing import Any, Collection, Iterator, NamedTuple, Sequence

import numpy as np
import torch

from dongpt.decode.sampling import INVALID_ID, DecodingError, Sampling, check_inputs, context_len, penalize, sample_ids
from dongpt.kernels import cpu

N_BUFFERED_UNIFORMS = 64  # random numbers drawn at a time for each sequence
PREFILL_CHUNK_TOKENS = 8192  # maximum number of tokens per forward pass
GRAPH_BUCKET_TOKENS = 128  # cache lengths of CUDA graphs are multiples of this


@torch.no_grad()
def stream(
    model: Any,
    prompts: Any,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None = None,
    use_kv_cache: bool = True,
    stop_ids: Collection[int] = (),
    n_ids: int | None = None,
    decoder: "Decoder | None" = None,
) -> Iterator[torch.Tensor]:
    """Yield the next id of every sequence, (B,) int64 on the CPU; see GPT.stream.

    If decoder has reuse_prefix=True, the prefix that a prompt shares with its previous context is not encoded again.
    """
    n_ids = model.config.vocab_size if n_ids is None else n_ids
    prompts = check_inputs(prompts, model.config.vocab_size, n_ids, max_new_tokens)
    seed = int(torch.randint(2**62, ())) if seed is None else int(seed)
    if decoder is None:
        capacity = min(max(map(len, prompts)) + max_new_tokens, model.config.block_size)
        decoder = Decoder.for_model(model, len(prompts), use_kv_cache, capacity)
    assert decoder.model is model
    decoder.set_sampling(sampling, n_ids)
    is_finished = [False] * len(prompts)
    for next_ids in decoder.generate_ids(prompts, seed, max_new_tokens):
        next_ids = [-1 if done else i for i, done in zip(next_ids, is_finished)]
        if INVALID_ID in next_ids:
            remedy = "use dtype=float32, or an earlier checkpoint if training diverged"
            raise DecodingError(f"the model's logits are not finite: {remedy}")
        yield torch.tensor(next_ids)
        is_finished = [done or i in stop_ids for i, done in zip(next_ids, is_finished)]
        if all(is_finished):
            return


# ----------------------------------------------------------------------------------------------------------------------
# KV cache


class LayerCache(NamedTuple):
    """One layer of the KV cache, with the positions to write."""

    keys: torch.Tensor  # (B, nh, capacity, hs)
    values: torch.Tensor  # (B, nh, capacity, hs)
    batch: slice | torch.Tensor  # sequences being encoded: a slice, or their indices (R,)
    positions: torch.Tensor  # positions of the tokens being encoded: (T,), or (R, T) if sequences differ
    start: int | None  # first position if all sequences have the same consecutive positions, or None
    cache_len: int  # S: length of the longest sequence, including the tokens being encoded

    def extend(self, k, v):
        """Store k and v (R, nh, T, hs) of the new tokens; return all cached keys and values, (R, nh, S, hs) each."""
        for buffer, new_kv in ((self.keys, k), (self.values, v)):
            if self.start is not None:
                buffer[self.batch, :, self.start : self.cache_len] = new_kv
            else:
                rows = torch.arange(len(new_kv), device=new_kv.device) if isinstance(self.batch, slice) else self.batch
                buffer[rows[:, None], :, self.positions] = new_kv.transpose(1, 2).to(buffer.dtype)
        # views for a slice, copies for an index tensor
        return self.keys[self.batch, :, : self.cache_len], self.values[self.batch, :, : self.cache_len]


class KVCache:
    """Keys and values of previous tokens, so that only new tokens need to be encoded.

    Memory for `capacity` tokens per sequence (default: block_size) is allocated up front. Sequences may differ in
    length. Entries beyond a sequence's newest token are undefined; they are masked and later overwritten.
    """

    def __init__(self, model: Any, batch_size: int, capacity: int | None = None):
        config, self.dtype = model.config, _cache_dtype(model)
        shape = batch_size, config.n_head, capacity or config.block_size, config.n_embd // config.n_head
        options: Any = dict(device=model.device, dtype=self.dtype)
        self.layers = [[torch.zeros(shape, **options), torch.zeros(shape, **options)] for _ in model.transformer.h]

    def layer_caches(self, positions, cache_len: int, start: int | None = None, batch=slice(None)) -> list[LayerCache]:
        """Return the cache of each layer for writing tokens at positions (T,) or (R, T) of `batch`; see LayerCache."""
        return [LayerCache(keys, values, batch, positions, start, cache_len) for keys, values in self.layers]


def _cache_dtype(model: Any) -> torch.dtype:
    """Return the dtype in which the model computes keys and values."""
    device_type, dtype = model.device.type, model.transformer.wte.weight.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype


def previous_ids(tokens, positions, n: int):
    """Return the n ids before positions[i] in each row i of tokens (B, T): (B, n), padded with -1; None if n = 0."""
    if not n:
        return None
    indices = positions[:, None] + torch.arange(-n, 0, device=tokens.device)
    return tokens.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -1)


# ----------------------------------------------------------------------------------------------------------------------
# decoding


class Decoder:
    """Decoding state of a batch: token buffer, KV cache, sampling settings.

    Buffers are static, so that a step can be captured as a CUDA graph. Steps do not wait for the previous ids, because
    the length of the context depends only on the number of tokens.

    capacity: see KVCache. reuse_prefix: encode only the part of the next prompt that is not in the cache yet (requires
    batch size 1).
    """

    def __init__(self, model: Any, batch_size: int, use_kv_cache=True, capacity: int | None = None, reuse_prefix=False):
        self.model, self.reuse_prefix, self.capacity = model, reuse_prefix, capacity
        self.device, self.block_size, B = model.device, model.config.block_size, batch_size
        self.lengths = [0] * B  # number of tokens in the context of each sequence
        self.tokens = torch.zeros(
            B, self.block_size + 1, dtype=torch.int64, device=self.device
        )  # undefined beyond lengths
        self.last_positions = torch.zeros(B, dtype=torch.int64, device=self.device)  # positions of the newest tokens
        # MPS does not support float64, so ids are sampled on the CPU there
        uniforms_device = "cpu" if self.device.type == "mps" else self.device
        self.uniforms = torch.zeros(N_BUFFERED_UNIFORMS, B, dtype=torch.float64, device=uniforms_device)
        self.next_uniform = torch.zeros(1, dtype=torch.int64, device=uniforms_device)  # next row of uniforms
        self.next_ids = torch.zeros(B, dtype=torch.int64, device=self.device)
        self.cache = KVCache(model, B, capacity) if use_kv_cache and model.can_cache else None
        self.num_previous = model.config.ngrams - 1  # number of previous tokens that an embedding depends on
        self.packed_blocks: cpu.PackedBlocks | None = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # captured decode steps, by cache length
        self.weights_version: tuple = ()  # version of the weights that the cache was computed with
        self.weight_checksums: list[int] = []  # checksums of these weights
        self.key: tuple = ()  # see for_model
        self.in_use = False
        self.sampling, self.n_ids = Sampling(), model.config.vocab_size
        self.seen_mask: torch.Tensor | None = None  # (B, V): ids in each sequence, for the repetition penalty

    @classmethod
    def for_model(cls, model: Any, batch_size: int, use_kv_cache: bool, capacity: int) -> "Decoder":
        """Create a Decoder for `capacity` tokens per sequence; on CUDA, reuse the model's previous one if possible."""
        if model.device.type != "cuda" or model.training or any(p.requires_grad for p in model.parameters()):
            return cls(model, batch_size, use_kv_cache, capacity)  # do not keep buffers while a model is being trained
        decoder, key = model.__dict__.get("_decoder"), (batch_size, use_kv_cache, _weights_version(model))
        if decoder is None or decoder.in_use or decoder.key != key:
            decoder = cls(model, batch_size, use_kv_cache)  # with space for block_size tokens, so that it can be reused
            model.__dict__["_decoder"], decoder.key = decoder, key
        return decoder

    def set_sampling(self, sampling: Sampling, n_ids: int):
        """Set the sampling parameters. Only ids below n_ids will be sampled."""
        if (sampling, n_ids) == (self.sampling, self.n_ids):
            return
        self.sampling, self.n_ids = sampling, n_ids
        self.graphs.clear()  # captured with the old settings
        self.seen_mask = None
        if sampling.repetition_penalty not in (None, 1):
            shape = len(self.lengths), self.model.config.vocab_size
            self.seen_mask = torch.zeros(shape, dtype=torch.bool).to(self.device)

    def generate_ids(self, prompts: list[list[int]], seed: int, max_new_tokens: int) -> Iterator[list[int]]:
        """Yield the next id of each sequence, max_new_tokens times.

        On a GPU, the next step is already queued when the ids arrive, so stop conditions are checked one step late.
        """
        self.in_use = True
        copied_ids: Any = None
        copy_event: Any = None
        is_small_model = self.device.type == "cpu" and self.model.get_num_matmul_params() < cpu.PACKING_MIN_PARAMS
        try:
            with _limited_threads(is_small_model):
                self.prefill(prompts, max_new_tokens)
            bit_generators = [np.random.Philox(key=seed % 2**64 + (i << 64)) for i in range(len(prompts))]
            generators = [np.random.Generator(bit_generator) for bit_generator in bit_generators]
            for i in range(max_new_tokens):
                with _limited_threads(is_small_model):
                    if i % N_BUFFERED_UNIFORMS == 0:
                        random_numbers = np.array([generator.random(N_BUFFERED_UNIFORMS) for generator in generators]).T
                        self.uniforms.copy_(torch.from_numpy(random_numbers))
                        self.next_uniform.zero_()
                    self.truncate_context()
                    self.decode_step()
                self.lengths = [length + 1 for length in self.lengths]
                if self.device.type != "cuda":
                    yield self.next_ids.tolist()
                    continue
                if copied_ids is not None:
                    copy_event.synchronize()
                    yield copied_ids.tolist()
                copied_ids = self.next_ids.to("cpu", non_blocking=True)
                copy_event = torch.cuda.current_stream().record_event()
            if copied_ids is not None:
                copy_event.synchronize()
                yield copied_ids.tolist()
        finally:
            self.in_use = False

    def prefill(self, prompts: list[list[int]], max_new_tokens: int):
        """Load the prompts and encode all tokens except the last token of each prompt."""
        windows = [prompt[-context_len(len(prompt), self.block_size) :] for prompt in prompts]
        if self.cache and self.cache.dtype != _cache_dtype(self.model):
            self.cache = KVCache(self.model, len(prompts), self.capacity)
        can_pack = self.cache is not None and self.cache.dtype == torch.float32 and not self.model.training
        self.packed_blocks = cpu.make_packed_blocks(self.model, max_new_tokens) if can_pack else None
        cached_len = self._cached_prefix_len(windows[0]) if self.reuse_prefix else 0
        self.lengths = [len(window) for window in windows]
        max_len = max(self.lengths)
        padded_ids = torch.tensor([window + [0] * (max_len - len(window)) for window in windows])
        self.tokens[:, :max_len] = padded_ids.to(self.device)
        self.last_positions.copy_(torch.tensor(self.lengths) - 1)
        if self.seen_mask is not None:
            self.seen_mask.zero_()
            for i, prompt in enumerate(prompts):
                self.seen_mask[i, prompt] = True
        if self.cache:
            if self.device.type == "cuda" and not cached_len:  # masked entries must be finite
                for buffer in chain(*self.cache.layers):
                    buffer.zero_()
            self._encode(range(len(prompts)), all(window == windows[0] for window in windows), cached_len)

    def _cached_prefix_len(self, prompt_ids: list[int]) -> int:
        """Return the number of leading prompt_ids, excluding the last, that are cached for the current weights."""
        # Only checksums detect writes through .data. Frozen weights are skipped because checksums take time.
        int_dtypes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        trained_weights = [p.detach() for p in self.model.parameters() if p.requires_grad]
        checksums = [int(weight.view(int_dtypes[weight.element_size()]).sum()) for weight in trained_weights]
        version = _weights_version(self.model)
        is_stale = version != self.weights_version or checksums not in ([], self.weight_checksums)
        self.weights_version, self.weight_checksums = version, checksums
        if is_stale:
            return 0
        cached_and_new_ids = zip(self.tokens[0, : max(0, self.lengths[0] - 1)].tolist(), prompt_ids[:-1])
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], cached_and_new_ids))

    def truncate_context(self):
        """Truncate sequences longer than block_size to their newest half, and encode it again from position 0."""
        full_rows = [i for i, length in enumerate(self.lengths) if length > self.block_size]
        if not full_rows:
            return
        half_len = context_len(self.block_size + 1, self.block_size)
        self.tokens[full_rows, :half_len] = self.tokens[full_rows, self.block_size + 1 - half_len :]
        self.last_positions[full_rows] = half_len - 1
        for i in full_rows:
            self.lengths[i] = half_len
        if self.cache:
            self._encode(full_rows, False)

    def _encode(self, rows: Sequence[int], same_prompts: bool, start: int = 0):
        """Encode these sequences into the cache, from position `start` up to the second-to-last token.

        With same_prompts=True, one sequence is encoded and copied to the others.
        """
        assert self.cache
        end_position = max(self.lengths[i] for i in rows) - 1
        row_index: slice | torch.Tensor = slice(0, 1) if same_prompts else slice(None)
        if not same_prompts and len(rows) < len(self.lengths):
            row_index = torch.tensor(rows, device=self.device)
        tokens = self.tokens[row_index]
        chunk_len = max(1, PREFILL_CHUNK_TOKENS // len(tokens))
        for chunk_start in range(start, end_position, chunk_len):
            chunk_end = min(chunk_start + chunk_len, end_position)
            positions = torch.arange(chunk_start, chunk_end, device=self.device)
            prev_ids = previous_ids(tokens, torch.full_like(tokens[:, 0], chunk_start), self.num_previous)
            caches = self.cache.layer_caches(positions, chunk_end, chunk_start, row_index)
            self.model.hidden_states(
                tokens[:, chunk_start:chunk_end], positions, caches, prev_ids, tokens[:, :chunk_end]
            )
        for buffer in chain(*self.cache.layers) if same_prompts else ():
            buffer[1:, :, :end_position] = buffer[:1, :, :end_position]

    def decode_step(self):
        """Sample one id for each sequence."""
        max_len = max(self.lengths)
        # no graphs under autocast, which frees its copies of the weights when it exits
        if self.cache and self.device.type == "cuda" and not torch.is_autocast_enabled("cuda"):
            self._replay_graph(min(-(-max_len // GRAPH_BUCKET_TOKENS) * GRAPH_BUCKET_TOKENS, self.block_size))
        else:
            start = max_len - 1 if min(self.lengths) == max_len else None
            self._sample(self._logits(max_len, start))

    def _logits(self, cache_len: int, start: int | None):
        """Return logits (B, V) after adding the newest tokens to the cache. start: their common position, if any."""
        model, tokens = self.model, self.tokens[:, :cache_len]
        if self.cache is None:
            return model.logits_at(tokens, self.last_positions)
        newest_ids = self.tokens.gather(1, self.last_positions[:, None])  # (B, 1)
        prev_ids = previous_ids(self.tokens, self.last_positions, self.num_previous)
        positions = self.last_positions[:1] if start is not None else self.last_positions[:, None]
        caches = self.cache.layer_caches(positions, cache_len, start)
        if self.packed_blocks is None:
            return model.lm_head(model.hidden_states(newest_ids, positions, caches, prev_ids, tokens)[:, 0])
        x = model.embed(newest_ids, positions, prev_ids)
        x = self.packed_blocks.blocks(x, model.attention_inputs(positions, caches[0], tokens), caches)
        return self.packed_blocks.head(model.transformer.ln_f(x)[:, 0])

    def _sample(self, logits):
        """Sample an id from each row of logits (B, V) and append it to its sequence."""
        if self.seen_mask is not None:
            logits = penalize(logits.float(), self.seen_mask, self.sampling.repetition_penalty or 1)
        uniforms = self.uniforms.index_select(0, self.next_uniform)[0]
        self.next_ids.copy_(sample_ids(logits[:, : self.n_ids], uniforms, self.sampling))
        self.next_uniform += 1
        self.last_positions += 1
        ids = self.next_ids[:, None].clamp(min=0)  # (B, 1)
        self.tokens.scatter_(1, self.last_positions[:, None], ids)
        if self.seen_mask is not None:
            self.seen_mask.scatter_(1, ids, True)

    def _replay_graph(self, cache_len: int):
        """Run a decode step as a CUDA graph; without graphs, small models spend most of the time launching kernels."""
        if cache_len not in self.graphs:
            state = [t for t in (self.next_uniform, self.last_positions, self.tokens, self.seen_mask) if t is not None]
            saved_values = [t.clone() for t in state]
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):  # warm-up on a side stream, as torch.cuda.graph requires
                for _ in range(3):
                    self._sample(self._logits(cache_len, None))
                    for tensor, value in zip(state, saved_values):
                        tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(side_stream)
            self.graphs[cache_len] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[cache_len]):
                self._sample(self._logits(cache_len, None))
        self.graphs[cache_len].replay()


def _weights_version(model: Any) -> tuple:
    """Return a value that changes when cached keys and values become stale, such as after weight updates."""
    tensors = [*model.parameters(), *model.buffers()]
    tensor_versions = [(t.data_ptr(), t.dtype, -1 if t.is_inference() else t._version) for t in tensors]
    return (*tensor_versions, model.config, model.document_end_id, model.training, _cache_dtype(model))


@contextlib.contextmanager
def _limited_threads(is_small_model: bool) -> Iterator[None]:
    """Use one CPU thread for a small model, since several would spend more time waiting than computing.

    The limit is set for each token, so that the caller of a stream keeps its own number of threads.
    """
    n_threads = torch.get_num_threads()
    if is_small_model and n_threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if is_small_model and n_threads > 1:
            torch.set_num_threads(n_threads)
