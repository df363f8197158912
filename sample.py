"""Prints texts that a trained model, or GPT-2, writes after a prompt.

    python sample.py --out_dir=out-don-char
    python sample.py --out_dir=out-don-char --start="Sancho " --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --stop="###" --output=samples.jsonl

On a terminal the first text appears as it is written. Ctrl-C ends all of them where they are.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields

import configurator
from configurator import UserError
from dongpt import runtime
from dongpt.checkpoint.files import load_anything
from dongpt.decode.ready import Quantize, to_inference
from dongpt.decode.sampling import Sampling, window_size
from dongpt.decode.text import Texts, read_stop, read_stop_ids
from dongpt.log import progress_bar
from dongpt.program import run_program
from dongpt.runtime import ROOT, RuntimeConfig
from dongpt.text.tokenizers import Tokenizer, Unknown, from_dict

SEPARATOR = "---------------"  # nanoGPT's


@dataclass(frozen=True)
class SampleConfig(RuntimeConfig, Sampling):
    out_dir: str = "out"  # take the checkpoint of this run
    init_from: str = "resume"  # resume: from out_dir; or gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a path
    start: str = "\n"  # the prompt, or FILE:path of a file that holds it; may be empty
    unknown: Unknown = "error"  # what the vocabulary lacks in the prompt: error, skip it, or replace it
    num_samples: int = 10  # how many texts, all drawn together
    max_new_tokens: int = 500  # length of each text behind the prompt, unless it stops before
    temperature: float = 0.8  # below 1 bolder on the likely, above 1 more random; 0 takes the likeliest token
    top_k: int | None = 200  # draw from this many likeliest tokens; 0 or None is off
    stop: str = ""  # end a text before this string; several as a JSON list, --stop='["a", "b"]'
    stop_ids: str = ""  # end a text before one of these token ids, divided by commas
    output: str = ""  # write the texts to this file too: NAME.jsonl as JSON lines with the settings, else as printed
    quantize: Quantize = "none"  # int8: weights of one byte, on a CPU faster; README says what loss it costs
    use_kv_cache: bool = True  # encode each token once; off gives the same text, slower

    def __post_init__(self):
        problems = [
            f"{name}={getattr(self, name)} must be at least {least}"
            for name, least in (("num_samples", 1), ("max_new_tokens", 0))
            if getattr(self, name) < least
        ]
        if problems := problems + self.problems():
            raise UserError("; ".join(problems))


def read_prompt(start: str) -> str:
    """The prompt that start means: itself, or the text of the file behind FILE:, here or beside this script."""
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


def encode_prompt(tokenizer: Tokenizer, prompt: str, unknown: Unknown = "error") -> list[int]:
    """The prompt's ids; special tokens in it are recognised. [] for an empty one."""
    try:
        return tokenizer.encode(prompt, special=True, unknown=unknown)
    except ValueError as error:
        raise UserError(f"--start: {error}") from error


def check_output(path: str):
    """Raise UserError unless a file can be written at path; nothing is written yet."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise UserError(
            f"--output={path}: "
            + ("it is a folder" if os.path.isdir(path) else f"there is no folder {folder}")
            + ", name a file in one that exists"
        )
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"--output={path} may not be written: name another file")


def write_output(cfg: SampleConfig, prompt: str, texts: Texts):
    """Write cfg.output: JSON lines, where text is what follows the prompt, or what is printed."""
    if os.path.splitext(cfg.output)[1].lower() in (".jsonl", ".json"):
        settings = {key: value for key, value in asdict(cfg).items() if key not in ("start", "seed", "output")}
        lines = [
            json.dumps(
                {
                    "prompt": prompt,
                    "text": text,
                    "sample": i,
                    "tokens": n,
                    "end": end,
                    "seed": cfg.seed,
                    "settings": settings,
                },
                ensure_ascii=False,
            )
            for i, (text, n, end) in enumerate(zip(texts.texts, texts.n_tokens, texts.ends))
        ]
    else:
        lines = [f"{prompt}{text}\n{SEPARATOR}" for text in texts.texts]
    path = os.path.realpath(cfg.output)
    whole = os.path.isfile(path) or not os.path.exists(path)  # a pipe or a device is no file that could be replaced
    try:
        with open(path + ".part" * whole, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        if whole:
            os.replace(path + ".part", path)
    except OSError as error:
        raise UserError(f"--output={cfg.output} could not be written ({error}): name another file") from error


class Screen:
    """Prints the texts: on a terminal the first as it comes, the others and all elsewhere when they are over."""

    def __init__(self, prompt: str, n_texts: int, n_steps: int):
        self.prompt, self.n_texts, self.n_steps = prompt, n_texts, n_steps
        self.live, self.bar, self.first_is_over = sys.stdout.isatty(), None, False
        if self.live:
            print(prompt, end="", flush=True)
        else:
            self.bar = progress_bar(n_steps, 0)

    def show(self, pieces: list[str], first_is_over: bool, step: int):
        """What every text has to say after its token number step."""
        if self.bar:
            self.bar.update()
        if self.live and not self.first_is_over:
            print(pieces[0], end="", flush=True)
            if first_is_over:
                self._end_first()
                if self.n_texts > 1 and step < self.n_steps:
                    self.bar = progress_bar(self.n_steps, step)  # the others go on, out of sight

    def _end_first(self):
        print(f"\n{SEPARATOR}", flush=True)
        self.first_is_over = True

    def end(self, pieces: list[str], texts: list[str]):
        """The last pieces, and all texts but what was shown."""
        if self.bar:
            self.bar.leave = not self.live
            self.bar.close()
        if self.live and not self.first_is_over:
            print(pieces[0], end="")
            self._end_first()
        for text in texts[self.live :]:
            print(f"{self.prompt}{text}\n{SEPARATOR}")
        sys.stdout.flush()


def follow(
    stream, texts: Texts, screen: Screen, interrupts: runtime.Interrupts
) -> tuple[int, float, ValueError | None]:
    """Keep and show what comes, until all texts are over: (steps, seconds to the first, the error that ended it).

    What was drawn before logits that are not finite, or before Ctrl-C, stays.
    """
    began, first, n_steps = time.perf_counter(), 0.0, 0
    try:
        for new in stream:
            if interrupts.code:
                break
            first, n_steps = first or time.perf_counter() - began, n_steps + 1
            screen.show(texts.add(new.tolist()), bool(texts.ends[0]), n_steps)
            if texts.done:
                break
    except ValueError as error:
        return n_steps, first, error
    return n_steps, first, None


def main(argv: list[str] | None = None):
    cfg, given = configurator.load(SampleConfig, argv)
    prompt, stop = read_prompt(cfg.start), read_stop(cfg.stop)
    if cfg.output:
        check_output(cfg.output)
    rt = runtime.start(cfg.device, cfg.dtype)
    path = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    model, description, _ = load_anything(path)
    if description is None:
        raise UserError(
            f"{path} holds no tokenizer, so its ids cannot be shown as text: put the meta.pkl or "
            f"meta.json of its data beside it"
        )
    tokenizer = from_dict(description)
    if "start" not in given and tokenizer.kind in ("char", "word") and prompt not in tokenizer.ids:
        prompt = ""  # a text without line ends: the default prompt is not in its vocabulary
    ids = encode_prompt(tokenizer, prompt, cfg.unknown)
    stop_ids = read_stop_ids(cfg.stop_ids, tokenizer.vocab_size)
    model, why = to_inference(model, rt, cfg.dtype, cfg.quantize, cfg.compile)
    print(why, file=sys.stderr)
    block_size = model.config.block_size
    if len(ids) > block_size:
        print(
            f"the prompt has {len(ids)} tokens, more than block_size={block_size}: the model begins with its last "
            f"{window_size(len(ids), block_size)}, as if they had come one by one",
            file=sys.stderr,
        )

    texts = Texts(tokenizer, cfg.num_samples, stop, stop_ids)
    screen = Screen(prompt, cfg.num_samples, cfg.max_new_tokens)
    stream = model.stream(
        [ids or [tokenizer.start_id]] * cfg.num_samples,
        cfg.max_new_tokens,
        seed=cfg.seed,
        use_kv_cache=cfg.use_kv_cache,
        stop_ids=stop_ids,
        n_ids=tokenizer.vocab_size,
        **{field.name: getattr(cfg, field.name) for field in fields(Sampling)},
    )
    began = time.perf_counter()
    with runtime.Interrupts() as interrupts:
        n_steps, first, failure = follow(stream, texts, screen, interrupts)
        seconds = time.perf_counter() - began
        pieces = texts.finish("interrupted" if interrupts.code else "failed" if failure else "length")
        nothing = n_steps == 0 and bool(failure or interrupts.code)
        try:
            if cfg.output and not nothing:  # first, since nobody may be reading what is printed
                write_output(cfg, prompt, texts)
        finally:
            screen.end(pieces, [] if nothing else texts.texts)
    if failure:
        raise failure
    n_tokens = sum(texts.n_tokens)
    print(
        f"{n_tokens:,} tokens in {seconds:.1f} s ({n_tokens / seconds:,.0f} tokens/s)"
        + (f", the first after {first * 1000:.0f} ms" if n_steps else "")
        + (", interrupted" if interrupts.code else ""),
        file=sys.stderr,
    )
    return interrupts.code


if __name__ == "__main__":
    run_program(main)
