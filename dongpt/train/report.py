"""Messages printed at the start and end of a training run, written for people training their first model.

The lines that log scrapers read ("number of parameters", "tokens per iteration will be") keep nanoGPT's wording.
nanoGPT's other lines are printed only with --verbose.
"""

import math
import os
import shlex
import sys
from typing import Any, Callable

import numpy as np
import torch

import configurator
from dongpt import runtime
from dongpt.log import LOSS_PLOT_FILE, LossCurves, peak_flops
from dongpt.runtime import Runtime
from dongpt.text.bins import has_validation
from dongpt.text.tokenizers import from_dict
from dongpt.train.data import Corpus
from dongpt.train.optim import describe_groups
from dongpt.train.step import TrainStep
from model import GPT

LONG_RUN_SECONDS = 6 * 3600  # longer runs print advice on how to shorten them
SLOW_STEP_SECONDS = 60  # slower iterations cause a warning before training starts
FLOPS_PER_CPU_THREAD = 2e10  # float32 training, measured on 2 cores of an AMD EPYC (Zen 3)
FLOPS_OF_UNKNOWN_GPU, GPU_SHARE_OF_PEAK = 1e13, 0.3
TOKENS = {"char": "characters", "word": "words", "bpe": "BPE tokens", "gpt2": "GPT-2's BPE tokens"}  # by tokenizer kind
MAX_SETTINGS_LENGTH = 360  # of the line with the changed settings: three lines of 120 characters
IGNORED_SHARE = 0.1  # a smaller share of long conversations does little harm
FLAT_SHARE = 0.005  # smaller relative changes of the validation loss count as level
WORSE_SHARE = 0.05  # a loss that exceeds guessing by less than this fraction counts as no better


# ----------------------------------------------------------------------------------------------------------------------
# before the first update


def opening_line(argv: list[str] | None, overrides: dict[str, Any], cfg: Any, iter_num: int, weights: Any) -> str:
    """Return a line that shows the source of a run's settings and the settings that the user changed.

    `weights` is train.py's InitWeights, whose checkpoint contains the settings of a resumed run.
    """
    if cfg.init_from == "resume":
        stored = weights.checkpoint.get("config", {})
        keys = [key for key in overrides if key not in ("init_from", "out_dir")]
        changed = [key for key in keys if overrides[key] != stored.get(key)]
        before = {key: f" (was {stored[key]!r})" if key in stored else "" for key in changed}
        changed_text = ", ".join(f"{key}={overrides[key]!r}{before[key]}" for key in changed) or "none"
        done = f"continuing after iteration {iter_num:,} of {cfg.max_iters:,}"
        return f"{done}; settings: from the checkpoint; your changes: {changed_text}"
    files: list[str] = []
    changes: list[str] = []
    for arg in configurator.join_values(type(cfg), sys.argv[1:] if argv is None else argv):
        (changes if arg.startswith("--") else files).append(arg)
    line = f"settings: {' + '.join(files) or 'the defaults'}"
    if changes:
        line, n_shown = f"{line}; changed on the command line: ", len(changes)
        while n_shown > 1 and len(line + shlex.join(changes[:n_shown])) > MAX_SETTINGS_LENGTH:
            n_shown -= 1
        line += shlex.join(changes[:n_shown]) + f" and {len(changes) - n_shown} more" * (n_shown < len(changes))
    return line


def corpus_lines(corpus: Corpus, block_size: int) -> list[str]:
    """Return lines that describe the training data and its tokens."""
    characters, kind = corpus.meta.get("characters", {}), corpus.tokenizer_dict["kind"]
    source = f" ({corpus.meta['source']})" if corpus.meta.get("source") else ""
    size = f", {sum(characters.values()):,} characters" if characters else ""
    counts = f"{corpus.lengths['train']:,} tokens to train on and {corpus.lengths['val']:,} for validation"
    if not has_validation(corpus.meta):
        note = "none for validation, so val losses are measured on the training set"
        counts = f"{corpus.lengths['train']:,} tokens to train on and {note}"
    lines = [f"text: {corpus.name}{source}{size}: {counts}"]
    vocabulary = f"tokens: {TOKENS.get(kind, kind)} from a vocabulary of {corpus.vocab_size:,}"
    if not corpus.meta:
        vocabulary = f"tokens: {corpus.name} has no meta.json or meta.pkl, so GPT-2's tokens are assumed"
    lines.append(f"{vocabulary}; the model sees up to {block_size:,} at a time (block_size)")
    return lines


def long_conversations_line(corpus: Corpus, block_size: int) -> str:
    """Return a sentence with the number of training conversations that are longer than block_size, or ''."""
    if "template" not in corpus.tokenizer_dict:
        return ""
    end_id = from_dict(corpus.tokenizer_dict, load_gpt2=False, load_template=False).end_id
    n_conversations = n_long = n_read = first = 0  # first: position where a conversation starts
    for ids in corpus.tokens["train"].chunks():
        ends = n_read + np.flatnonzero(ids == end_id)
        n_long += np.count_nonzero(np.diff(ends, prepend=first - 1) - 1 > block_size)
        n_conversations, n_read = n_conversations + len(ends), n_read + len(ids)
        first = int(ends[-1]) + 1 if len(ends) else first
    if not n_long:
        return ""
    share = f"{n_long:,} of {n_conversations:,} training conversations ({100 * n_long / n_conversations:.1f}%)"
    note = f"note: {share} have more than block_size={block_size} tokens"
    if n_long < IGNORED_SHARE * n_conversations:
        return f"{note}, which is few enough to ignore"
    return f"{note}: raise --block_size, or the model will rarely see a question together with its answer"


def parameters_line(model: GPT) -> str:
    """Return a line with the number of parameters in the model and in each of its parts."""
    total = model.get_num_params()
    ngrams = model.transformer.ngrams.weight.numel() if model.config.ngrams > 1 else 0
    if model.config.model_type == "bigram":
        return f"number of parameters: {total / 1e6:.2f}M (one table of {total:,} logits: a bigram model has no blocks)"
    blocks, n_layer = sum(p.numel() for p in model.transformer.h.parameters()), model.config.n_layer
    parts = {f"{n_layer} block{'s' * (n_layer > 1)}": blocks, "embeddings": total - blocks - ngrams}
    parts |= {"the n-gram table": ngrams} if ngrams else {}
    texts = [f"{f'{n / 1e6:.2f}M' if n >= 10_000 else f'{n:,}'} in {part}" for part, n in parts.items()]
    line = f"number of parameters: {total / 1e6:.2f}M ({', '.join(texts)})"
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{line}; LoRA trains {n_trained:,} of them, {100 * n_trained / total:.2g}%" if model.adapter else line


def tokens_line(step: TrainStep) -> str:
    """Return a line with the tokens per update and the number of epochs."""
    cfg, n_windows = step.cfg, step.corpus.windows_per_epoch(step.cfg.block_size)
    iters_per_epoch = n_windows * cfg.block_size / step.tokens_per_iter
    n_epochs = cfg.max_iters / iters_per_epoch
    epochs = f"{n_epochs:,.0f}" if n_epochs >= 100 else f"{n_epochs:.3g}"
    iterations = f"{cfg.max_iters:,} iteration{' is' if cfg.max_iters == 1 else 's are'}"
    length = f"{iterations} {epochs} epoch{'s' * (epochs != '1')} (passes over the training set)"
    return f"tokens per iteration will be: {step.tokens_per_iter:,} ({step.samples_per_iter:,} sequences); {length}"


def machine_line(rt: Runtime, is_compiled: bool, compile_reason: str) -> str:
    """Return a line with the device, dtype and compile settings, their reasons, and the number of CPU threads."""
    line = f"{rt.description}, compile: {'on' if is_compiled else 'off'} ({compile_reason})"
    threads = torch.get_num_threads()
    return f"{line}, {threads} thread{'s' * (threads > 1)}" if rt.device_type == "cpu" else line


def zero_lr_start(cfg: Any) -> float:
    """Return the first iteration whose learning rate is 0, or infinity if the learning rate never becomes 0."""
    return max(cfg.warmup_iters, cfg.lr_decay_iters) if cfg.decay_lr and cfg.min_lr == 0 else math.inf


def schedule_warning(cfg: Any, iter_num: int) -> str:
    """Return a warning if the learning rate decays too early or too late for max_iters, or '' if it does not."""
    start, decay_end = zero_lr_start(cfg), max(cfg.warmup_iters, cfg.lr_decay_iters)
    if start < cfg.max_iters:
        when = f"from iteration {start} on" if start > iter_num else "in every remaining iteration"
        problem = f"the learning rate is 0 {when}, so the weights will not change"
        return f"warning: {problem}: pass --lr_decay_iters={cfg.max_iters}"
    if decay_end <= cfg.max_iters or not cfg.decay_lr:
        return ""
    key = "lr_decay_iters" if cfg.lr_decay_iters == decay_end else "warmup_iters"
    problem = f"{key}={decay_end} is more than max_iters={cfg.max_iters}, so the run ends before the learning rate has"
    warmup = f" --warmup_iters={cfg.max_iters // 20}" if cfg.warmup_iters >= cfg.max_iters else ""
    return f"note: {problem} decayed: pass --lr_decay_iters={cfg.max_iters}{warmup} for a full schedule"


def first_screen(step: TrainStep, opening: str, overrides: dict, resume_command: Callable, iter_num: int) -> str:
    """Return `opening` followed by lines on the data, the model, the output files, and how to stop and resume.

    resume_command(out_dir, world_size) returns the command to resume the run, which has completed iter_num iterations.
    With verbose=True, nanoGPT's other lines come first: the changed settings and the optimizer's parameter groups.
    """
    cfg, corpus = step.cfg, step.corpus
    lines = []
    if cfg.verbose:
        lines += [f"Overriding: {key} = {value}" for key, value in overrides.items()]
        vocab_text = f"found vocab_size = {corpus.vocab_size} (inside {corpus.name})"
        lines.append(vocab_text if corpus.meta else "No meta.json or meta.pkl found, assuming GPT-2 encodings...")
        lines += ["Initializing a new model from scratch"] if cfg.init_from == "scratch" else []
        lines.append(describe_groups(step.optimizer))
    lines += [opening, *corpus_lines(corpus, cfg.block_size), parameters_line(step.model), tokens_line(step)]
    if not cfg.eval_only:
        every, sample = f"every {cfg.eval_interval:,} iterations", ", a sample" if cfg.sample_tokens else ""
        lines.append(f"{every}: an evaluation{sample}, and a checkpoint and {LOSS_PLOT_FILE} in {cfg.out_dir}")
        resume = resume_command(cfg.out_dir, step.rt.world_size)
        lines.append(f"to stop: press Ctrl-C, which saves the state; to resume: {resume}")
    warnings = [long_conversations_line(corpus, cfg.block_size), busy_machine_warning(), slow_step_warning(step)]
    warnings += [schedule_warning(cfg, iter_num)] if iter_num < cfg.max_iters and not cfg.eval_only else []
    return "\n".join([*lines, *filter(None, warnings)])


def difference_line(before: dict[str, Any], now: dict[str, Any], threads_source: str = "") -> str:
    """Return a line that explains why a resumed run will not be bitwise identical, or '' if the settings match."""
    pairs = [f"{key} {before[key]} before, {now[key]} now" for key in now if before[key] != now[key]]
    pairs = [pair + f" ({threads_source})" * (threads_source != "" and pair.startswith("threads")) for pair in pairs]
    note = "this resumed run is not bitwise reproducible; losses may differ in the last digits"
    return f"{note}: {'; '.join(pairs)}" if pairs else ""


def busy_machine_warning() -> str:
    """Return a warning if other programs keep the CPUs busy, or '' if they do not or the load is unknown."""
    load = runtime.load_average()
    if load is None or load < 1.5 * (os.cpu_count() or 1):
        return ""
    cores = f"{os.cpu_count()} core{'s' * (os.cpu_count() != 1)}"
    return f"this machine is busy: on average, {load:.0f} programs compete for its {cores}; expect slow steps"


def slow_step_warning(step: TrainStep) -> str:
    """Return a warning if an iteration will take over a minute, as estimated from its FLOPs, or '' if it will not."""
    cfg, rt = step.cfg, step.rt
    flops_per_second = FLOPS_PER_CPU_THREAD * torch.get_num_threads()
    if rt.device_type != "cpu":
        peak = peak_flops(torch.cuda.get_device_name(rt.device)) if rt.device_type == "cuda" else None
        flops_per_second = GPU_SHARE_OF_PEAK * peak if peak else FLOPS_OF_UNKNOWN_GPU
    flops_per_token = step.model.flops_per_token()
    seconds = flops_per_token * step.tokens_per_iter / rt.world_size / flops_per_second
    n_eval_tokens = 2 * cfg.eval_iters * cfg.batch_size * cfg.block_size  # both splits
    n_eval_tokens = min(n_eval_tokens, step.corpus.lengths["train"] + step.corpus.lengths["val"])
    eval_seconds = flops_per_token / 3 * n_eval_tokens / rt.world_size / flops_per_second  # forward only
    if seconds < SLOW_STEP_SECONDS:
        return ""
    estimate = f"one iteration will take about {format_duration(seconds)} on this machine, and an evaluation about"
    settings = f"block_size={cfg.block_size}, batch_size={cfg.batch_size}, or the size of the model"
    return f"slow: {estimate} {format_duration(eval_seconds)} (estimated); to speed it up, lower {settings}"


# ----------------------------------------------------------------------------------------------------------------------
# during the run


def format_duration(seconds: float) -> str:
    """Format a duration, as in '40 s', '12 min', '3.5 h' or '11 days'."""
    for unit, unit_seconds in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < (120 if unit != "h" else 48) * unit_seconds:
            return f"{seconds / unit_seconds:.{1 if unit == 'h' and seconds < 36000 else 0}f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def expected_duration(cfg: Any, iter_num: int, seconds_per_iter: float, seconds_per_eval: float) -> str:
    """Return a line with the expected duration of the rest of a run, with advice if it is long."""
    n_iters = cfg.max_iters - iter_num
    n_evals = -(-cfg.max_iters // cfg.eval_interval) - iter_num // cfg.eval_interval
    seconds = n_iters * seconds_per_iter + n_evals * seconds_per_eval
    if seconds > 60 * (cfg.max_minutes or math.inf):
        return f"expected duration: {cfg.max_minutes:g} min, because max_minutes is reached before max_iters"
    each = f"{seconds_per_iter * 1000:.0f} ms" if seconds_per_iter < 10 else f"{seconds_per_iter:.0f} s"
    line = f"expected duration: {format_duration(seconds)} for {n_iters:,} more iterations of {each}"
    line += f" and {n_evals} evaluation{'s' * (n_evals > 1)}" if seconds_per_eval else ""
    if seconds > LONG_RUN_SECONDS:
        line += "; to shorten it, lower max_iters (and lr_decay_iters), n_layer, n_embd, block_size, batch_size or "
        line += "gradient_accumulation_steps, or set max_minutes"
    return line


# ----------------------------------------------------------------------------------------------------------------------
# after the last update


def completed_line(cfg: Any) -> str:
    """Return a line that says how to continue a run that has completed all of its iterations."""
    n = 2 * cfg.max_iters
    remedy = f"--max_iters={n}" + (f" --lr_decay_iters={n}" if cfg.decay_lr and cfg.lr_decay_iters < n else "")
    return f"this run has completed all {cfg.max_iters} iterations: to continue for as many again, add {remedy}"


def loss_meaning(nats: float, bits_per_character: float | None, unigram_nats: float, corpus: Corpus) -> str:
    """Return a sentence that compares a loss with guessing by token frequency."""
    bits, unit = bits_per_character or nats / math.log(2), "character" if bits_per_character else "token"
    unigram_bits = unigram_nats * (bits / nats if nats else 1 / math.log(2))
    tokens = TOKENS.get(corpus.tokenizer_dict["kind"], "tokens")
    verdict = "" if nats < unigram_nats else ", so the model is no better than that"
    verdict = verdict if nats <= (1 + WORSE_SHARE) * unigram_nats else ", so the model is worse than that"
    guess = f"guessing by the frequency of {tokens} alone takes {unigram_bits:.2f} bits (a loss of {unigram_nats:.4f})"
    return f"that is {bits:.2f} bits per {unit}; {guess}{verdict}"


def curve_verdict(curves: LossCurves, zero_lr_start: float = math.inf) -> str:
    """Return a sentence that says whether the validation loss was still falling, level, or rising (overfitting)."""
    points = [point for point in curves.evals.points() if point[0] > 0]
    points = points[: 1 + sum(it < zero_lr_start for it, *_ in points)]  # later evaluations are of the same weights
    too_few = "too few evaluations to tell whether the loss was still falling: lower --eval_interval to see its curve"
    if not points or not curves.best_eval:
        return too_few
    (best_iter, best_train, best_val), (_, last_train, last_val) = curves.best_eval, points[-1]
    first_iter, first_train, first_val = curves.first_eval or curves.best_eval
    if first_iter == 0 and best_val > (1 + FLAT_SHARE) * first_val:
        since = f"the validation loss was lower before training ({first_val:.4f}) than in any evaluation since then"
        if last_train < first_train:
            return f"overfitting: {since}; use more text, a smaller model or a lower --learning_rate"
        return f"unstable: {since}, and the training loss rose, too; lower --learning_rate"
    if last_val > (1 + FLAT_SHARE) * best_val:
        since = f"the validation loss was lowest at iteration {best_iter:,} and rose to {last_val:.4f} afterwards"
        if last_train < best_train:
            remedy = "use more text, a smaller model, more dropout or fewer iterations"
            return f"overfitting: {since}, while the training loss kept falling; {remedy}"
        return f"unstable: {since}, and so did the training loss; lower --learning_rate"
    if len(points) < 3:
        return too_few
    earlier_val = points[(2 * len(points)) // 3 - 1][2]  # at two thirds of the run
    if last_val < (1 - FLAT_SHARE) * earlier_val:
        return "the validation loss was still falling: a longer run (raise --max_iters and --lr_decay_iters) may help"
    return "the validation loss has leveled off: a longer run is unlikely to lower it much"


def last_screen(cfg: Any, loss: Any, meaning: str, curves: LossCurves, best_iter: int, corpus: Corpus) -> str:
    """Return lines with the final loss (a MeanLoss), its meaning, the output files, and the next command to run."""
    checkpoint, picture = os.path.join(cfg.out_dir, "ckpt.pt"), os.path.join(cfg.out_dir, LOSS_PLOT_FILE)
    out_dir, is_chat = shlex.quote(cfg.out_dir), "template" in corpus.tokenizer_dict
    split, verdict = "validation", curve_verdict(curves, zero_lr_start(cfg))
    if not has_validation(corpus.meta):
        split, verdict = "training", verdict.replace("validation loss", "loss")
    measured = f"at iteration {best_iter:,} over {loss.tokens:,} tokens{' of the answers' * is_chat}"
    result = f"the loss on the whole {split} set is {loss.nats:.4f} (perplexity {loss.perplexity:.2f})"
    lines = [f"final: {result}, measured {measured}"]
    lines.append("  quote this number: the losses above were measured on part of the text or on a single batch")
    lines += [f"  {meaning}", f"  {verdict}", f"saved: {checkpoint} (the model) and {picture} (its loss curves)"]
    lines.append(f"next: python chat.py {out_dir}" if is_chat else f"next: python sample.py --out_dir={out_dir}")
    return "\n".join(lines)
