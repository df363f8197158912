"""Print texts that a trained model, or GPT-2, generates from a prompt.

    python sample.py --out_dir=out-don-char
    python sample.py --out_dir=out-don-char --start="Sancho " --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --stop="###" --output=samples.jsonl

On a terminal the first text appears as it is generated. Ctrl-C ends all of them where they are.
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from typing import Annotated

import configurator
from configurator import UserError
from dongpt import runtime
from dongpt.decode import ready
from dongpt.decode.ready import Quantize
from dongpt.decode.sampling import Sampling, window_size
from dongpt.decode.text import Detokenizer, read_stop
from dongpt.log import progress_bar
from dongpt.program import locked_output, replaced_file, run_program
from dongpt.runtime import ROOT, RuntimeConfig
from dongpt.text.tokenizers import CharTokenizer, Unknown, WordTokenizer

SEPARATOR = "---------------"  # nanoGPT's


@dataclass(frozen=True)
class SampleConfig(RuntimeConfig, Sampling):
    out_dir: str = "out"  # take the checkpoint of this run
    init_from: str = "resume"  # resume: from out_dir; or gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a path
    start: str = "\n"  # the prompt, or FILE:path of a file that holds it; may be empty
    unknown: Unknown = "error"  # characters of the prompt that the vocabulary lacks: error, skip, or replace them
    num_samples: Annotated[int, ">=", 1] = 10  # how many texts, all drawn together
    max_new_tokens: Annotated[int, ">=", 0] = 500  # tokens of each text after the prompt, unless it stops earlier
    temperature: float = 0.8  # below 1 favors likely tokens, above 1 is more random; 0 takes the likeliest token
    top_k: int | None = 200  # draw from this many likeliest tokens; 0 or None is off
    stop: str = ""  # end a text before this string; several as a JSON list, --stop='["a", "b"]'
    stop_ids: str = ""  # end a text before one of these token ids, separated by commas
    output: str = ""  # write the texts to this file too: NAME.jsonl as JSON lines with the settings, else as printed
    quantize: Quantize = "none"  # int8: weights of one byte, on a CPU faster; README says what loss it costs
    use_kv_cache: bool = True  # encode each token once; off gives the same text, slower

    def __post_init__(self):
        if problems := self.problems():
            raise UserError("; ".join(problems))


def read_prompt(start: str) -> str:
    """The prompt: `start` itself, or after FILE: the text of a file in the working directory or beside this script."""
    if not start.startswith("FILE:"):
        return start
    name = start.removeprefix("FILE:")
    for path in (name, os.path.join(ROOT, name)):
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8-sig") as file:
                    return file.read()
            except UnicodeDecodeError as error:
                raise UserError(f"the prompt file {name} is not UTF-8 at byte {error.start}: convert it") from error
    raise UserError(f"there is no prompt file {name!r}: give --start=FILE:path of a text file, or the prompt itself")


def check_output(path: str):
    """Raise UserError unless a file can be written at path; nothing is written yet."""
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path):
        raise UserError(f"--output={path}: it is a folder, name a file in one that exists")
    if not os.path.isdir(folder):
        raise UserError(f"--output={path}: there is no folder {folder}, name a file in one that exists")
    is_special = os.path.exists(path) and not os.path.isfile(path)  # a pipe or a device
    if not all(os.access(p, os.W_OK) for p in (path, *([] if is_special else [folder])) if os.path.exists(p)):
        raise UserError(f"--output={path} may not be written: name another file")


def write_output(cfg: SampleConfig, prompt: str, texts: Detokenizer):
    """Write cfg.output: JSON lines, whose "text" is what follows the prompt, or the same text as printed."""
    if os.path.splitext(cfg.output)[1].lower() in (".jsonl", ".json"):
        settings = {key: value for key, value in asdict(cfg).items() if key not in ("start", "seed", "output")}
        records = [
            dict(prompt=prompt, text=text, sample=i, tokens=n, end=end, seed=cfg.seed, settings=settings)
            for i, (text, n, end) in enumerate(zip(texts.texts, texts.n_tokens, texts.ends))
        ]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
    else:
        lines = [f"{prompt}{text}\n{SEPARATOR}" for text in texts.texts]
    try:
        with replaced_file(cfg.output, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise UserError(f"--output={cfg.output} could not be written ({error}): name another file") from error


class SamplePrinter:
    """Prints the samples at the end; on a terminal the first one while it is generated."""

    def __init__(self, prompt: str, num_samples: int, max_new_tokens: int):
        self.prompt, self.num_samples, self.max_new_tokens = prompt, num_samples, max_new_tokens
        self.streams_first = self.first_is_open = sys.stdout.isatty()
        self.bar = progress_bar(max_new_tokens, quiet=self.streams_first)
        if self.streams_first:
            print(prompt, end="", flush=True)

    def update(self, piece: str, first_is_done: bool, step: int):
        """Show progress after token number step, of which `piece` is the text in the first sample."""
        self.bar.update()
        if self.first_is_open:
            print(piece, end="", flush=True)
            if first_is_done:
                self._close_first()
                if self.num_samples > 1 and step < self.max_new_tokens:  # the others continue, out of sight
                    self.bar = progress_bar(self.max_new_tokens, step, leave=False)

    def _close_first(self):
        print(f"\n{SEPARATOR}", flush=True)
        self.first_is_open = False

    def finish(self, piece: str, texts: list[str]):
        """Print the last piece of the first sample, and all samples that were not shown yet."""
        self.bar.close()
        if self.first_is_open:
            print(piece, end="")
            self._close_first()
        for text in texts[self.streams_first :]:
            print(f"{self.prompt}{text}\n{SEPARATOR}")
        sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    cfg, given = configurator.load(SampleConfig, argv)
    prompt, stop = read_prompt(cfg.start), read_stop(cfg.stop)
    if cfg.output:
        check_output(cfg.output)
    with locked_output(cfg.output) if cfg.output else contextlib.nullcontext():
        return sample(cfg, prompt, stop, "start" not in given)


def sample(cfg: SampleConfig, prompt: str, stop: list[str], is_default_prompt: bool) -> int:
    """Load the model, generate the samples, print and write them; returns the exit code."""
    path = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    generator = ready.load(path, cfg.device, cfg.dtype, cfg.quantize, cfg.compile)
    tokenizer = generator.require_tokenizer()
    if is_default_prompt and isinstance(tokenizer, CharTokenizer | WordTokenizer) and prompt not in tokenizer.ids:
        prompt = ""  # the vocabulary has no line end
    try:
        ids = generator.encode(prompt, cfg.unknown)
    except UserError as error:
        raise UserError(f"--start: {error}") from error
    texts = generator.detokenizer(cfg.num_samples, stop, cfg.stop_ids)
    print(generator.description, file=sys.stderr)
    block_size = generator.model.config.block_size
    if len(ids) > block_size:
        n_seen = window_size(len(ids), block_size)
        note = f"the prompt has {len(ids)} tokens, more than block_size={block_size}: the model begins with its last "
        print(f"{note}{n_seen}, as if they had come one by one", file=sys.stderr)
    sampling = Sampling(**{field.name: getattr(cfg, field.name) for field in fields(Sampling)})
    prompts, settings = [ids] * cfg.num_samples, (sampling, cfg.seed, texts.stop_ids, cfg.use_kv_cache)
    printer, failure = SamplePrinter(prompt, cfg.num_samples, cfg.max_new_tokens), None
    start, first, n_steps = time.perf_counter(), 0.0, 0  # first: seconds to the first token
    with runtime.Interrupts() as interrupts:
        try:
            for next_ids in generator.stream_ids(prompts, cfg.max_new_tokens, *settings):
                if interrupts.code:
                    break
                first, n_steps = first or time.perf_counter() - start, n_steps + 1
                printer.update(texts.add(next_ids.tolist())[0], bool(texts.ends[0]), n_steps)
                if texts.done:
                    break
        except UserError as error:  # logits that are not finite: the texts keep what was generated before
            failure = error
        seconds = time.perf_counter() - start
        pieces = texts.finish("interrupted" if interrupts.code else "failed" if failure else "length")
        is_empty = n_steps == 0 and bool(failure or interrupts.code)
        try:
            if cfg.output and not is_empty:  # before printing, since stdout may be closed
                write_output(cfg, prompt, texts)
        finally:
            printer.finish(pieces[0], [] if is_empty else texts.texts)
    if failure:
        raise failure
    n_tokens = sum(texts.n_tokens)
    speed = f"{n_tokens:,} tokens in {seconds:.1f} s ({n_tokens / seconds:,.0f} tokens/s)"
    latency = f", the first after {first * 1000:.0f} ms" if n_steps else ""
    print(speed + latency + (", interrupted" if interrupts.code else ""), file=sys.stderr)
    return interrupts.code


if __name__ == "__main__":
    run_program(main)
