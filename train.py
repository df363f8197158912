"""Train a GPT on a prepared dataset, on a CPU, a Mac, or one or more GPUs.

    python train.py config/quickstart.py
    python train.py config/train_don_char.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=out            # resumes a run exactly where it stopped

Files written to out_dir: ckpt.pt (the checkpoint to use), ckpt_last.pt (the latest state), log.jsonl and loss.png.
"""

import contextlib
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Annotated, Literal

from dongpt import runtime  # before torch, which reads the environment that it sets

# isort: split
import torch

import configurator
from configurator import UserError
from dongpt import log as logs
from dongpt.checkpoint import build_model, run
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint.legacy import position_scheme
from dongpt.checkpoint.lora import LoraConfig
from dongpt.checkpoint.run import Saver, State
from dongpt.log import RunLog
from dongpt.program import locked_directory, run_program
from dongpt.runtime import Interrupts, MachineInfo, RuntimeConfig, StopCheck, seed_everything
from dongpt.text.bins import find_data_folder
from dongpt.train import init_wte, optim, plot, report
from dongpt.train.data import Corpus
from dongpt.train.evaluation import estimate_loss, log_final_loss, print_sample
from dongpt.train.step import StepConfig, TrainStep
from model import GPT, GPTConfig

ARCHITECTURE_KEYS = [f.name for f in fields(GPTConfig) if f.name not in ("dropout", "attn_dropout")]
PLOT_INTERVAL_SECONDS = 60  # minimum time between two updates of loss.png


@dataclass(frozen=True)
class TrainConfig(RuntimeConfig, StepConfig, LoraConfig, GPTConfig):
    """All settings of a training run, including those of the base classes in step.py, runtime.py and model.py.

    Settings that nanoGPT also has keep its names and meanings.
    """

    # files
    out_dir: str = "out"  # directory for checkpoints, log.jsonl and loss.png
    init_from: str = "scratch"  # scratch, resume, gpt2 (-medium, -large, -xl), hf:OWNER/NAME, or a path to weights
    init_wte: str = ""  # initialize the token embedding from this file, written by data/word2vec.py
    eval_interval: Annotated[int, ">=", 1] = 2000  # iterations between evaluations; a checkpoint is saved after each
    eval_iters: Annotated[int, ">=", 1] = 200  # number of batches per split in each evaluation during training
    eval_only: bool = False  # evaluate once and exit without writing anything
    log_interval: Annotated[int, ">=", 1] = 1  # number of iterations between log lines
    always_save_checkpoint: bool = False  # save ckpt.pt at every evaluation, not only when the validation loss improves
    sample_tokens: Annotated[int, ">=", 0] = 0  # print and log a sample of this many tokens at each evaluation; 0: none
    verbose: bool = False  # also print all settings that you set and the optimizer's parameter groups
    wandb_log: bool = False  # also log to Weights & Biases (wandb)
    wandb_project: str = "owt"  # name of the wandb project
    wandb_run_name: str = "gpt2"  # name of the wandb run
    # data
    dataset: str = "openwebtext"  # name of a dataset folder in data/
    data_dir: str = ""  # path to a dataset folder anywhere; overrides dataset
    dataset_fraction: Annotated[float, ">", 0, "<=", 1] = 1.0  # train only on this initial fraction of the training set
    document_mask: bool = False  # prevent attention across <|endoftext|>; useful for short documents
    # model: these two override the defaults of GPTConfig
    bias: bool = False  # use biases in Linear and LayerNorm layers; slightly slower and no better
    vocab_size: Annotated[int | None, ">=", 1] = None  # vocabulary size; None: from the data, padded to 50304 for GPT-2
    # schedule
    max_iters: Annotated[int, ">=", 1] = 600000  # total number of iterations (weight updates)
    max_minutes: Annotated[float | None, ">", 0] = None  # end the run normally after this many minutes
    patience: Annotated[int, ">=", 0] = 0  # stop after this many evaluations without a lower validation loss; 0: never
    decay_lr: bool = True  # warm up, then decay the learning rate to min_lr; False keeps it constant
    decay: Literal["cosine", "linear"] = "cosine"  # shape of the learning-rate decay; linear suits short runs
    warmup_iters: Annotated[int, ">=", 0] = 2000  # number of iterations of linear warm-up
    lr_decay_iters: Annotated[int, ">=", 0] = 600000  # iteration at which min_lr is reached; usually max_iters
    min_lr: Annotated[float, ">=", 0] = 6e-5  # final learning rate; usually a tenth of learning_rate
    # machine
    threads: Annotated[int | None, ">=", 1] = None  # number of CPU threads; None: OMP_NUM_THREADS, or one per core
    backend: str = "auto"  # torch.distributed backend; auto: nccl on CUDA, gloo on a CPU

    def __post_init__(self):
        GPTConfig.__post_init__(self)
        StepConfig.__post_init__(self)
        self.check_lora(self.init_from, self.optimizer, self.freeze_wte)
        problems = []
        if (self.init_wte or self.freeze_wte) and self.model_type == "bigram":
            problems.append("a bigram model's table contains logits, not embeddings: remove init_wte and freeze_wte")
        if self.decay_lr and self.min_lr > self.learning_rate > 0:
            problem = f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}"
            problems.append(f"{problem}: lower min_lr, the final learning rate")
        supports_mask = self.pos_embd in ("default", "rope") and self.model_type == "gpt" and self.ngrams == 1
        if self.document_mask and not supports_mask:
            problems.append(
                f"document_mask=True requires model_type=gpt, pos_embd=default or rope, and ngrams=1, but "
                f"model_type={self.model_type}, pos_embd={self.pos_embd} and ngrams={self.ngrams} are set: "
                f"change them, or remove document_mask"
            )
        if problems:
            raise UserError("; ".join(problems))


def get_lr(it: int, cfg: TrainConfig) -> float:
    """Return the learning rate for iteration `it`: linear warm-up, then decay to min_lr until lr_decay_iters."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    lr_fraction = 1 - progress if cfg.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr + lr_fraction * (cfg.learning_rate - cfg.min_lr)


# ----------------------------------------------------------------------------------------------------------------------
# settings, and the weights to start from


@dataclass
class InitWeights:
    """Initial weights of a run, with the tokenizer and the checkpoint that they came with."""

    path: str
    model: GPT
    tokenizer: dict | None
    checkpoint: dict  # {} unless the run is resumed
    mtime: float = 0.0  # modification time of the resumed file
    source: dict = field(default_factory=dict)  # of a new run: the loaded checkpoint without its tensors


def resolve_config(argv: list[str] | None) -> tuple[TrainConfig, dict, InitWeights | None]:
    """Return all settings, the settings that the user set, and the initial weights (None for a new model).

    The user's settings take precedence over those of a resumed run, which take precedence over the defaults. The
    architecture comes from the loaded weights, and setting it to anything else is an error.
    """
    overrides, _ = configurator.read_arguments(TrainConfig, argv)
    init_from, out_dir = overrides.get("init_from", "scratch"), overrides.get("out_dir", TrainConfig.out_dir)
    base = overrides.get("base", "")
    if init_from == "scratch":
        return configurator.build_config(TrainConfig, overrides), overrides, None
    if init_from == "resume":
        checkpoint, path = checkpoints.load_from_out_dir(out_dir)
        print(f"Resuming training from {path}")
        stored_args = run.resumed_settings(TrainConfig, checkpoint, path, overrides)
        model, tokenizer = checkpoints.restore_model(checkpoint, path, base), checkpoint.get("tokenizer")
        weights = InitWeights(path, model, tokenizer, checkpoint, os.path.getmtime(path))
    else:
        if vectors_path := overrides.get("init_wte"):
            conflict = f"init_wte={vectors_path} and init_from={init_from}"
            raise UserError(f"{conflict} both initialize the token embedding: remove one of them")
        print(f"Initializing from the weights of {init_from}")
        model, tokenizer, source = checkpoints.load_from_path(init_from, base)
        stored_args, weights = {}, InitWeights(init_from, model, tokenizer, {}, source=source)
        old_block_size = model.config.block_size
        if (block_size := overrides.get("block_size", old_block_size)) < old_block_size:
            print(f"cropping block_size from {old_block_size} to {block_size}: later positions are discarded")
            model.crop_block_size(block_size)
    architecture = {key: getattr(model.config, key) for key in ARCHITECTURE_KEYS}
    user_args = {key: value for key, value in overrides.items() if key not in ARCHITECTURE_KEYS or value is not None}
    cfg = configurator.build_config(TrainConfig, {**stored_args, **architecture, **user_args})
    for key in user_args.keys() & architecture.keys():
        loaded_value = position_scheme(model.config) if key == "pos_embd" else architecture[key]
        if getattr(cfg, key) != loaded_value:
            raise UserError(
                f"{key}={user_args[key]!r} contradicts {weights.path}, which has {loaded_value!r}: remove {key}, or "
                f"start a new model with init_from=scratch in another out_dir"
            )
    return cfg, overrides, weights


def make_model(cfg: TrainConfig, weights: InitWeights | None, corpus: Corpus) -> GPT:
    """Return the model to train, in float32 on the CPU."""
    if weights is None:
        vocab_size = cfg.vocab_size or corpus.model_vocab_size
        if vocab_size < corpus.vocab_size:
            reason = f"the vocabulary of {corpus.name}, which has {corpus.vocab_size} entries"
            raise UserError(f"vocab_size={vocab_size} is smaller than {reason}: remove vocab_size")
        settings = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}
        seed_everything(cfg.seed)
        model = build_model(GPTConfig(**{**settings, "vocab_size": vocab_size}))
        if cfg.init_wte:
            print(init_wte.init_embedding(model.transformer.wte.weight, cfg.init_wte, corpus.vocab_size))
        return model
    return run.adapt_model(weights, cfg, corpus)


# ----------------------------------------------------------------------------------------------------------------------
# the run


def main(argv: list[str] | None = None) -> int:
    """Set up a run, train, and return the exit code.

    The order matters. Settings come first, and a resumed run reads them from its checkpoint. Device and dtype must be
    known before tensors are moved. A new model is built after the data is loaded, because its vocabulary size comes
    from the data. Only then is out_dir locked and written, so that a mistake leaves no trace. torch.compile comes last
    because it tries a forward and a backward pass.
    """
    with Interrupts() as interrupts, contextlib.ExitStack() as exit_stack:
        cfg, overrides, weights = resolve_config(argv)
        is_resume = cfg.init_from == "resume"

        # machine: a resumed run keeps its dtype and compile settings unless the user changes them
        old_machine = run.stored_machine(weights.checkpoint, weights.path) if weights else None
        same_device = old_machine and old_machine.device == torch.device(runtime.pick_device(cfg.device)[0]).type
        dtype = old_machine.dtype if old_machine and same_device and "dtype" not in overrides else cfg.dtype
        was_compiled = old_machine.compile if old_machine and same_device and "compile" not in overrides else None
        asked = overrides if is_resume else asdict(cfg)
        rt = runtime.start(cfg.device, dtype, cfg.backend, cfg.n_embd, asked)
        threads_source = runtime.choose_threads(overrides.get("threads"), old_machine.threads if old_machine else None)

        # data, model, optimizer, state
        corpus = Corpus(find_data_folder(cfg.dataset, cfg.data_dir, rt, quiet=True), cfg.dataset_fraction)
        model = make_model(cfg, weights, corpus).to(rt.device)
        # samples need the tokenizer later; if it cannot be loaded, the run should fail here
        tokenizer = corpus.tokenizer() if cfg.sample_tokens or cfg.document_mask else None
        if tokenizer and cfg.document_mask and tokenizer.end_id is None:
            problem = f"document_mask=True needs documents that end with <|endoftext|>, but {corpus.name} has none"
            raise UserError(f"{problem}: remove document_mask, or prepare the data from several documents")
        model.document_end_id = tokenizer.end_id if tokenizer and cfg.document_mask else None
        corpus.check(cfg.block_size, model.transformer.wte.num_embeddings)
        optimizer = optim.make_optimizer(model, cfg, rt.device_type)
        step = TrainStep(cfg, rt, corpus, model, optimizer)
        state = run.restore(weights.checkpoint, weights.path, step) if weights and is_resume else State()
        if not cfg.eval_only:
            lock_names = checkpoints.BEST_NAME, checkpoints.LAST_NAME, logs.LOG_FILE, logs.LOSS_PLOT_FILE
            rt.run_on_main(lambda: exit_stack.enter_context(locked_directory(cfg.out_dir, *lock_names)))
            if weights and is_resume and os.path.getmtime(weights.path) != weights.mtime:
                raise UserError(f"{weights.path} has just been written by another process: run this command again")
        opening = report.opening_line(argv, overrides, cfg, state.iter_num, weights)
        weights = None  # so that its tensors are freed
        reason = "requested" if "compile" in asked else "from the checkpoint"
        is_compiled, reason = step.compile(cfg.compile, cfg.max_iters - state.iter_num, was_compiled, reason)
        print(report.first_screen(step, opening, overrides, run.resume_command, state.iter_num))
        print(report.machine_line(rt, is_compiled, reason))
        this_machine = MachineInfo(device=rt.device_type, dtype=rt.dtype, compile=is_compiled, world_size=rt.world_size)
        if old_machine and old_machine != this_machine:
            print(report.difference_line(asdict(old_machine), asdict(this_machine), threads_source))

        stop = StopCheck(rt, interrupts, cfg.max_minutes)
        if cfg.eval_only:
            if losses := estimate_loss(step, stop):
                print(f"step {state.iter_num}: train loss {losses[0]:.4f}, val loss {losses[1]:.4f}")
            return stop.exit_code or interrupts.exit_code
        config = {**asdict(cfg), **{key: getattr(model.config, key) for key in ARCHITECTURE_KEYS}}
        uses_gpu = rt.device_type == "cuda" and rt.dtype != "float32"
        peak_flops = logs.peak_flops(torch.cuda.get_device_name()) if uses_gpu else None
        peak_speed = peak_flops * rt.world_size / model.flops_per_token() if peak_flops else None
        start_log = partial(run.start_log, step, state, config, asdict(this_machine))
        wandb_run = run.start_wandb(step, state, config) if cfg.wandb_log else None
        deadline = time.monotonic() + 60 * (cfg.max_minutes or math.inf)
        log = RunLog(cfg.out_dir, start_log, rt.is_main, peak_speed, cfg.max_iters, state.iter_num, deadline, wandb_run)
        return train(step, log, Saver(step, config, this_machine, log), state, stop)


def train(step: TrainStep, log: RunLog, saver: Saver, state: State, stop: StopCheck) -> int:
    """Evaluate, save, update and log until max_iters is reached or the run is stopped, and return the exit code."""
    cfg, rt = step.cfg, step.rt
    first_iter = state.iter_num
    log_time, log_iter = time.perf_counter(), state.iter_num
    stop_reason, timing_start, eval_seconds, n_evals = "", 0.0, 0.0, 0

    while not stop("updates"):
        # evaluate and save: at the start, every eval_interval updates, and at the end
        stop_reason = f"reached max_minutes={cfg.max_minutes}" if stop.time_is_up else ""
        is_last = state.iter_num >= cfg.max_iters or stop.time_is_up
        if (state.iter_num % cfg.eval_interval == 0 or is_last) and state.evaluated_at != state.iter_num:
            eval_start = time.perf_counter()
            if not evaluate_and_save(step, log, saver, state, stop, is_last):
                break  # interrupted by a signal
            eval_seconds, n_evals = eval_seconds + time.perf_counter() - eval_start, n_evals + 1
            if cfg.patience and state.evals_since_best >= cfg.patience:
                stop_reason, is_last = f"validation loss did not improve in {state.evals_since_best} evaluations", True
            log_time, log_iter = time.perf_counter(), state.iter_num  # the log times only training
        if is_last:
            break

        # one update
        it, lr = state.iter_num, get_lr(state.iter_num, cfg)
        loss = step(lr, it, state.samples_seen)
        state.iter_num, state.samples_seen = it + 1, state.samples_seen + step.samples_per_iter
        if it - first_iter in (1, 9):  # after two updates, which are slower than the rest, and after ten
            rt.synchronize()
            training_clock = time.perf_counter() - eval_seconds
            seconds_per_iter, timing_start = (training_clock - timing_start) / 8, training_clock
            if it - first_iter == 9 and state.iter_num < cfg.max_iters:
                log.flush()
                log.print(report.expected_duration(cfg, it + 1, seconds_per_iter, eval_seconds / max(n_evals, 1)))

        # on a GPU, log the previous update after this one has been queued, so that the GPU never waits
        log.flush()
        if it % cfg.log_interval == 0:
            seconds_per_iter = (time.perf_counter() - log_time) / (state.iter_num - log_iter)
            log_time, log_iter = time.perf_counter(), state.iter_num
            log.defer(it, lr, step.tokens_per_iter, seconds_per_iter, rt.item_async(loss))
            if rt.device_type != "cuda":
                log.flush()
        log.bar.update()

    log.flush()
    log.bar.close()
    if log.file:  # rank 0, unless the run ended before its first evaluation
        plot.draw_loss(cfg.out_dir, log.curves)
    exit_code = stop.exit_code
    if exit_code and state.iter_num == first_iter:
        print("interrupted before the first step: nothing was saved")
    elif exit_code:
        rt.run_on_main(lambda: saver.save(state, is_best=False))  # other ranks wait: torchrun kills all if one exits
        print(f"interrupted after {state.iter_num} iterations; the state has been saved. To resume, run")
        print(f"  {run.resume_command(cfg.out_dir, rt.world_size)}")
    else:
        if stop_reason:
            print(f"ended after {state.iter_num} of {cfg.max_iters} iterations: {stop_reason}")
        elif state.iter_num == first_iter > 0:
            print(report.completed_line(cfg))
        log_final_loss(step, log, stop, run.load_best(step))
        if exit_code := stop.exit_code or stop.interrupts.exit_code:
            print("interrupted during the final evaluation: the run itself is complete and saved")
    log.close()
    return exit_code


def evaluate_and_save(step: TrainStep, log: RunLog, saver: Saver, state: State, stop: StopCheck, is_last: bool) -> bool:
    """Evaluate, log the losses and save the state. Return False without saving if all ranks have to stop."""
    losses = estimate_loss(step, stop)
    if losses is None:
        return False
    log.write_losses(state.iter_num, *losses)
    state.evaluated_at = state.iter_num
    if state.iter_num > 0 or is_last:  # untrained weights need no checkpoint
        val_loss = losses[1]
        is_best = val_loss < state.best_val_loss
        state.best_val_loss = min(val_loss, state.best_val_loss)
        state.evals_since_best = 0 if is_best else state.evals_since_best + 1
        step.rt.run_on_main(lambda: saver.save(state, is_best))
        if step.rt.is_main:
            plot.draw_loss(step.cfg.out_dir, log.curves, PLOT_INTERVAL_SECONDS)
    if step.rt.is_main and step.cfg.sample_tokens:
        print_sample(step, log, stop, state.iter_num)
    return True


if __name__ == "__main__":
    run_program(main, lists_configs=True)
