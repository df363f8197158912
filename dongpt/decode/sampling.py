"""Sample the next ids from logits, validate inputs, and limit the context that the model sees."""

import math
from dataclasses import dataclass
from typing import Any, Sequence

import torch

INVALID_ID = -2  # sentinel id for non-finite logits; checked later on the host, so no GPU sync


class DecodingError(ValueError):
    """Raised for invalid prompts, settings or logits."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Filters are defined and ordered as in Hugging Face transformers."""

    temperature: float = 1.0  # below 1 favors likely tokens, above 1 is more random; 0 picks the most likely token
    top_k: int | None = None  # sample only from the top_k most likely tokens; 0 or None disables it
    top_p: float | None = None  # sample from the most likely tokens up to this total probability; None disables it
    min_p: float | None = None  # keep only tokens at least min_p times as likely as the most likely; None disables it
    repetition_penalty: float | None = None  # above 1 makes tokens already in the text less likely; applied first

    def __post_init__(self):
        """Raise DecodingError if any setting is invalid; the message lists every problem."""
        top_k, top_p, min_p, penalty = self.top_k, self.top_p, self.min_p, self.repetition_penalty
        is_valid_top_k = top_k is None or type(top_k) is int and top_k >= 0
        rules = [
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 picks the most likely token)"),
            ("top_k", is_valid_top_k, "a non-negative integer (0 or None disables it)"),
            ("top_p", top_p is None or 0 < top_p <= 1, "above 0 and at most 1 (1 or None disables it)"),
            ("min_p", min_p is None or 0 <= min_p <= 1, "between 0 and 1 (0 or None disables it)"),
            ("repetition_penalty", penalty is None or 1e-9 < penalty < 1e9, "positive, near 1 (1 or None disables it)"),
        ]
        problems = [f"{name}={getattr(self, name)} must be {bounds}" for name, ok, bounds in rules if not ok]
        if problems:
            raise DecodingError("; ".join(problems))


def context_len(n_tokens: int, block_size: int) -> int:
    """Return how many of the newest tokens in a sequence of n_tokens the model sees.

    The context grows to block_size, drops to half a block with the next token, and grows again. Its lengths for
    block_size=4 are 1 2 3 4 2 3 4 2 3 4 ...
    """
    if n_tokens <= block_size:
        return n_tokens
    half_block = max(1, block_size // 2)
    return half_block + (n_tokens - block_size - 1) % (block_size - half_block + 1)


def check_inputs(prompts: Any, vocab_size: int, n_ids: int, max_new_tokens: int) -> list[list[int]]:
    """Convert prompts, a tensor (B, T) or sequences of ids, to lists. Raises DecodingError that lists all problems."""
    problems = []
    prompt_ids = prompts.tolist() if torch.is_tensor(prompts) else list(prompts)
    if not all(isinstance(row, Sequence) and all(isinstance(i, int) for i in row) for row in prompt_ids):
        problems.append("prompts must be sequences of token ids: pass an integer tensor (B, T) or a list of lists")
    elif not prompt_ids or not all(prompt_ids):
        problems.append("a prompt is empty: pass at least one token id for each sequence")
    elif not all(0 <= min(row) and max(row) < vocab_size for row in prompt_ids):
        problems.append(f"a prompt has ids outside the model's vocabulary of {vocab_size}: use the model's tokenizer")
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens={max_new_tokens} must be at least 0")
    if n_ids < 1:
        problems.append(f"n_ids={n_ids} must be at least 1")
    if problems:
        raise DecodingError("; ".join(problems))
    return [list(row) for row in prompt_ids]


def penalize(logits, seen_mask, penalty: float):
    """Make ids in seen_mask (B, V) less likely in logits (B, V), as in CTRL (arxiv.org/abs/1909.05858, section 4.1).

    As in Hugging Face, positive logits are divided by the penalty, and negative logits are multiplied by it.
    """
    return torch.where(seen_mask, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_ids(logits, uniforms, sampling: Sampling):
    """Sample ids (B,) from logits (B, V) by inverting the cumulative distribution at uniforms (B,) < 1.

    Rows with non-finite logits get INVALID_ID. Apply the repetition penalty first; see penalize(). Every operation
    treats each row separately, so that an id never depends on the other sequences in the batch.
    """
    logits = logits.float()
    if logits.device.type == "mps":
        logits = logits.cpu()  # sampling on MPS can silently return wrong ids: nanoGPT issues 255 and 458
    min_logits, max_logits = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)  # NaN if any logit is NaN
    is_finite = torch.isfinite(max_logits - min_logits)[:, 0]
    if sampling.temperature == 0:
        return torch.where(is_finite, logits.argmax(-1), INVALID_ID)
    if sampling.top_k and sampling.top_k < logits.size(-1):
        next_ids = _sample_top_k(logits, max_logits, uniforms, sampling, sampling.top_k)
    else:
        next_ids = _invert_cdf(logits - max_logits, uniforms, sampling)
    return torch.where(is_finite, next_ids, INVALID_ID)


def _sample_top_k(logits, max_logits, uniforms, sampling: Sampling, k: int):
    """Sample ids (B,) from the k highest logits of each row, including ties with the k-th. max_logits is (B, 1).

    On a CPU, a row without such ties is reduced to its k candidates, which is faster. On a GPU, checking for ties would
    require a synchronization.
    """
    top_logits, top_ids = torch.topk(logits, k + 1)
    threshold = top_logits[:, k - 1 : k]
    if logits.device.type != "cpu":
        return _invert_cdf(logits.masked_fill(logits < threshold, -math.inf) - max_logits, uniforms, sampling)
    tied_rows = (top_logits[:, k] == threshold[:, 0]).nonzero()[:, 0]
    top_ids, order = top_ids[:, :k].sort(-1)  # in vocabulary order, as with masking
    sampled_index = _invert_cdf(top_logits.gather(1, order) - max_logits, uniforms, sampling)
    next_ids = top_ids.gather(1, sampled_index[:, None])[:, 0]
    if len(tied_rows):
        masked_logits = logits[tied_rows].masked_fill(logits[tied_rows] < threshold[tied_rows], -math.inf)
        next_ids[tied_rows] = _invert_cdf(masked_logits - max_logits[tied_rows], uniforms[tied_rows], sampling)
    return next_ids


def _invert_cdf(logits, uniforms, sampling: Sampling):
    """Sample an index from each row of logits (B, n), which must be at most 0. The temperature must be above 0."""
    logits = logits / max(sampling.temperature, 1e-37)  # smaller temperatures overflow
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_logits, order = logits.sort(stable=True)  # in an unstable sort, the order of ties depends on batch size
        outside_top_p = sorted_logits.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        outside_top_p[:, -1] = False  # always keep the most likely id
        logits = logits.masked_fill(outside_top_p.scatter(1, order, outside_top_p), -math.inf)
    if sampling.min_p:
        probabilities = logits.softmax(-1)
        threshold = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < threshold, -math.inf)
    # float64 sums preserve the probability of unlikely ids; searchsorted never returns an id with probability 0
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, n)
    cdf_values = uniforms.to(logits.device)[:, None].clamp(max=1 - 2**-40) * cdf[:, -1:]
    return torch.searchsorted(cdf, cdf_values, right=True)[:, 0].clamp(max=logits.size(-1) - 1)
