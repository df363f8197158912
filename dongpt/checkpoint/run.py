"""Write, validate and exactly restore the checkpoints and the log of a training run.

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
from dongpt.checkpoint import lora
from dongpt.checkpoint.legacy import grow_vocabulary
from dongpt.log import RunLog, check_finite_loss
from dongpt.runtime import MachineInfo, print0, seed_everything
from dongpt.text.tokenizers import added_special_tokens
from model import GPT, CausalSelfAttention

WINDOW_ORDER_METHOD = "numpy.random.Generator.permutation"  # earlier versions differ above 2**20 windows


@dataclass
class State:
    """Progress of a run: everything needed to resume it besides the weights and the optimizer state."""

    iter_num: Annotated[int, ">=", 0] = 0  # completed updates
    samples_seen: Annotated[int, ">=", 0] = 0  # training windows used; called "windows" in checkpoints
    best_val_loss: float = math.inf  # lowest validation loss of any saved state
    evaluated_at: Annotated[int, ">=", -1] = -1  # iter_num of the last evaluation
    evals_since_best: Annotated[int, ">=", 0] = 0
    wandb_run_id: str | None = None
    resumed_iters = 0, -1  # iter_num and evaluated_at when this process started; not a field, so not saved


def check_stored_values(cls: type, values: Any, source: str) -> dict[str, Any]:
    """Check the types and bounds of the values that belong to fields of the dataclass cls, and return them.

    Ignores keys that cls lacks, such as other trainers' keys. Raises UserError; its message starts with `source`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source} is {values!r}, which is not a dict: use another checkpoint")
    stored = {key: values[key] for key in get_type_hints(cls) if key in values}
    for key, value in stored.items():
        value = value.item() if torch.is_tensor(value) and value.numel() == 1 else value  # nanoGPT's best_val_loss
        stored[key] = configurator.check_setting(key, value, cls, source)
    if invalid := configurator.bounds_errors(cls, stored):
        raise UserError(f"{source}: {'; '.join(invalid)}: use another checkpoint")
    return stored


def resumed_settings(cls: type, checkpoint: dict, path: str, overrides: dict) -> dict:
    """Return the checkpoint's settings that still apply when its run is resumed. cls is the config class."""
    settings = check_stored_values(cls, checkpoint.get("config", {}), f"{path}: config")
    settings.pop("out_dir", None)  # the directory may have been moved
    out_dir, vectors, mask = os.path.dirname(path), settings.get("init_wte", ""), settings.get("document_mask", False)
    if overrides.get("init_wte", "") not in ("", vectors):
        reason = f"and the run in {out_dir} started {f'with {vectors}' if vectors else 'without it'}"
        raise UserError(f"init_wte={overrides['init_wte']} is for new runs, {reason}: remove it, or change out_dir")
    if overrides.get("document_mask", mask) != mask:
        reason = f"the run in {out_dir} has document_mask={mask}, and losses with and without it are not comparable"
        raise UserError(f"{reason}: remove document_mask, or start a new run with init_from={out_dir}")
    for key in ("lora_rank", "lora_alpha", "lora_targets"):
        if overrides.get(key, stored := settings.get(key, getattr(lora.LoraConfig, key))) != stored:
            problem = f"{key}={overrides[key]} contradicts {path}, which has {stored}"
            raise UserError(f"{problem}: remove {key}, or start a new run with init_from={out_dir} in another out_dir")
    if "dataset" in overrides:
        settings["data_dir"] = ""  # otherwise, it would take precedence over dataset
    return settings


def stored_machine(checkpoint: dict, path: str) -> MachineInfo | None:
    """Return the MachineInfo in a checkpoint, or None if it has none, as in nanoGPT's checkpoints."""
    if not checkpoint.get("runtime"):
        return None
    values = check_stored_values(MachineInfo, checkpoint["runtime"], f"{path}: runtime")
    if missing := get_type_hints(MachineInfo).keys() - values.keys():
        raise UserError(f"{path}: runtime lacks {', '.join(sorted(missing))}; use another checkpoint")
    return MachineInfo(**values)


def restore(checkpoint: dict, path: str, step) -> State:
    """Load the optimizer and gradient scaler from a checkpoint and return its State. Prints what cannot be restored."""
    cfg, corpus = step.cfg, step.corpus
    state = State(**check_stored_values(State, checkpoint, path))
    windows = checkpoint.get("windows", state.iter_num * step.samples_per_iter)  # nanoGPT does not store it
    state.samples_seen = configurator.check_type(windows, int, f"{path}: windows")
    state.resumed_iters = state.iter_num, state.evaluated_at
    if "optimizer" in checkpoint:
        checkpoints.restore_optimizer(step.optimizer, checkpoint, step.model, path)
    keys = {"optimizer state": "optimizer", "iteration number": "iter_num"}
    if missing := [name for name, key in keys.items() if key not in checkpoint]:
        print0(f"{path} has no {' or '.join(missing)}: starting with fresh values")
    if checkpoint.get("scaler"):
        try:
            step.scaler.load_state_dict(checkpoint["scaler"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: the gradient scaler is damaged ({error!r}); use another checkpoint") from error
    if checkpoint.get("data_sha256", corpus.sha256) != corpus.sha256:
        print0(f"this resumed run is not bitwise reproducible: {corpus.name} has changed since the run started")
    elif "window_order" not in checkpoint and not corpus.masks and corpus.windows_per_epoch(cfg.block_size) > 2**20:
        print0("this resumed run is not bitwise reproducible: corpora of this size are now shuffled differently")
    if not checkpoints.is_valid(os.path.join(cfg.out_dir, checkpoints.BEST_NAME)):
        state.best_val_loss = math.inf  # that checkpoint is gone, so the next one is the best
    return state


def adapt_model(weights, cfg, corpus) -> GPT:
    """Return the model of `weights`, train.py's InitWeights, adapted to the data and to the settings in cfg."""
    model, is_resume = weights.model, bool(weights.checkpoint)
    is_new_adapter = cfg.lora_rank > 0 and not is_resume
    sha256 = checkpoints.source_sha256(model, weights.source) if is_new_adapter else ""  # before the vocabulary grows
    n_new_ids = adapt_vocabulary(model, weights.tokenizer, weights.path, corpus, cfg.seed, is_resume)
    set_dropout(model, cfg.dropout, cfg.attn_dropout)
    if is_new_adapter:
        base = os.path.abspath(weights.path) if os.path.exists(weights.path) else weights.path  # or a name, e.g. gpt2
        places = [cfg.out_dir, *(os.path.join(cfg.out_dir, n) for n in (checkpoints.BEST_NAME, checkpoints.LAST_NAME))]
        if any(os.path.exists(place) and os.path.realpath(place) == os.path.realpath(base) for place in places):
            raise UserError(f"{cfg.out_dir} holds {weights.path}, which the adapter needs: choose another out_dir")
        info: dict = dict(alpha=cfg.lora_alpha or 2.0 * cfg.lora_rank, base=base, sha256=sha256)
        info |= {"first_new_id": corpus.vocab_size - n_new_ids} if n_new_ids else {}
        seed_everything(cfg.seed)
        lora.add_adapter(model, lora.target_ranks(model, cfg.lora_targets, cfg.lora_rank), info, n_new_ids)
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):
            module.lora_dropout = cfg.lora_dropout
    return model


def adapt_vocabulary(model: GPT, tokenizer: dict | None, path: str, corpus, seed: int, is_resume: bool) -> int:
    """Extend a loaded model's vocabulary with the data's special tokens that the model's tokenizer lacks.

    Returns the number of new tokens, whose ids are the highest ones. Raises UserError if the vocabularies differ in any
    other way, or if they differ at all when resuming.
    """
    added_tokens = added_special_tokens(tokenizer, corpus.tokenizer_dict)
    if added_tokens is None or added_tokens and is_resume:
        reason = f"{path} and {corpus.name} do not have the same vocabulary"
        raise UserError(f"{reason}: prepare the data with the same tokenizer, or start with init_from=scratch")
    n_rows = model.config.vocab_size
    if added_tokens and corpus.vocab_size > n_rows:
        seed_everything(seed)
        grow_vocabulary(model, corpus.vocab_size)
        change = f"grows from {n_rows} to {corpus.vocab_size} rows"
    else:
        change = f"already has room for them in the padding of its {n_rows} rows"
    if added_tokens:
        print0(f"the data adds the special tokens {', '.join(added_tokens)}: the token embedding {change}")
    return len(added_tokens)


def set_dropout(model: GPT, dropout: float, attn_dropout: float):
    """Apply a new run's dropout settings to a loaded model."""
    model.config = replace(model.config, dropout=dropout, attn_dropout=attn_dropout)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif isinstance(module, CausalSelfAttention):
            module.attn_dropout = attn_dropout


@dataclass
class Saver:
    """Checkpoint writer for a run. `config` holds the settings to store in each checkpoint."""

    step: Any
    config: dict
    machine: MachineInfo
    log: RunLog

    def save(self, state: State, is_best: bool):
        """Write ckpt_last.pt, and also ckpt.pt if this state is the best or there is no valid ckpt.pt.

        Raises UserError without writing anything if a weight is NaN or infinite.
        """
        step, out_dir = self.step, self.step.cfg.out_dir
        if not all(torch.isfinite(parameter).all() for parameter in step.model.parameters()):
            check_finite_loss(math.nan, state.iter_num)
        progress = {"windows" if key == "samples_seen" else key: value for key, value in asdict(state).items()}
        checkpoint = {
            "model": lora.trained_weights(step.model),
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
            **({"lora": step.model.adapter} if step.model.adapter else {}),
        }
        best = os.path.join(out_dir, checkpoints.BEST_NAME)
        saves_best = is_best or step.cfg.always_save_checkpoint or not checkpoints.is_valid(best)
        note = "" if saves_best else f" ({checkpoints.LAST_NAME}; {checkpoints.BEST_NAME} keeps the best model so far)"
        self.log.print(f"saving checkpoint to {out_dir}{note}")
        if saves_best:
            checkpoints.save(checkpoint, best)  # first, so that a crash between the two keeps the best state
        checkpoints.save(checkpoint, os.path.join(out_dir, checkpoints.LAST_NAME))


def load_best(step) -> int:
    """Load the weights in ckpt.pt into the model on every rank. Return their iteration on rank 0, and 0 elsewhere."""
    best_path = os.path.join(step.cfg.out_dir, checkpoints.BEST_NAME)
    best: dict = checkpoints.load(best_path) if step.rt.is_main else {"iter_num": 0}
    if step.rt.is_main:
        step.model.load_state_dict({**step.model.state_dict(), **best["model"]})  # an adapter lacks the frozen weights
    step.rt.broadcast([p.data for p in step.model.parameters()])
    return best["iter_num"]


def start_wandb(step, state: State, config: dict) -> Any:
    """Start wandb on rank 0 and return its run, or None on other ranks. Every rank raises UserError if this fails."""
    cfg, wandb_runs = step.cfg, []
    step.rt.print("starting wandb")

    def start():
        wandb_runs.append(log.start_wandb(cfg.wandb_project, cfg.wandb_run_name, config, state.wandb_run_id))
        state.wandb_run_id = wandb_runs[0].id

    step.rt.run_on_main(start)
    return wandb_runs[0] if wandb_runs else None


def start_log(step, state: State, config: dict, machine: dict) -> tuple[Iterable[dict], dict]:
    """Return (records to keep, header) for a log that is about to be written. Archives an earlier run in out_dir."""
    cfg = step.cfg
    records: Iterable[dict] = []
    iter_num, evaluated_at = state.resumed_iters
    if cfg.init_from == "resume":
        records = log.records_before(log.iter_log(cfg.out_dir), iter_num, evaluated_at)
    elif old_dir := checkpoints.archive_run(cfg.out_dir, [log.LOG_FILE, log.LOSS_PLOT_FILE]):
        print0(f"{cfg.out_dir} contained an earlier run: its files were moved to {old_dir}")
    header = dict(config=config, iter=iter_num, machine=machine, world_size=step.rt.world_size)
    header["versions"] = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    header |= dict(data=step.corpus.name, data_sha256=step.corpus.sha256, command=shlex.join(sys.argv))
    return records, header


def resume_command(out_dir: str, world_size: int) -> str:
    """Return the command that resumes this run, quoted for the shell."""
    launcher = f"torchrun --standalone --nproc_per_node={world_size}" if world_size > 1 else "python"
    words = [sys.argv[0], "--init_from=resume", f"--out_dir={out_dir}"]
    return f"{launcher} {subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)}"
