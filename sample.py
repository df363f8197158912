"""Prints texts that a trained model, or GPT-2, writes after a prompt.

    python sample.py --out_dir=out-don-char
    python sample.py --out_dir=out-don-char --start="Sancho " --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt
"""
import os
import sys
from dataclasses import dataclass

import configurator
from dongpt import runtime
from dongpt.checkpoint import load_anything
from dongpt.metrics import progress_bar
from dongpt.runtime import DTYPES, ROOT, RuntimeConfig
from dongpt.tokenizers import Tokenizer, from_dict

SEPARATOR = "---------------"  # nanoGPT's


@dataclass(frozen=True)
class SampleConfig(RuntimeConfig):
    out_dir: str = "out"  # take the checkpoint of this run
    init_from: str = "resume"  # resume: from out_dir; or gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a path
    start: str = "\n"  # the prompt, or FILE:path of a file that holds it; may be empty
    num_samples: int = 10  # how many texts, all drawn together
    max_new_tokens: int = 500  # length of each text behind the prompt
    temperature: float = 0.8  # below 1 bolder on the likely, above 1 more random; 0 takes the likeliest token
    top_k: int | None = 200  # draw from this many likeliest tokens; 0 or None is off
    top_p: float | None = None  # draw from the likeliest tokens that reach this probability; 0 or None is off
    use_kv_cache: bool = True  # encode each token once; off gives the same text, slower

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("max_new_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


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
                raise ValueError(f"the prompt file {name} is not UTF-8 at byte {error.start}: convert it") from error
    raise ValueError(f"there is no prompt file {name!r}: give --start=FILE:path of a text file, or the prompt itself")


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids; special tokens in it are recognised. [] for an empty one."""
    try:
        return tokenizer.encode(prompt, special=True)
    except ValueError as error:
        raise ValueError(f"--start: {error}") from error


def compile_blocks(model):
    """Have the model's blocks compiled; raises ValueError where torch.compile does not work."""
    for block in model.transformer.h:
        block.compile(dynamic=True)
    try:
        list(model.stream([[0, 0]], 2))
    except Exception as error:  # a missing compiler, an unsupported Python or GPU, ...: every backend has its own
        raise ValueError(f"compile=True cannot work here ({runtime.first_line(error)}): use compile=False") from error


def main(argv: list[str] | None = None):
    cfg, given = configurator.load(SampleConfig, argv)
    prompt = read_prompt(cfg.start)
    rt = runtime.start(cfg.device, cfg.dtype)
    path = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    model, description, _ = load_anything(path)
    if description is None:
        raise ValueError(f"{path} holds no tokenizer, so its ids cannot be shown as text: put the meta.pkl or "
                         f"meta.json of its data beside it")
    tokenizer = from_dict(description)
    if "start" not in given and tokenizer.kind == "char" and prompt not in tokenizer.ids:
        prompt = ""  # a text without line ends: the default prompt is not in its vocabulary
    ids = encode_prompt(tokenizer, prompt)
    model.to(device=rt.device, dtype=DTYPES[rt.dtype]).eval()
    if cfg.compile is True:  # auto leaves it off: a few samples do not repay a minute of compiling
        compile_blocks(model)

    print(rt.why, file=sys.stderr)
    rows = [ids or [tokenizer.start_id] for _ in range(cfg.num_samples)]
    texts = [list(row) if ids else [] for row in rows]
    bar = progress_bar(cfg.max_new_tokens, 0)
    for new in model.stream(rows, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed,
                            cfg.use_kv_cache, n_ids=tokenizer.vocab_size):
        for text, i in zip(texts, new.tolist()):
            text.append(i)
        if bar:
            bar.update()
    if bar:
        bar.close()
    for text in texts:
        print(tokenizer.decode(text))
        print(SEPARATOR)


if __name__ == "__main__":
    runtime.run_program(main)
