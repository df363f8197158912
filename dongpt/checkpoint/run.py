"""A training run on disk: its checkpoints and its log, written, checked and restored exactly.

`step` is a TrainStep from dongpt/train/step.py, which this package does not import.
"""

import math
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Iterable, get_type_hints

import numpy as np
import torch
import torch.nn as nn

import configurator
from configurator import UserError
from dongpt import log
from dongpt.checkpoint import files as checkpoints
from dongpt.log import RunLog, check_finite_loss
from dongpt.runtime import MachineInfo, print0, seed_everything
from dongpt.text.tokenizers import added_special_tokens
from model import GPT, CausalSelfAttention

WINDOW_ORDER_METHOD = "numpy.random.Generator.permutation"  # earlier versions shuffled over 2**20 windows differently


@dataclass
class State:
    """Progress of a run: all that a resume needs besides the weights and the optimizer."""

    iter_num: Annotated[int, ">=", 0] = 0  # completed updates
    samples_seen: Annotated[int, ">=", 0] = 0  # training windows used so far; "windows" in checkpoints
    best_val_loss: float = math.inf  # lowest among the saved states
    evaluated_at: Annotated[int, ">=", -1] = -1  # iter_num of the last evaluation
    evals_since_best: Annotated[int, ">=", 0] = 0
    wandb_run_id: str | None = None
    resumed_iters = 0, -1  # iter_num and evaluated_at at the start of this process; not a field, so it is not saved


def check_stored_values(cls: type, values: Any, source: str) -> dict[str, Any]:
    """The values in a file that belong to fields of the dataclass cls, checked against their types and bounds.

    Keys that cls lacks, from other trainers, are ignored. Raises UserError, which begins with `source`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source} is not a dict but {values!r}: use another checkpoint")
    stored = {key: values[key] for key in get_type_hints(cls) if key in values}
    for key, value in stored.items():
        value = value.item() if torch.is_tensor(value) and value.numel() == 1 else value  # nanoGPT's best_val_loss
        stored[key] = configurator.check_setting(key, value, cls, source)
    if invalid := configurator.bounds_errors(cls, stored):
        raise UserError(f"{source}: {'; '.join(invalid)}: use another checkpoint")
    return stored


def resumed_settings(cls: type, checkpoint: dict, path: str, overrides: dict) -> dict:
    """The settings in the checkpoint of a resumed run, fields of cls, that remain valid."""
    settings = check_stored_values(cls, checkpoint.get("config", {}), f"{path}: config")
    settings.pop("out_dir", None)  # the directory may have been moved
    out_dir, vectors, mask = os.path.dirname(path), settings.get("init_wte", ""), settings.get("document_mask", False)
    if overrides.get("init_wte", "") not in ("", vectors):
        reason = f"but the one in {out_dir} started {f'with {vectors}' if vectors else 'without it'}"
        raise UserError(f"init_wte={overrides['init_wte']} is for a new run, {reason}: drop it, or change out_dir")
    if overrides.get("document_mask", mask) != mask:
        reason = f"the run in {out_dir} has document_mask={mask}, and the losses with and without are not comparable"
        raise UserError(f"{reason}: drop it, or start a new run with init_from={out_dir}")
    if "dataset" in overrides:
        settings["data_dir"] = ""  # which would take precedence over dataset
    return settings


def stored_machine(checkpoint: dict, path: str) -> MachineInfo | None:
    """The MachineInfo in a checkpoint; None for checkpoints without one, such as nanoGPT's."""
    if not checkpoint.get("runtime"):
        return None
    values = check_stored_values(MachineInfo, checkpoint["runtime"], f"{path}: runtime")
    if missing := get_type_hints(MachineInfo).keys() - values.keys():
        raise UserError(f"{path}: runtime has no {', '.join(sorted(missing))}: use another checkpoint")
    return MachineInfo(**values)


def restore(checkpoint: dict, path: str, step) -> State:
    """Load the optimizer and the scaler from a checkpoint and return its State; prints what has changed."""
    cfg, corpus = step.cfg, step.corpus
    state = State(**check_stored_values(State, checkpoint, path))
    windows = checkpoint.get("windows", state.iter_num * step.samples_per_iter)  # nanoGPT's checkpoints don't say
    state.samples_seen = configurator.check_type(windows, int, f"{path}: windows")
    state.resumed_iters = state.iter_num, state.evaluated_at
    if "optimizer" in checkpoint:
        checkpoints.restore_optimizer(step.optimizer, checkpoint, step.model, path)
    keys = {"optimizer state": "optimizer", "iteration": "iter_num"}
    if missing := [name for name, key in keys.items() if key not in checkpoint]:
        print0(f"{path} has no {' and no '.join(missing)}: starting with a new one")
    if checkpoint.get("scaler"):
        try:
            step.scaler.load_state_dict(checkpoint["scaler"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} has a damaged gradient scaler ({error!r}): use another checkpoint") from error
    if checkpoint.get("data_sha256", corpus.sha256) != corpus.sha256:
        print0(f"this resume is not bitwise reproducible: {corpus.name} has changed since the run started")
    elif "window_order" not in checkpoint and not corpus.masks and corpus.windows_per_epoch(cfg.block_size) > 2**20:
        print0("this resume is not bitwise reproducible: corpora of this size are now visited in a different order")
    if not checkpoints.is_valid(os.path.join(cfg.out_dir, checkpoints.BEST_NAME)):
        state.best_val_loss = math.inf  # the state with that loss is gone, so the next one is the best
    return state


def adapt_vocabulary(model: GPT, tokenizer: dict | None, path: str, corpus, seed: int, is_resume: bool):
    """Make room in a loaded model for special tokens that the data declares and the model's tokenizer lacks.

    Raises UserError if the vocabularies differ in anything else, or if they differ at all in a resume.
    """
    added_tokens = added_special_tokens(tokenizer, corpus.tokenizer_dict)
    if added_tokens is None or added_tokens and is_resume:
        reason = f"{path} was trained with a different vocabulary from that of {corpus.name}"
        raise UserError(f"{reason}: prepare the data with the same tokenizer, or start with init_from=scratch")
    n_rows = model.config.vocab_size
    if added_tokens and corpus.vocab_size > n_rows:
        seed_everything(seed)
        grow_vocabulary(model, corpus.vocab_size)
        change = f"grows from {n_rows} to {corpus.vocab_size} rows"
    else:
        change = f"already has room for them, since its {n_rows} rows include padding"
    if added_tokens:
        print0(f"the data adds the special tokens {', '.join(added_tokens)}: the token embedding {change}")


def grow_vocabulary(model: GPT, vocab_size: int):
    """Add entries for new tokens to the token embedding and the head, initialized as in a new model."""
    wte, lm_head, old_size = model.transformer.wte, model.lm_head, len(model.transformer.wte.weight)
    if model.config.model_type == "bigram":  # a new token adds a row and a column
        table = nn.init.normal_(torch.empty(vocab_size, vocab_size, device=model.device), std=0.02)
        table[:old_size, :old_size] = wte.weight.detach()
        wte.weight, wte.embedding_dim = nn.Parameter(table), vocab_size
    else:
        for module in (wte,) if model.config.tie_weights else (wte, lm_head):
            rows = torch.empty(vocab_size - old_size, model.config.n_embd, device=model.device)
            module.weight = nn.Parameter(torch.cat([module.weight.detach(), nn.init.normal_(rows, std=0.02)]))
        if model.config.tie_weights:
            lm_head.weight = wte.weight
        lm_head.out_features = vocab_size
    wte.num_embeddings = vocab_size
    model.config = replace(model.config, vocab_size=vocab_size)


def set_dropout(model: GPT, dropout: float, attn_dropout: float):
    """Apply the dropout settings of a new run to a loaded model."""
    model.config = replace(model.config, dropout=dropout, attn_dropout=attn_dropout)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif isinstance(module, CausalSelfAttention):
            module.attn_dropout = attn_dropout


@dataclass
class Saver:
    """Writes a run's checkpoints; config holds the settings to store in them."""

    step: Any
    config: dict
    machine: MachineInfo
    log: RunLog

    def save(self, state: State, is_best: bool):
        """Write ckpt_last.pt, and also ckpt.pt if this state is the best or if there is no valid one.

        Raises UserError, and writes nothing, if a weight is NaN or infinite.
        """
        step, out_dir = self.step, self.step.cfg.out_dir
        if not all(torch.isfinite(parameter).all() for parameter in step.model.parameters()):
            check_finite_loss(math.nan, state.iter_num)
        progress = {"windows" if key == "samples_seen" else key: value for key, value in asdict(state).items()}
        checkpoint = {
            "model": step.model.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "model_args": checkpoints.model_args(step.model.config),
            "config": self.config,
            **progress,
            "format_version": checkpoints.FORMAT_VERSION,
            "tokenizer": step.corpus.tokenizer_dict,
            "runtime": asdict(self.machine),
            "scaler": step.scaler.state_dict(),
            "data_sha256": step.corpus.sha256,
            "window_order": WINDOW_ORDER_METHOD,
        }
        self.log.print(f"saving checkpoint to {out_dir}")
        best = os.path.join(out_dir, checkpoints.BEST_NAME)
        if is_best or step.cfg.always_save_checkpoint or not checkpoints.is_valid(best):
            checkpoints.save(checkpoint, best)  # first, so that a crash between the two does not lose the best state
        checkpoints.save(checkpoint, os.path.join(out_dir, checkpoints.LAST_NAME))


def load_best(step) -> int:
    """Load the weights in ckpt.pt into the model of every rank; returns their iteration, on rank 0."""
    best_path = os.path.join(step.cfg.out_dir, checkpoints.BEST_NAME)
    best = checkpoints.load(best_path) if step.rt.is_main else {"iter_num": 0}
    if step.rt.is_main:
        step.model.load_state_dict(best["model"])
    step.rt.broadcast([p.data for p in step.model.parameters()])
    return best["iter_num"]


def start_wandb(step, state: State, config: dict) -> Any:
    """The wandb run of rank 0, None on other ranks; every rank raises UserError if it cannot start."""
    cfg, wandb_runs = step.cfg, []
    step.rt.print("starting wandb")

    def start():
        wandb_runs.append(log.start_wandb(cfg.wandb_project, cfg.wandb_run_name, config, state.wandb_run_id))
        state.wandb_run_id = wandb_runs[0].id

    step.rt.run_on_main(start)
    return wandb_runs[0] if wandb_runs else None


def start_log(step, state: State, config: dict, machine: dict) -> tuple[Iterable[dict], dict]:
    """(records to keep, header) of a log that is about to be written; moves an earlier run aside."""
    cfg = step.cfg
    records: Iterable[dict] = []
    iter_num, evaluated_at = state.resumed_iters
    if cfg.init_from == "resume":
        records = log.records_before(log.iter_log(cfg.out_dir), iter_num, evaluated_at)
    elif old_dir := checkpoints.archive_run(cfg.out_dir, [log.LOG_FILE, log.LOSS_PLOT_FILE]):
        print0(f"{cfg.out_dir} contained an earlier run: its files are now in {old_dir}")
    header = dict(config=config, iter=iter_num, machine=machine, world_size=step.rt.world_size)
    header["versions"] = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    header |= dict(data=step.corpus.name, data_sha256=step.corpus.sha256, command=shlex.join(sys.argv))
    return records, header


def resume_command(out_dir: str, world_size: int) -> str:
    """The command that continues this run, quoted for the shell."""
    launcher = f"torchrun --standalone --nproc_per_node={world_size}" if world_size > 1 else "python"
    words = [sys.argv[0], "--init_from=resume", f"--out_dir={out_dir}"]
    return f"{launcher} {subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)}"
