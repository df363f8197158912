"""Generate samples from a prompt with a trained model or GPT-2.

    python sample.py --out_dir=out-don-char
    python sample.py --out_dir=out-don-char --prompt="Sancho " --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=gpt2 --prompt=FILE:prompt.txt --stop="###" --output=samples.jsonl

stdout contains only the samples, each followed by a line of dashes; everything else goes to stderr. On a terminal, the
first sample is printed as it is generated, and each line of dashes shows why the sample ended. Ctrl-C stops sampling.
"""

import contextlib
import json
import os
import shlex
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
from dongpt.decode.text import Detokenizer, parse_stop_ids, parse_stop_strings, read_prompt
from dongpt.log import progress_bar
from dongpt.program import atomic_write, locked_output, run_program
from dongpt.runtime import RuntimeConfig
from dongpt.text.tokenizers import CharTokenizer, UnknownPolicy, WordTokenizer

SAMPLE_SEPARATOR = "---------------"  # nanoGPT's


@dataclass(frozen=True)
class SampleConfig(RuntimeConfig, Sampling):
    out_dir: str = "out"  # run folder to load the checkpoint from
    init_from: str = "resume"  # resume (the run in out_dir), gpt2 (-medium, -large, -xl), hf:OWNER/NAME, or a path
    start: str = "\n"  # prompt to continue, or FILE:path to read it from a file; may be empty
    prompt: str = ""  # another name for --start
    unknown: UnknownPolicy = "error"  # how to treat characters of the prompt that are not in the vocabulary
    num_samples: Annotated[int, ">=", 1] = 10  # number of samples, generated as a batch
    max_new_tokens: Annotated[int, ">=", 0] = 500  # maximum number of tokens to generate per sample
    temperature: float = 0.8  # below 1 favors likely tokens; above 1 is more random; 0 picks the most likely token
    top_k: int | None = 200  # sample only from the top_k most likely tokens; 0 or None disables this
    stop: str = ""  # end a sample before this string, or before any string in a JSON list: --stop='["a", "b"]'
    stop_ids: str = ""  # end a sample before any of these token ids, separated by commas
    output: str = ""  # also write the samples to this file: JSON lines with the settings for a .jsonl file, else text
    base: str = ""  # path of the model that a LoRA adapter was trained on, if it has moved
    quantize: Quantization = "none"  # int8: 8-bit weights; faster on a CPU, with a slightly higher loss
    use_kv_cache: bool = True  # cache keys and values; False generates the same text, but more slowly


def check_output(path: str):
    """Raise UserError if path cannot be written, without writing anything."""
    folder, is_special = os.path.dirname(os.path.realpath(path)), os.path.exists(path) and not os.path.isfile(path)
    if os.path.isdir(path):
        raise UserError(f"--output={path} is a folder: pass the name of a file")
    if not os.path.isdir(folder):
        raise UserError(f"--output={path}: folder {folder} does not exist; create it, or pass another path")
    paths = [path] if is_special else [folder, path]  # special: a pipe or a device
    if not all(os.access(p, os.W_OK) for p in paths if os.path.exists(p)):
        raise UserError(f"--output={path}: permission denied; pass another path")


def write_output(cfg: SampleConfig, prompt: str, texts: Detokenizer):
    """Write the samples to cfg.output as JSON lines (generated text in "text") or as text, as in a pipe."""
    if os.path.splitext(cfg.output)[1].lower() in (".jsonl", ".json"):
        elsewhere = "start", "prompt", "seed", "output"  # in other fields of the record, or not needed
        settings = {key: value for key, value in asdict(cfg).items() if key not in elsewhere}
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
        raise UserError(f"--output={cfg.output} could not be written ({error}): pass another path") from error


def main(argv: list[str] | None = None) -> int:
    cfg, given = configurator.load(SampleConfig, argv)
    prompts = [given[key] for key in given if key in ("start", "prompt")]  # two names for one setting; the last wins
    prompt, stop = read_prompt(prompts[-1] if prompts else cfg.start), parse_stop_strings(cfg.stop)
    if cfg.output:
        check_output(cfg.output)
    with locked_output(cfg.output) if cfg.output else contextlib.nullcontext():
        return sample(cfg, prompt, stop, not prompts)


def sample(cfg: SampleConfig, prompt: str, stop: list[str], is_default_prompt: bool) -> int:
    """Load the model, generate, print and write the samples, and return the exit code."""
    path = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    generator = ready.load(path, cfg.device, cfg.dtype, cfg.quantize, cfg.compile, base=cfg.base)
    tokenizer = generator.require_tokenizer()
    if is_default_prompt and isinstance(tokenizer, CharTokenizer | WordTokenizer) and prompt not in tokenizer.ids:
        prompt = ""  # the vocabulary has no newline
    try:
        ids = generator.encode(prompt, cfg.unknown)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error
    texts = Detokenizer(tokenizer, cfg.num_samples, stop, parse_stop_ids(cfg.stop_ids, tokenizer.vocab_size))
    print(f"{generator.description}\n{describe_prompt(prompt, is_default_prompt)}", file=sys.stderr)
    block_size = generator.model.config.block_size
    if len(ids) > block_size:
        warning = f"the prompt has {len(ids)} tokens, more than fit in the model's context (block_size={block_size})"
        print(f"{warning}: only the last {context_len(len(ids), block_size)} are used", file=sys.stderr)
    prompts, sampling = [ids] * cfg.num_samples, cfg  # a SampleConfig is a Sampling
    settings = sampling, cfg.seed, cfg.use_kv_cache, texts.stop_ids, tokenizer.vocab_size
    is_terminal = sys.stdout.isatty()  # then the first sample is streamed, and the others are printed at the end
    print(prompt if is_terminal else "", end="", flush=True)
    bar = progress_bar(cfg.max_new_tokens, quiet=is_terminal)
    decode_error, start, ttft, n_steps = None, time.perf_counter(), 0.0, 0  # ttft: seconds to the first token
    with runtime.Interrupts() as interrupts:
        try:
            for next_ids in stream(generator.model, prompts, cfg.max_new_tokens, *settings):
                if interrupts.exit_code:
                    break
                ttft, n_steps, was_running = ttft or time.perf_counter() - start, n_steps + 1, not texts.end_reasons[0]
                piece = texts.add(next_ids.tolist())[0]
                bar.update()
                if is_terminal and was_running:
                    print(piece, end="", flush=True)
                    if texts.end_reasons[0]:
                        print(f"\n{separator(texts, 0, is_terminal)}", flush=True)
                        bar = progress_bar(cfg.max_new_tokens, n_steps, quiet=texts.done, leave=False)
                if texts.done:
                    break
        except DecodingError as error:  # non-finite logits: keep what was generated before
            decode_error = error
        seconds = time.perf_counter() - start
        bar.close()
        is_running = is_terminal and not texts.end_reasons[0]
        last_piece = texts.finish("interrupted" if interrupts.exit_code else "failed" if decode_error else "length")[0]
        is_empty = n_steps == 0 and bool(decode_error or interrupts.exit_code)
        try:
            if cfg.output and not is_empty:  # before printing, since stdout may be closed
                write_output(cfg, prompt, texts)
        finally:
            print(f"{last_piece}\n{separator(texts, 0, is_terminal)}\n" if is_running else "", end="", flush=True)
            for i in [] if is_empty else range(is_terminal, cfg.num_samples):
                print(f"{prompt}{texts.texts[i]}\n{separator(texts, i, is_terminal)}")
            sys.stdout.flush()
    if decode_error:
        raise UserError(str(decode_error))
    n_tokens = sum(texts.n_tokens)
    speed = f"{n_tokens:,} tokens in {seconds:.1f} s ({n_tokens / seconds:,.0f} tokens/s)"
    latency = f", first token after {ttft * 1000:.0f} ms" if n_steps else ""
    print(speed + latency + (", interrupted" if interrupts.exit_code else ""), file=sys.stderr)
    if n_cut := texts.end_reasons.count("length"):
        cut_texts = "the sample was" if cfg.num_samples == 1 else f"{n_cut} of {cfg.num_samples} samples were"
        print(f"{cut_texts} cut off by the length limit, --max_new_tokens={cfg.max_new_tokens}", file=sys.stderr)
    if not interrupts.exit_code:
        print(f"next: {next_step(cfg, path, is_default_prompt, tokenizer.template is not None)}", file=sys.stderr)
    return interrupts.exit_code


def describe_prompt(prompt: str, is_default: bool) -> str:
    """Return a line that shows the prompt, shortened if it is long."""
    if is_default:
        return 'prompt: none; the model chooses how to start (set a prompt with --prompt="...")'
    shown = prompt if len(prompt) <= 200 else f"{prompt[:100]} ... {prompt[-100:]}"
    return f"prompt: {json.dumps(shown, ensure_ascii=False)}, {len(prompt):,} character{'s' * (len(prompt) != 1)}"


def separator(texts: Detokenizer, i: int, is_terminal: bool) -> str:
    """Return the separator line below sample i. On a terminal, it also shows the sample's number and end reason."""
    if not is_terminal:
        return SAMPLE_SEPARATOR
    reasons = {
        "length": f"cut off after {texts.n_tokens[i]:,} tokens",
        "stop": "ended at --stop or --stop_ids",
        "interrupted": "interrupted",
        "failed": "failed",
    }
    return f"{SAMPLE_SEPARATOR} sample {i + 1} of {len(texts.texts)}: {reasons[texts.end_reasons[i]]}"


def next_step(cfg: SampleConfig, path: str, is_default_prompt: bool, is_chat_model: bool) -> str:
    """Return a command to try next, with a comment on what it does."""
    if is_chat_model:
        return f"python chat.py {shlex.quote(path)}  # talk to this model"
    model = f"--out_dir={shlex.quote(path)}" if cfg.init_from == "resume" else f"--init_from={shlex.quote(path)}"
    if is_default_prompt:
        return f'python sample.py {model} --prompt="The "  # continue your own text'
    return f"python sample.py {model} --temperature=0.5  # more predictable samples; higher values are more random"


if __name__ == "__main__":
    run_program(main)
