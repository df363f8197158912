"""Autoregressive decoding: KV cache, prefill, one token at a time, CUDA graphs.

GPT.generate and GPT.stream call stream(). `model` is always a GPT; it is not imported, because model.py imports this.
"""

import contextlib
from itertools import chain, takewhile
from typing import Any, Collection, Iterator, NamedTuple, Sequence

import numpy as np
import torch

from dongpt.decode.sampling import (
    NONFINITE_ID,
    DecodingError,
    Sampling,
    check_decoding,
    penalize,
    sample_ids,
    window_size,
)
from dongpt.kernels import cpu

UNIFORMS = 64  # random numbers drawn at a time for each sequence
PREFILL_TOKENS = 8192  # tokens encoded at a time
GRAPH_BUCKET = 128  # cache lengths of CUDA graphs are multiples of this


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

    A decoder made with reuse_prefix=True encodes only what differs from the text before.
    """
    n_ids = model.config.vocab_size if n_ids is None else n_ids
    prompts = check_decoding(prompts, model.config.vocab_size, n_ids, max_new_tokens, sampling)
    seed = int(torch.randint(2**62, ())) if seed is None else int(seed)
    if decoder is None:
        capacity = min(max(map(len, prompts)) + max_new_tokens, model.config.block_size)
        decoder = Decoder.for_model(model, len(prompts), capacity, sampling, n_ids, use_kv_cache)
    assert decoder.model is model
    decoder.set_sampling(sampling, n_ids)
    finished = [False] * len(prompts)
    for next_ids in decoder.generate_ids(prompts, seed, max_new_tokens):
        next_ids = [-1 if done else i for i, done in zip(next_ids, finished)]
        if NONFINITE_ID in next_ids:
            remedy = "use dtype=float32, or an earlier checkpoint if the training diverged"
            raise DecodingError(f"the model's logits are not finite: {remedy}")
        yield torch.tensor(next_ids)
        finished = [done or i in stop_ids for i, done in zip(next_ids, finished)]
        if all(finished):
            return


# ----------------------------------------------------------------------------------------------------------------------
# KV cache


class LayerCache(NamedTuple):
    """One layer of the KV cache, and the positions to write."""

    keys: torch.Tensor  # (B, nh, capacity, hs)
    values: torch.Tensor  # (B, nh, capacity, hs)
    batch: slice | torch.Tensor  # sequences being encoded: the first few, or their indices (R,)
    positions: torch.Tensor  # of the tokens being encoded: (T,), or (R, T) if the sequences differ
    start: int | None  # first of the positions if they are consecutive and the same for all sequences
    cache_len: int  # S: tokens in the longest sequence, those being encoded included

    def extend(self, k, v):
        """Store k, v (R, nh, T, hs) of the new tokens; return all keys and values so far, (R, nh, S, hs) each."""
        return self._store(self.keys, k), self._store(self.values, v)

    def _store(self, cached, new):
        if self.start is not None:
            cached[self.batch, :, self.start : self.cache_len] = new
        else:
            batch = torch.arange(len(new), device=new.device) if isinstance(self.batch, slice) else self.batch
            cached[batch[:, None], :, self.positions] = new.transpose(1, 2).to(cached.dtype)
        return cached[self.batch, :, : self.cache_len]  # a view for a slice, a copy for an index tensor


class KVCache:
    """Keys and values of the tokens so far, so that only new tokens are encoded.

    Memory for `capacity` tokens per sequence, by default block_size, is allocated once. Sequences may have different
    lengths: entries beyond a sequence's newest token are garbage that the mask hides and later tokens overwrite.
    """

    def __init__(self, model: Any, batch_size: int, capacity: int | None = None):
        config, self.dtype = model.config, _cache_dtype(model)
        shape = batch_size, config.n_head, capacity or config.block_size, config.n_embd // config.n_head
        options: Any = dict(device=model.device, dtype=self.dtype)
        self.layers = [[torch.zeros(shape, **options), torch.zeros(shape, **options)] for _ in model.transformer.h]

    def at(self, positions, cache_len: int, start: int | None = None, batch=slice(None)) -> list[LayerCache]:
        """The cache of each layer for writing tokens at positions (T,) or (R, T) of these sequences; see LayerCache."""
        return [LayerCache(keys, values, batch, positions, start, cache_len) for keys, values in self.layers]


def _cache_dtype(model: Any) -> torch.dtype:
    """The dtype in which the model computes keys and values."""
    kind, dtype = model.device.type, model.transformer.wte.weight.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def tokens_before(tokens, positions, n: int):
    """The n ids before positions[i] in sequence i of tokens (B, T): (B, n), -1 before the start; None for n = 0."""
    if not n:
        return None
    at = positions[:, None] + torch.arange(-n, 0, device=tokens.device)
    return tokens.gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)


# ----------------------------------------------------------------------------------------------------------------------
# decoding


class Decoder:
    """Decoding state of a batch: token buffer, KV cache, sampler.

    Buffers are static, so that a step can be captured as a CUDA graph. No step waits for the ids of another: which
    tokens are in the context depends only on how many there are.

    reuse_prefix: of the next prompt, encode only what follows the tokens that the cache holds already (batch size 1).
    """

    def __init__(
        self,
        model: Any,
        batch_size: int,
        sampling: Sampling,
        n_ids: int,
        use_kv_cache: bool,
        capacity: int | None = None,
        reuse_prefix: bool = False,
    ):
        self.model, self.reuse_prefix, self.capacity = model, reuse_prefix, capacity
        self.device, self.block_size, B = model.device, model.config.block_size, batch_size
        self.lengths = [0] * B  # tokens in the context of each sequence
        self.tokens = torch.zeros(B, self.block_size + 1, dtype=torch.int64, device=self.device)  # then garbage
        self.last = torch.zeros(B, dtype=torch.int64, device=self.device)  # positions of the newest tokens
        # float64, which MPS does not have: there ids are drawn on the CPU
        uniforms_device = "cpu" if self.device.type == "mps" else self.device
        self.uniforms = torch.zeros(UNIFORMS, B, dtype=torch.float64, device=uniforms_device)
        self.n_used = torch.zeros(1, dtype=torch.int64, device=uniforms_device)  # how many of the uniforms are used
        self.next_ids = torch.zeros(B, dtype=torch.int64, device=self.device)
        self.cache = KVCache(model, B, capacity) if use_kv_cache and model.can_cache else None
        self.n_before = model.config.ngrams - 1  # earlier tokens that the embedding of a token depends on
        self.backend: cpu.PackedBlocks | None = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # captured decode steps by cache length
        self.weights: tuple = (), []  # state and checksums of the weights that computed what the cache holds
        self.key: tuple = ()  # see for_model
        self.in_use = False
        self.sampling, self.n_ids = Sampling(), 0
        self.set_sampling(sampling, n_ids)

    @classmethod
    def for_model(
        cls, model: Any, batch_size: int, capacity: int, sampling: Sampling, n_ids: int, use_kv_cache: bool
    ) -> "Decoder":
        """A Decoder for `capacity` tokens per sequence; on CUDA the model's previous one if it fits."""
        settings, previous = (batch_size, sampling, n_ids, use_kv_cache), model.__dict__.get("_decoder")
        if model.device.type != "cuda" or model.training or any(p.requires_grad for p in model.parameters()):
            return cls(model, *settings, capacity)  # a model in training keeps no buffers
        key = settings, _state(model)
        if previous is None or previous.in_use or previous.key != key:
            previous = cls(model, *settings)  # capacity for block_size tokens, so that any text fits
            model.__dict__["_decoder"], previous.key = previous, key
        return previous

    def set_sampling(self, sampling: Sampling, n_ids: int):
        """Sample with these settings from now on."""
        if (sampling, n_ids) == (self.sampling, self.n_ids):
            return
        self.sampling, self.n_ids = sampling, n_ids
        self.graphs.clear()  # captured with the old settings
        self.seen = None  # (B, V): which ids each sequence contains, if the sampling depends on it
        if sampling.repetition_penalty not in (None, 1):
            self.seen = torch.zeros(len(self.lengths), self.model.config.vocab_size, dtype=torch.bool).to(self.device)

    def generate_ids(self, prompts: list[list[int]], seed: int, max_new_tokens: int) -> Iterator[list[int]]:
        """Yield the next id of each sequence, max_new_tokens times.

        On a GPU the next step is already queued when they arrive: stop conditions are checked one step late.
        """
        self.in_use, waiting = True, None
        small = self.device.type == "cpu" and self.model.get_num_matmul_params() < cpu.WORTH_PACKING
        try:
            with _decoding_threads(small):
                self.prefill(prompts, max_new_tokens)
            keys = [seed % 2**64 + (i << 64) for i in range(len(prompts))]
            generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
            for i in range(max_new_tokens):
                with _decoding_threads(small):
                    if i % UNIFORMS == 0:
                        numbers = np.array([generator.random(UNIFORMS) for generator in generators]).T
                        self.uniforms.copy_(torch.from_numpy(numbers))
                        self.n_used.zero_()
                    self.truncate_context()
                    self.decode_step()
                self.lengths = [length + 1 for length in self.lengths]
                if self.device.type != "cuda":
                    yield self.next_ids.tolist()
                    continue
                if waiting:
                    yield self._wait(*waiting)
                waiting = self.next_ids.to("cpu", non_blocking=True), torch.cuda.Event()
                waiting[1].record()
            if waiting:
                yield self._wait(*waiting)
        finally:
            self.in_use = False

    @staticmethod
    def _wait(next_ids, copied) -> list[int]:
        copied.synchronize()
        return next_ids.tolist()

    def prefill(self, prompts: list[list[int]], max_new_tokens: int):
        """Load the prompts, and encode all of their tokens except the newest."""
        windows = [prompt[-window_size(len(prompt), self.block_size) :] for prompt in prompts]
        if self.cache and self.cache.dtype != _cache_dtype(self.model):
            self.cache = KVCache(self.model, len(prompts), self.capacity)
        can_pack = self.cache is not None and self.cache.dtype == torch.float32 and not self.model.training
        self.backend = cpu.decode_backend(self.model, max_new_tokens) if can_pack else None
        n_known = self._n_known(windows[0]) if self.reuse_prefix else 0
        self.lengths = [len(window) for window in windows]
        longest = max(self.lengths)
        padded = torch.tensor([window + [0] * (longest - len(window)) for window in windows])
        self.tokens[:, :longest] = padded.to(self.device)
        self.last.copy_(torch.tensor(self.lengths) - 1)
        if self.seen is not None:
            self.seen.zero_()
            for i, prompt in enumerate(prompts):
                self.seen[i, prompt] = True
        if self.cache:
            if self.graphs and not n_known:  # used before: what a mask hides must be finite
                for cached in chain(*self.cache.layers):
                    cached.zero_()
            self._encode(range(len(prompts)), all(window == windows[0] for window in windows), n_known)

    def _n_known(self, window: list[int]) -> int:
        """How many of the first tokens of window, the newest aside, the cache holds for the current weights."""
        previous, self.weights = self.weights, (_state(self.model), _checksums(self.model))
        if previous[0] != self.weights[0] or self.weights[1] and previous[1] != self.weights[1]:
            return 0
        pairs = zip(self.tokens[0, : max(0, self.lengths[0] - 1)].tolist(), window[:-1])
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def truncate_context(self):
        """Reduce sequences of more than block_size tokens to their newest half, and encode it again from position 0."""
        full = [i for i, length in enumerate(self.lengths) if length > self.block_size]
        if not full:
            return
        half = window_size(self.block_size + 1, self.block_size)
        self.tokens[full, :half] = self.tokens[full, self.block_size + 1 - half :]
        self.last[full] = half - 1
        for i in full:
            self.lengths[i] = half
        if self.cache:
            self._encode(full, False)

    def _encode(self, batch: Sequence[int], identical: bool, start: int = 0):
        """Put the tokens of these sequences from start to the last but one into the cache; identical ones once."""
        assert self.cache
        end = max(self.lengths[i] for i in batch) - 1
        at: slice | torch.Tensor = slice(0, 1) if identical else slice(None)
        if not identical and len(batch) < len(self.lengths):
            at = torch.tensor(batch, device=self.device)
        tokens = self.tokens[at]
        chunk = max(1, PREFILL_TOKENS // len(tokens))
        for first in range(start, end, chunk):
            stop = min(first + chunk, end)
            positions = torch.arange(first, stop, device=self.device)
            before = tokens_before(tokens, torch.full_like(tokens[:, 0], first), self.n_before)
            cache = self.cache.at(positions, stop, first, at)
            self.model._hidden(tokens[:, first:stop], positions, cache, before, tokens[:, :stop])
        for cached in chain(*self.cache.layers) if identical else ():
            cached[1:, :, :end] = cached[:1, :, :end]

    def decode_step(self):
        """Draw one id for each sequence."""
        longest = max(self.lengths)
        # without graphs under autocast, which frees its casts of the weights at exit
        if self.cache and self.device.type == "cuda" and not torch.is_autocast_enabled("cuda"):
            self._replay(min(-(-longest // GRAPH_BUCKET) * GRAPH_BUCKET, self.block_size))
        else:
            start = longest - 1 if min(self.lengths) == longest else None
            self._sample(self._logits(longest, start))

    def _logits(self, cache_len: int, start: int | None):
        """Logits (B, V) after the newest tokens, which enter the cache; start is their position if it is the same."""
        if self.cache is None:
            return self.model.logits_at(self.tokens[:, :cache_len], self.last)
        newest = self.tokens.gather(1, self.last[:, None])  # (B, 1)
        before = tokens_before(self.tokens, self.last, self.n_before)
        positions = self.last[:1] if start is not None else self.last[:, None]
        cache, model, tokens = self.cache.at(positions, cache_len, start), self.model, self.tokens[:, :cache_len]
        if self.backend is None:
            return model.lm_head(model._hidden(newest, positions, cache, before, tokens)[:, 0])
        x = model._embed(newest, positions, before)
        x = self.backend.blocks(x, model.attention_inputs(positions, cache[0], tokens), cache)
        return self.backend.head(model.transformer.ln_f(x)[:, 0])

    def _sample(self, logits):
        """Draw an id from each row of logits (B, V), and append it to the sequence."""
        if self.seen is not None:
            logits = penalize(logits.float(), self.seen, self.sampling.repetition_penalty or 1)
        uniforms = self.uniforms.index_select(0, self.n_used)[0]
        self.next_ids.copy_(sample_ids(logits[:, : self.n_ids], uniforms, self.sampling))
        self.n_used += 1
        self.last += 1
        ids = self.next_ids[:, None].clamp(min=0)  # (B, 1)
        self.tokens.scatter_(1, self.last[:, None], ids)
        if self.seen is not None:
            self.seen.scatter_(1, ids, True)

    def _replay(self, cache_len: int):
        """One decode step on CUDA as a graph; otherwise a small model spends its time launching kernels."""
        if cache_len not in self.graphs:
            state = [t for t in (self.n_used, self.last, self.tokens, self.seen) if t is not None]
            saved = [t.clone() for t in state]
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):  # warm-up on a side stream, as torch.cuda.graph requires
                for _ in range(3):
                    self._sample(self._logits(cache_len, None))
                    for tensor, value in zip(state, saved):
                        tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(side_stream)
            self.graphs[cache_len] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[cache_len]):
                self._sample(self._logits(cache_len, None))
        self.graphs[cache_len].replay()


def _state(model: Any) -> tuple:
    """A value that changes when keys and values become stale: by assignments, optimizer steps, in-place operations."""
    tensors = [*model.parameters(), *model.buffers()]
    versions = [(t.data_ptr(), t.dtype, -1 if t.is_inference() else t._version) for t in tensors]
    return (*versions, model.config, model.document_end_id, model.training, _cache_dtype(model))


def _checksums(model: Any) -> list[int]:
    """Sums of the bits of all trainable weights. Only these notice writes through .data; none if all are frozen."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [int(p.detach().view(integers[p.element_size()]).sum()) for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def _decoding_threads(small: bool) -> Iterator[None]:
    """Use one CPU thread for a small model: several would wait for each other longer than they compute.

    Entered once per token, so that the caller of a stream keeps its own number of threads.
    """
    n_threads = torch.get_num_threads()
    changes = small and n_threads > 1
    try:
        if changes:
            torch.set_num_threads(1)
        yield
    finally:
        if changes:
            torch.set_num_threads(n_threads)
