"""Trains a GPT on a prepared corpus, on a CPU, a Mac, one GPU or many.

    python train.py config/quickstart.py
    python train.py config/train_don_char.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=out            # goes on exactly where a run stopped

Writes to out_dir: ckpt.pt (the one to use), ckpt_last.pt (the newest state), log.jsonl and loss.png.
Every setting is a field below; `python train.py --help` lists them all.
"""

import math
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch

import configurator
from configurator import UserError
from dongpt import log as metrics
from dongpt import runtime
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint.foreign import parse_model_args
from dongpt.program import run_program
from dongpt.runtime import Interrupts, RuntimeConfig, print_main, seed_everything
from dongpt.text.tokenizers import added_tokens
from dongpt.train import init_wte as vectors
from dongpt.train.data import Corpus, find_folder, prepare_if_missing
from dongpt.train.evaluation import evaluate
from dongpt.train.optim import make_optimizer
from dongpt.train.step import UpdateConfig, Updates
from model import GPT, NGRAMS, GPTConfig, new_model

ARCHITECTURE = [f.name for f in fields(GPTConfig) if f.name not in ("dropout", "attn_dropout")]
LONG_RUN = 6 * 3600  # seconds; a run that will take longer says so
REDRAW_EVERY = 60  # seconds between two drawings of loss.png


@dataclass(frozen=True)
class TrainConfig(RuntimeConfig, UpdateConfig, GPTConfig):
    """All settings of a training run; names and meanings are nanoGPT's where it has them."""

    # files
    out_dir: str = "out"  # checkpoints, log.jsonl and loss.png go here
    init_from: str = "scratch"  # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path: weights only
    init_wte: str = ""  # a file of data/word2vec.py: the token embedding begins with these vectors
    eval_interval: int = 2000  # iterations between two evaluations, after each of which the state is saved
    eval_iters: int = 200  # batches per split in an evaluation while training
    eval_only: bool = False  # evaluate once and exit; nothing is written
    log_interval: int = 1  # iterations between two log lines
    always_save_checkpoint: bool = False  # ckpt.pt follows the newest state, not the lowest validation loss
    sample_tokens: int = 0  # print a sample of this many tokens at each evaluation
    wandb_log: bool = False  # mirror the log on wandb
    wandb_project: str = "owt"  # name of the wandb project
    wandb_run_name: str = "gpt2"  # name of the run there
    # data
    dataset: str = "openwebtext"  # a folder under data/
    data_dir: str = ""  # a data folder anywhere, relative to the working directory; replaces dataset
    dataset_fraction: float = 1.0  # train on the first part of train.bin only
    document_mask: bool = False  # losses with attention that stops at <|endoftext|>; pays for short documents
    # model
    bias: bool = False  # in Linear and LayerNorm; without is a bit better and faster
    vocab_size: int | None = None  # None: from the data (GPT-2's 50257 padded to 50304); given, it may be larger
    # schedule
    max_iters: int = 600000  # updates in the whole run
    max_minutes: float | None = None  # end in good order after this time
    patience: int = 0  # end after this many evaluations in a row without a lower validation loss; 0 is off
    decay_lr: bool = True  # warm-up, then down to min_lr; False keeps the learning rate constant
    decay: Literal["cosine", "linear"] = "cosine"  # the way down; a line to 0 takes 0.01 nats off a short run
    warmup_iters: int = 2000  # iterations of linear warm-up
    lr_decay_iters: int = 600000  # iteration at which min_lr is reached, usually max_iters
    min_lr: float = 6e-5  # usually a tenth of learning_rate
    # machine
    backend: str = "auto"  # of torch.distributed: nccl on CUDA, gloo on CPU

    def __post_init__(self):
        self.settle_names()
        if self.init_from == "scratch":  # else the architecture is the checkpoint's, not what these fields say yet
            self.check()
        least = dict(
            eval_interval=1,
            eval_iters=1,
            log_interval=1,
            max_iters=1,
            sample_tokens=0,
            patience=0,
            warmup_iters=0,
            lr_decay_iters=0,
            min_lr=0,
        )
        wrong = [
            f"{name}={getattr(self, name)} must be at least {bound}"
            for name, bound in least.items()
            if not getattr(self, name) >= bound
        ] + self.wrong_values()
        if self.init_wte and self.init_from not in ("scratch", "resume"):
            wrong.append(
                f"init_wte={self.init_wte} and init_from={self.init_from} both say what the token embedding "
                f"begins with: leave one of them away"
            )
        if (self.init_wte or self.freeze_wte) and self.model_type == "bigram":
            wrong.append("a bigram's table holds logits, no vectors: leave init_wte and freeze_wte away")
        if not 0 < self.dataset_fraction <= 1:
            wrong.append(f"dataset_fraction={self.dataset_fraction} must be above 0 and at most 1")
        if self.decay_lr and self.min_lr > self.learning_rate > 0:
            wrong.append(
                f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: lower it, it is what the "
                f"rate goes down to"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            wrong.append(f"max_minutes={self.max_minutes} must be above 0")
        if wrong:
            raise UserError("; ".join(wrong))


@dataclass
class State:
    """How far a run is; with weights and optimizer it is all that a resume needs."""

    iter_num: int = 0  # finished updates
    windows: int = 0  # windows of the training data used so far
    best_val_loss: float = math.inf  # of the states that were saved
    evaluated_at: int = -1  # iter_num of the last evaluation
    evals_since_best: int = 0
    wandb_run_id: str | None = None


def get_lr(it: int, cfg: TrainConfig) -> float:
    """Learning rate of update number it: linear warm-up, cosine or a line to min_lr at lr_decay_iters, then min_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    above = 1 - progress if cfg.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr + above * (cfg.learning_rate - cfg.min_lr)


# ----------------------------------------------------------------------------------------------------------------------
# the start of a run


def resumed_config(cfg: TrainConfig, given: dict, checkpoint: dict, path: str) -> TrainConfig:
    """The settings of a resumed run: the given ones, then the checkpoint's, and the checkpoint's architecture."""
    stored = {key: value for key, value in checkpoint.get("config", {}).items() if hasattr(cfg, key)}
    architecture = parse_model_args(checkpoint["model_args"], path)
    stored.update({key: getattr(architecture, key) for key in ARCHITECTURE})
    stored["out_dir"] = cfg.out_dir  # where the checkpoint is now; it may have been moved
    if given.get("init_wte", "") not in ("", began := stored.get("init_wte", "")):
        raise UserError(
            f"init_wte={cfg.init_wte} is for a new run, and the one in {cfg.out_dir} began "
            f"{f'with {began}' if began else 'without'}: leave init_wte away, or take another out_dir"
        )
    if given.get("document_mask", (masked := stored.get("document_mask", False))) != masked:
        raise UserError(
            f"the run in {cfg.out_dir} has document_mask={masked}, and losses with and without it do not "
            f"compare: leave it away, or begin a new run with init_from={cfg.out_dir}"
        )
    if "dataset" in given:
        stored["data_dir"] = ""  # which would go before dataset
    for key in ARCHITECTURE:
        has = architecture.positions if key == "pos_embd" else stored[key]
        if given.get(key) is not None and getattr(cfg, key) != has:
            raise UserError(
                f"{key}={given[key]!r} contradicts the checkpoint {path}, which has {has!r}: "
                f"leave {key} away, or begin a new run in another out_dir"
            )
    return replace(cfg, **{**stored, **given})


def make_model(cfg: TrainConfig, given: dict, corpus: Corpus, checkpoint: dict | None, path: str) -> GPT:
    """The model to train, float32 on the CPU: new, resumed, or with the weights that init_from names."""
    tokenizer = (checkpoint or {}).get("tokenizer")
    if checkpoint is not None:
        model = checkpoints.restore_model(checkpoint, path)
    elif cfg.init_from == "scratch":
        print_main("Initializing a new model from scratch")
        vocab_size = cfg.vocab_size or corpus.model_vocab_size
        if vocab_size < corpus.vocab_size:
            raise UserError(
                f"vocab_size={vocab_size} is smaller than the {corpus.vocab_size} entries of the "
                f"vocabulary of {corpus.name}: leave vocab_size away"
            )
        seed_everything(cfg.seed)
        model = new_model(
            GPTConfig(**{**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}, "vocab_size": vocab_size})
        )
        if cfg.init_wte:
            print_main(vectors.init_embedding(model.transformer.wte.weight, cfg.init_wte, corpus.vocab_size))
        return model
    else:
        print_main(f"Initializing from the weights of {cfg.init_from}")
        model, tokenizer, _ = checkpoints.load_anything(cfg.init_from)
        for key in ARCHITECTURE:
            has = model.config.positions if key == "pos_embd" else getattr(model.config, key)
            wanted = getattr(cfg, key) if given.get(key) is not None else has
            if key == "block_size" and wanted < has:
                print_main(f"cropping block_size from {has} to {wanted}: what comes later in a window is forgotten")
                model.crop_block_size(wanted)
            elif wanted != has:
                raise UserError(f"{key}={wanted!r} contradicts {cfg.init_from}, which has {has!r}: leave {key} away")
    added = added_tokens(tokenizer, corpus.tokenizer_dict)
    if added is None or (added and checkpoint is not None):
        raise UserError(
            f"{path or cfg.init_from} was trained with another vocabulary than that of {corpus.name}: "
            f"prepare the data with the same tokenizer, or begin with init_from=scratch"
        )
    if added:
        seed_everything(cfg.seed)
        add_rows(model, added, corpus.vocab_size)
    model.set_dropout(cfg.dropout, cfg.attn_dropout)
    return model


def end_of_documents(cfg: TrainConfig, corpus: Corpus) -> int | None:
    """The id at which attention stops, if it does. Raises UserError where documents do not end, or attention has a
    bias already."""
    if not cfg.document_mask:
        return None
    if cfg.pos_embd not in ("default", "rope") or cfg.model_type != "gpt" or cfg.ngrams > 1:
        raise UserError(
            f"document_mask=True goes with a gpt with pos_embd=default or rope and ngrams=1, and this is "
            f"a {cfg.model_type} with {cfg.pos_embd} and ngrams={cfg.ngrams}: change that, or leave "
            f"document_mask away"
        )
    if (end := corpus.tokenizer().end_id) is None:
        raise UserError(
            f"document_mask=True needs documents with <|endoftext|> behind them, and {corpus.name} has "
            f"none: leave it away, or prepare the data from several documents"
        )
    return end


def add_rows(model: GPT, added: list[str], vocab_size: int):
    """Make room in the token embedding for the special tokens that the data declares, and say so."""
    before = model.config.vocab_size
    if vocab_size > before:
        model.grow_vocabulary(vocab_size)
    print_main(
        f"the data adds {', '.join(added)}: the token embedding "
        + (
            f"grows from {before} to {vocab_size} rows"
            if vocab_size > before
            else f"of {before} rows is padded, and has rows for them already"
        )
    )


def restored_state(checkpoint: dict, cfg: TrainConfig) -> State:
    """The State in a checkpoint; nanoGPT's holds a part of it."""
    state = State(**{f.name: checkpoint[f.name] for f in fields(State) if f.name in checkpoint})
    state.best_val_loss = float(state.best_val_loss)  # nanoGPT stores a tensor
    if "windows" not in checkpoint:
        state.windows = state.iter_num * cfg.gradient_accumulation_steps * cfg.batch_size
    return state


def main(argv: list[str] | None = None) -> int:
    """Train as the arguments say; returns the exit code."""
    with Interrupts() as interrupts:
        return train(*configurator.load(TrainConfig, argv), interrupts)


def train(cfg: TrainConfig, given: dict, interrupts: Interrupts) -> int:
    """Set a run up: settings, machine, data, model, optimizer; then evaluate once, or train. Returns the exit code."""
    resuming = cfg.init_from == "resume"
    checkpoint, path = checkpoints.load_valid(cfg.out_dir) if resuming else (None, "")
    if resuming:
        print_main(f"Resuming training from {path}")
        cfg = resumed_config(cfg, given, checkpoint, path)
    for key, value in given.items():
        print_main(f"Overriding: {key} = {value}")

    # a resume computes as the run before it did, unless told otherwise
    before = (checkpoint or {}).get("runtime", {})
    same_kind = before and before["device"] == torch.device(runtime.pick_device(cfg.device)[0]).type
    dtype = before["dtype"] if same_kind and "dtype" not in given else cfg.dtype
    to_compile = ("before" if before["compile"] else False) if same_kind and "compile" not in given else cfg.compile
    rt = runtime.start(cfg.device, dtype, cfg.backend, cfg.n_embd)
    runtime.use_threads(before.get("threads", torch.get_num_threads()))
    if cfg.gradient_accumulation_steps % rt.world_size:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} micro-batches cannot be "
            f"shared evenly by {rt.world_size} processes: use a multiple of {rt.world_size}"
        )

    folder = find_folder(cfg.dataset, cfg.data_dir)
    prepare_if_missing(folder, rt)
    corpus = Corpus(folder, cfg.dataset_fraction)
    rt.print(
        f"found vocab_size = {corpus.vocab_size} (inside {corpus.name})"
        if corpus.meta
        else "No meta.json or meta.pkl found, assuming GPT-2 encodings..."
    )

    model = make_model(cfg, given, corpus, checkpoint, path).to(rt.device)
    cfg = replace(cfg, **{key: getattr(model.config, key) for key in ARCHITECTURE})
    model.document_end = end_of_documents(cfg, corpus)
    corpus.check(cfg.block_size, model.config.vocab_size)
    if cfg.sample_tokens:
        corpus.tokenizer()  # so that one that cannot be loaded is said now
    if not cfg.eval_only and rt.is_main:
        checkpoints.check_writable(cfg.out_dir)
    optimizer = make_optimizer(model, cfg, rt.device_type)
    run = Run(cfg, rt, corpus, model, optimizer, resuming)
    run.describe()
    if resuming:
        run.state = restored_state(checkpoint, cfg)
        run.resumed_at = run.state.iter_num, run.state.evaluated_at
        if "optimizer" in checkpoint:
            checkpoints.restore_optimizer(optimizer, checkpoint, model, path)
        lacking = [
            name for name, key in (("optimizer state", "optimizer"), ("iteration", "iter_num")) if key not in checkpoint
        ]
        if lacking:
            rt.print(f"{path} holds no {' and no '.join(lacking)}: fresh ones are begun")
        if checkpoint.get("scaler"):
            run.updates.scaler.load_state_dict(checkpoint["scaler"])
        if checkpoint.get("data_sha256", corpus.sha256) != corpus.sha256:
            rt.print(f"this resume is not bitwise: {corpus.name} is not what this run began with")
        if not checkpoints.is_valid(os.path.join(cfg.out_dir, checkpoints.BEST)):
            run.state.best_val_loss = math.inf  # the state that had it is gone: the next one is the best there is
    checkpoint = None  # or its tensors would stay in memory
    run.compile(to_compile)
    if before and before != run.machine:
        rt.print(f"this resume is not bitwise: the run before it had {before}, this one has {run.machine}")

    if not cfg.eval_only:
        return training_loop(run, interrupts)
    losses = run.estimate_loss(abandon=lambda: interrupts.code)
    if losses:
        rt.print(f"step {run.state.iter_num}: train loss {losses[0]:.4f}, val loss {losses[1]:.4f}")
    return interrupts.code


# ----------------------------------------------------------------------------------------------------------------------
# the run


@dataclass
class Run:
    """What the steps of a training run share."""

    cfg: TrainConfig
    rt: runtime.Runtime
    corpus: Corpus
    model: GPT  # the plain one, whose names go into checkpoints
    optimizer: torch.optim.Optimizer
    resuming: bool
    state: State = field(default_factory=State)  # replaced on a resume
    resumed_at: tuple[int, int] = (0, -1)  # iter_num and evaluated_at at the start
    log: metrics.RunLog | None = None  # opened at the first record
    bar: Any = None  # tqdm's, on a terminal
    waiting: tuple | None = None  # what log_waiting logs: iteration, learning rate, what reads the loss, seconds

    def __post_init__(self):
        rt = self.rt
        self.updates = Updates(self.cfg, rt, self.corpus, self.model, self.optimizer)
        on_gpu = rt.device_type == "cuda" and rt.dtype != "float32"
        self.peak = metrics.peak_flops(torch.cuda.get_device_name()) if on_gpu else None

    def describe(self):
        """Print the sizes of the run, in nanoGPT's words."""
        cfg, rt = self.cfg, self.rt
        epoch = self.corpus.epoch_windows(cfg.block_size) * cfg.block_size / self.updates.tokens
        rt.print(f"tokens per iteration will be: {self.updates.tokens:,} (one epoch is {epoch:,.1f} iterations)")
        rt.print(f"number of parameters: {self.model.get_num_params() / 1e6:.2f}M")
        _, vectors, *_ = self.model.parameter_groups()
        for kind, decays in (("decayed", True), ("non-decayed", False)):
            parameters = [
                p
                for name, p in self.model.named_parameters()
                if p.requires_grad and (name not in vectors and name != NGRAMS) == decays
            ]
            count = sum(p.numel() for p in parameters)
            rt.print(f"num {kind} parameter tensors: {len(parameters)}, with {count:,} parameters")
        rt.print(f"using fused AdamW: {self.optimizer.defaults['fused']}")
        if cfg.optimizer == "muon":
            rt.print(f"Muon moves {len(self.model.parameter_groups(muon=True)[2])} matrices, AdamW the rest")

    def compile(self, asked):
        """Decide on torch.compile, and say what this run computes with."""
        rt = self.rt
        compiled, why = self.updates.compile(asked, self.cfg.max_iters - self.state.iter_num)
        rt.print(f"{rt.why}, compile: {'on' if compiled else 'off'} ({why})")
        self.machine = dict(
            device=rt.device_type,
            dtype=rt.dtype,
            compile=compiled,
            threads=torch.get_num_threads(),
            world_size=rt.world_size,
            torch=str(torch.__version__),
            numpy=np.__version__,
        )

    def say(self, line: str):
        """Print a line on rank 0, above the progress bar if there is one."""
        if self.bar:
            self.bar.write(line)
            sys.stdout.flush()
        else:
            self.rt.print(line)

    def update(self, lr: float) -> torch.Tensor:
        """One update of the weights; returns this process's mean loss, on the device."""
        loss = self.updates.make(lr, self.state.iter_num, self.state.windows)
        self.state.iter_num += 1
        self.state.windows += self.updates.windows
        return loss

    def estimate_loss(self, abandon) -> tuple[float, float] | None:
        """(train, val) loss on fixed windows spread over each split, None if abandon() became true on the way."""
        cfg, losses = self.cfg, []
        for split in ("train", "val"):
            loss = evaluate(
                self.updates.eval_model,
                self.corpus,
                split,
                cfg.batch_size,
                cfg.block_size,
                self.rt,
                cfg.eval_iters * cfg.batch_size,
                lambda: self.rt.world_size == 1 and abandon(),
            )
            if loss is None:
                return None
            losses.append(loss.nats)
        return tuple(losses)

    def record(self, kind: str, **values):
        """Append a record to the log; the first one of a run moves what an earlier run left in out_dir."""
        if not self.rt.is_main:
            return
        cfg, state = self.cfg, self.state
        if self.log is None:
            wandb_run = None
            if cfg.wandb_log:
                wandb_run = metrics.start_wandb(cfg.wandb_project, cfg.wandb_run_name, asdict(cfg), state.wandb_run_id)
                state.wandb_run_id = wandb_run.id
            if self.resuming:
                kept = metrics.records_before(metrics.read_log(cfg.out_dir), *self.resumed_at)
            elif old := checkpoints.set_aside(cfg.out_dir, [metrics.LOG, metrics.PICTURE]):
                self.say(f"{cfg.out_dir} held an earlier run: its files are now in {old}")
            self.log = metrics.RunLog(cfg.out_dir, wandb_run)
            self.log.open(
                kept if self.resuming else [],
                dict(
                    config=asdict(cfg),
                    iter=self.resumed_at[0],
                    machine=self.machine,
                    world_size=self.rt.world_size,
                    versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
                    data=self.corpus.name,
                    data_sha256=self.corpus.sha256,
                    command=shlex.join(sys.argv),
                ),
            )
        self.log.write(kind, **values)

    def log_waiting(self):
        """Print and log the update that waits for it, if any. Raises UserError for a loss that is not a number."""
        if self.waiting is None:
            return
        (it, lr, reading, seconds), self.waiting = self.waiting, None
        mean_loss = self.rt.sum(reading())[0] / self.rt.world_size
        check_finite(mean_loss, it)
        speed = self.updates.tokens / seconds
        mfu = self.model.flops_per_token() * speed / self.rt.world_size / self.peak if self.peak else None
        self.say(
            f"iter {it}: loss {mean_loss:.4f}, time {seconds * 1000:.2f}ms, "
            + (f"mfu {mfu * 100:.2f}%, " if mfu else "")
            + f"{speed:,.0f} tokens/s"
        )
        self.record(
            "iter",
            iter=it,
            loss=mean_loss,
            lr=lr,
            ms=round(seconds * 1000, 3),
            tokens_per_s=round(speed),
            **({"mfu": round(mfu, 4)} if mfu else {}),
        )
        if self.bar:
            self.bar.set_postfix_str(f"loss {mean_loss:.3f}, {speed:,.0f} tokens/s", refresh=False)

    def save(self, is_best: bool):
        """Write ckpt_last.pt, and ckpt.pt if this is the state to use, or if there is no valid one.

        Raises UserError, and writes nothing, when the weights are no numbers.
        """
        if not self.rt.is_main:
            return
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            check_finite(math.nan, self.state.iter_num)
        snapshot = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model_args": checkpoints.model_args(self.model.config),
            "config": asdict(self.cfg),
            **asdict(self.state),
            "format_version": checkpoints.FORMAT_VERSION,
            "tokenizer": self.corpus.tokenizer_dict,
            "runtime": self.machine,
            "scaler": self.updates.scaler.state_dict(),
            "data_sha256": self.corpus.sha256,
        }
        self.say(f"saving checkpoint to {self.cfg.out_dir}")
        best = os.path.join(self.cfg.out_dir, checkpoints.BEST)
        if is_best or self.cfg.always_save_checkpoint or not checkpoints.is_valid(best):
            checkpoints.save(snapshot, best)  # first, so that a crash between the two cannot lose the best state
        checkpoints.save(snapshot, os.path.join(self.cfg.out_dir, checkpoints.LAST))

    def sample(self):
        """Print a text of sample_tokens tokens, with the same random numbers each time."""
        if not self.rt.is_main:
            return
        tokenizer = self.corpus.tokenizer()
        self.model.eval()
        idx = torch.tensor([[tokenizer.start_id]], device=self.rt.device)
        ids = self.model.generate(
            idx, self.cfg.sample_tokens, temperature=0.8, top_k=200, seed=self.cfg.seed, n_ids=tokenizer.vocab_size
        )
        self.model.train()
        self.say(f"--- sample ---\n{tokenizer.decode(ids[0, 1:].tolist())}\n--------------")

    def finish(self, abandon):
        """Print and log the loss of ckpt.pt over the whole validation split, unless abandon() becomes true."""
        cfg, rt, used_iter = self.cfg, self.rt, self.state.iter_num
        if rt.is_main:
            used = checkpoints.load(os.path.join(cfg.out_dir, checkpoints.BEST))
            used_iter = used["iter_num"]
            self.model.load_state_dict(checkpoints.clean_names(used["model"]))
            del used  # its optimizer state would stay in memory
        rt.broadcast([p.data for p in self.model.parameters()])
        loss = evaluate(
            self.updates.eval_model,
            self.corpus,
            "val",
            cfg.batch_size,
            cfg.block_size,
            rt,
            abandon=lambda: rt.world_size == 1 and abandon(),
        )
        if loss is None or not rt.is_main:
            return
        try:
            bits = loss.bits_per_byte(self.corpus.predicted_bytes("val"))
        except ValueError:  # training needs no tokenizer, counting bytes does: GPT-2's may be out of reach
            bits = None
        print(
            f"final: ckpt.pt of iteration {used_iter} has whole-validation loss {loss.nats:.4f}, perplexity "
            f"{loss.perplexity:.2f}" + (f", {bits:.4f} bits per byte" if bits else "") + f" ({loss.tokens:,} tokens)"
        )
        self.record(
            "final",
            iter=used_iter,
            val_loss=loss.nats,
            perplexity=loss.perplexity,
            bits_per_byte=bits,
            tokens=loss.tokens,
        )


def training_loop(run: Run, interrupts: Interrupts) -> int:
    """Evaluate, save, update and log until max_iters, or until something ends the run; returns the exit code."""
    cfg, rt, state = run.cfg, run.rt, run.state
    run.bar = metrics.progress_bar(cfg.max_iters, state.iter_num) if rt.is_main else None
    first_iter, began, drawn = state.iter_num, time.monotonic(), time.monotonic()
    clock, clock_iter = time.perf_counter(), state.iter_num
    exit_code, reason, step_seconds = 0, "", []

    while True:
        # leave? one process decides at once; several do at the next log_interval, together
        if rt.world_size == 1 or state.iter_num % cfg.log_interval == 0:
            timed_out = cfg.max_minutes is not None and time.monotonic() - began > 60 * cfg.max_minutes
            ctrl_c, term, late = rt.sum(interrupts.code == 130, interrupts.code == 143, timed_out)
            exit_code = 130 if ctrl_c else 143 if term else 0
            if exit_code:
                break
            reason = f"max_minutes={cfg.max_minutes} are over" if late else ""

        # evaluate, save, show
        last = state.iter_num >= cfg.max_iters or bool(reason)
        if (state.iter_num % cfg.eval_interval == 0 or last) and state.evaluated_at != state.iter_num:
            run.log_waiting()
            losses = run.estimate_loss(abandon=lambda: interrupts.code)
            if losses is None:
                continue
            train_loss, val_loss = losses
            check_finite(val_loss, state.iter_num)
            run.say(f"step {state.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
            run.record("eval", iter=state.iter_num, train_loss=train_loss, val_loss=val_loss)
            state.evaluated_at = state.iter_num
            if state.iter_num > 0 or last:
                is_best = val_loss < state.best_val_loss
                state.best_val_loss = min(val_loss, state.best_val_loss)
                state.evals_since_best = 0 if is_best else state.evals_since_best + 1
                run.save(is_best)
            if cfg.sample_tokens:
                run.sample()
            if rt.is_main and time.monotonic() - drawn > REDRAW_EVERY:
                metrics.draw_loss(cfg.out_dir)
                drawn = time.monotonic()
            if cfg.patience and state.evals_since_best >= cfg.patience:
                reason, last = f"no lower validation loss in {state.evals_since_best} evaluations", True
            clock, clock_iter = time.perf_counter(), state.iter_num  # the log times training alone
        if last:
            break

        # one update
        it, lr = state.iter_num, get_lr(state.iter_num, cfg)
        timing = 2 <= it - first_iter < 5  # the first updates are slower than the rest
        if timing:
            rt.synchronize()
            before = time.perf_counter()
        loss = run.update(lr)
        if timing:
            rt.synchronize()
            step_seconds.append(time.perf_counter() - before)
            if len(step_seconds) == 3:
                warn_if_long(sorted(step_seconds)[1], cfg, state.iter_num, run.say)

        # log; on one GPU the update before is logged now that this one is queued, so that it never waits; several
        # processes wait for each other's losses
        run.log_waiting()
        if it % cfg.log_interval == 0:
            reading = rt.read(loss)
            seconds = (time.perf_counter() - clock) / (state.iter_num - clock_iter)
            clock, clock_iter = time.perf_counter(), state.iter_num
            run.waiting = it, lr, reading, seconds
            if rt.device_type != "cuda":
                run.log_waiting()
        if run.bar:
            run.bar.update()

    # the end
    run.log_waiting()
    if run.bar:
        run.bar.close()
        run.bar = None
    if exit_code and state.iter_num == first_iter:
        rt.print("interrupted before the first step: nothing was saved")
    elif exit_code:
        run.save(is_best=False)
        launcher = f"torchrun --standalone --nproc_per_node={rt.world_size}" if rt.world_size > 1 else "python"
        words = [sys.argv[0], "--init_from=resume", f"--out_dir={cfg.out_dir}"]
        quoted = subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
        rt.print(
            f"interrupted after {state.iter_num} iterations, the state is saved; resume with\n  {launcher} {quoted}"
        )
    else:
        if reason:
            rt.print(f"ended after {state.iter_num} of {cfg.max_iters} iterations: {reason}")
        elif state.iter_num == first_iter > 0:
            rt.print(f"all {cfg.max_iters} iterations of this run are done: give a larger --max_iters to go on")
        run.finish(abandon=lambda: interrupts.code)
        if exit_code := interrupts.code:
            rt.print("interrupted in the last evaluation: the run itself is complete and saved")
    if run.log:
        run.log.close()
        metrics.draw_loss(cfg.out_dir)
    return exit_code


def check_finite(loss: float, iter_num: int):
    """Raise UserError for a loss that is not a number, so that such a state is never saved."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at iteration {iter_num}: the run diverged, and its last checkpoint is as "
            f"it was; lower learning_rate, or use dtype=float32"
        )


def warn_if_long(seconds: float, cfg: TrainConfig, iter_num: int, say):
    """Say so if the rest of the run will take long at this many seconds per update."""
    left = seconds * (cfg.max_iters - iter_num)
    if cfg.max_minutes is not None:
        left = min(left, 60 * cfg.max_minutes)
    if left > LONG_RUN:
        say(
            f"at {seconds:.1f} s per iteration this run will take about {left / 3600:,.0f} hours: to shorten it lower "
            f"max_iters (and lr_decay_iters), n_layer, n_embd, block_size, batch_size or "
            f"gradient_accumulation_steps, or set max_minutes"
        )


if __name__ == "__main__":
    run_program(main)
