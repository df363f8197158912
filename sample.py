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
from dataclasses import asdict, dataclass
from typing import Annotated

import configurator
from configurator import UserError
from dongpt import runtime
from dongpt.decode import ready
from dongpt.decode.decoder import stream
from dongpt.decode.ready import Quantization
from dongpt.decode.sampling import DecodingError, Sampling, context_len
from dongpt.decode.text import Detokenizer, parse_stop_ids, parse_stop_strings
from dongpt.log import progress_bar
from dongpt.program import atomic_write, locked_output, run_program
from dongpt.runtime import ROOT, RuntimeConfig
from dongpt.text.tokenizers import CharTokenizer, UnknownPolicy, WordTokenizer

SAMPLE_SEPARATOR = "---------------"  # nanoGPT's


@dataclass(frozen=True)
class SampleConfig(RuntimeConfig, Sampling):
    out_dir: str = "out"  # take the checkpoint of this run
    init_from: str = "resume"  # resume: from out_dir; or gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a path
    start: str = "\n"  # the prompt, or FILE:path of a file that holds it; may be empty
    unknown: UnknownPolicy = "error"  # characters of the prompt that the vocabulary lacks: error, skip, or replace them
    num_samples: Annotated[int, ">=", 1] = 10  # how many texts, all drawn together
    max_new_tokens: Annotated[int, ">=", 0] = 500  # tokens of each text after the prompt, unless it stops earlier
    temperature: float = 0.8  # below 1 favors likely tokens, above 1 is more random; 0 takes the likeliest token
    top_k: int | None = 200  # draw from this many likeliest tokens; 0 or None is off
    stop: str = ""  # end a text before this string; several as a JSON list, --stop='["a", "b"]'
    stop_ids: str = ""  # end a text before one of these token ids, separated by commas
    output: str = ""  # write the texts to this file too: NAME.jsonl as JSON lines with the settings, else as printed
    quantize: Quantization = "none"  # int8: weights of one byte, on a CPU faster; README says what loss it costs
    use_kv_cache: bool = True  # encode each token once; off gives the same text, slower


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
    folder, is_special = os.path.dirname(os.path.realpath(path)), os.path.exists(path) and not os.path.isfile(path)
    if os.path.isdir(path):
        raise UserError(f"--output={path}: it is a folder, name a file in one that exists")
    if not os.path.isdir(folder):
        raise UserError(f"--output={path}: there is no folder {folder}, name a file in one that exists")
    paths = [path] if is_special else [folder, path]  # special: a pipe or a device
    if not all(os.access(p, os.W_OK) for p in paths if os.path.exists(p)):
        raise UserError(f"--output={path} may not be written: name another file")


def write_output(cfg: SampleConfig, prompt: str, texts: Detokenizer):
    """Write cfg.output: JSON lines, whose "text" is what follows the prompt, or the same text as printed."""
    if os.path.splitext(cfg.output)[1].lower() in (".jsonl", ".json"):
        settings = {key: value for key, value in asdict(cfg).items() if key not in ("start", "seed", "output")}
        records = [
            dict(prompt=prompt, text=text, sample=i, tokens=n, end=end, seed=cfg.seed, settings=settings)
            for i, (text, n, end) in enumerate(zip(texts.texts, texts.n_tokens, texts.end_reasons))
        ]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
    else:
        lines = [f"{prompt}{text}\n{SAMPLE_SEPARATOR}" for text in texts.texts]
    try:
        with atomic_write(cfg.output, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise UserError(f"--output={cfg.output} could not be written ({error}): name another file") from error


def main(argv: list[str] | None = None) -> int:
    cfg, given = configurator.load(SampleConfig, argv)
    prompt, stop = read_prompt(cfg.start), parse_stop_strings(cfg.stop)
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
    texts = Detokenizer(tokenizer, cfg.num_samples, stop, parse_stop_ids(cfg.stop_ids, tokenizer.vocab_size))
    print(generator.description, file=sys.stderr)
    block_size = generator.model.config.block_size
    if len(ids) > block_size:
        n_kept = context_len(len(ids), block_size)
        warning = f"the prompt has {len(ids)} tokens, more than block_size={block_size}: the model begins with "
        print(f"{warning}its last {n_kept}, as if they had come one by one", file=sys.stderr)
    prompts, sampling = [ids] * cfg.num_samples, cfg  # a SampleConfig is a Sampling
    settings = sampling, cfg.seed, cfg.use_kv_cache, texts.stop_ids, tokenizer.vocab_size
    streams_first = sys.stdout.isatty()  # as it is generated; the others are printed at the end
    print(prompt if streams_first else "", end="", flush=True)
    bar = progress_bar(cfg.max_new_tokens, quiet=streams_first)
    decode_error, start, ttft, n_steps = None, time.perf_counter(), 0.0, 0  # ttft: seconds to the first token
    with runtime.Interrupts() as interrupts:
        try:
            for next_ids in stream(generator.model, prompts, cfg.max_new_tokens, *settings):
                if interrupts.exit_code:
                    break
                ttft, n_steps, was_running = ttft or time.perf_counter() - start, n_steps + 1, not texts.end_reasons[0]
                piece = texts.add(next_ids.tolist())[0]
                bar.update()
                if streams_first and was_running:
                    print(piece, end="", flush=True)
                    if texts.end_reasons[0]:
                        print(f"\n{SAMPLE_SEPARATOR}", flush=True)
                        bar = progress_bar(cfg.max_new_tokens, n_steps, quiet=texts.done, leave=False)
                if texts.done:
                    break
        except DecodingError as error:  # logits that are not finite: the texts keep what was generated before
            decode_error = error
        seconds = time.perf_counter() - start
        bar.close()
        is_running = streams_first and not texts.end_reasons[0]
        last_piece = texts.finish("interrupted" if interrupts.exit_code else "failed" if decode_error else "length")[0]
        is_empty = n_steps == 0 and bool(decode_error or interrupts.exit_code)
        try:
            if cfg.output and not is_empty:  # before printing, since stdout may be closed
                write_output(cfg, prompt, texts)
        finally:
            print(f"{last_piece}\n{SAMPLE_SEPARATOR}\n" if is_running else "", end="", flush=True)
            for text in [] if is_empty else texts.texts[streams_first:]:
                print(f"{prompt}{text}\n{SAMPLE_SEPARATOR}")
            sys.stdout.flush()
    if decode_error:
        raise UserError(str(decode_error))
    n_tokens = sum(texts.n_tokens)
    speed = f"{n_tokens:,} tokens in {seconds:.1f} s ({n_tokens / seconds:,.0f} tokens/s)"
    latency = f", the first after {ttft * 1000:.0f} ms" if n_steps else ""
    print(speed + latency + (", interrupted" if interrupts.exit_code else ""), file=sys.stderr)
    return interrupts.exit_code


if __name__ == "__main__":
    run_program(main)
