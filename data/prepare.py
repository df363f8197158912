"""Tokenize any text for training, and write train.bin, val.bin and meta.json to data/<file name>/.

    python data/prepare.py mytext.txt                                           # writes characters to data/mytext/
    python data/prepare.py --input=poems/ --tokenizer=bpe --vocab_size=1024     # writes BPE tokens to data/poems/
    python data/prepare.py --input='logs/*.jsonl.gz' --field=message --name=logs --tokenizer=gpt2
    python data/prepare.py --input=hf:roneneldan/TinyStories --tokenizer=bpe    # downloads from Hugging Face's Hub
    python data/prepare.py mytext.txt --data_dir=.                              # writes to any folder
    python data/prepare.py                                                      # asks for a path

The input is a file, a folder (searched recursively) or a pattern, in the formats .parquet, .txt, .md, .jsonl and .csv.
All but .parquet may be compressed (.gz, .bz2, .xz). The output ends with a suggested model and a command to train it.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import contextlib
import glob
import math
import shlex
import shutil
from dataclasses import dataclass
from typing import Annotated

import configurator
from configurator import UserError
from dongpt.program import LOCK_FILE, ROOT, run_program
from dongpt.text.bins import PreparedData, dataset_folder, read_meta
from dongpt.text.documents import TEXT_SUFFIXES, Document, Files, file_suffixes, find_files
from dongpt.text.hub import PREFIX, HubText, open_dataset, parse_name
from dongpt.text.prepare import TextSource, Vocabulary, prepare, warn_unused_options
from dongpt.text.report import count_of, report, shortest_path

MODEL_SIZES = (  # n_layer, n_head, n_embd, batch_size, block_size
    (2, 2, 64, 16, 128),
    (2, 4, 96, 16, 128),
    (4, 4, 128, 16, 128),
    (6, 6, 192, 32, 256),
    (6, 6, 384, 64, 256),
    (12, 12, 768, 64, 512),
)
MAX_PASSES = 4  # over the training set
MEMORIZING_PASSES = 16  # over the training set; more cause a warning about memorization
TOKENS_PER_PARAMETER = 20
MIN_ITERS = 200


@dataclass(frozen=True)
class PrepareConfig(Vocabulary):
    input: str = (
        ""  # a file, folder, pattern or hf:[OWNER/]NAME[:CONFIG[:SPLIT]]; if empty, the program asks for a path
    )
    name: str = ""  # write to data/<name>/; by default, the name of the input file or folder
    data_dir: str = ""  # write to this folder instead; pass the same --data_dir to train.py
    val_fraction: Annotated[float, ">", 0, "<", 1] = 0.1  # fraction of the characters used for validation
    document: Document = "file"  # document unit: a file or record, a line, a paragraph (blank), or everything (none)
    field: str = "text"  # field that contains the text in .jsonl, .csv and .parquet files
    encoding: str = "utf-8"  # text encoding of the input
    shard_tokens: Annotated[int, ">=", 0] = 0  # training tokens per file; 0 writes a single train.bin


def find_texts() -> list[str]:
    """Return the text files in the working directory and in the folders under data/."""
    paths = glob.glob("*") + glob.glob(os.path.join(ROOT, "data", "*", "*"))
    texts = [os.path.relpath(p) for p in paths if os.path.isfile(p) and file_suffixes(p)[0] in TEXT_SUFFIXES]
    return sorted({path for path in texts if not os.path.basename(path).startswith(("requirements", "README"))})


def ask_path() -> str:
    """Ask the user to type a path or pick one from a list."""
    if not sys.stdin.isatty():
        raise UserError("the input text is missing: pass --input=PATH with a file, a folder or a quoted pattern")
    paths = find_texts()[:20]
    for number, path in enumerate(paths, 1):
        print(f"{number:3}  {path}")
    try:
        answer = input("Which text? Enter a " + ("number or a path: " if paths else "path: ")).strip()
    except EOFError:
        answer = ""
    if not answer:
        raise UserError("the input text is missing: pass --input=PATH, or enter a path at the prompt")
    return paths[int(answer) - 1] if answer.isdigit() and 0 < int(answer) <= len(paths) else answer


def output_folder(cfg: PrepareConfig, input_path: str, paths: list[str]) -> str:
    """Return the folder to write to: data_dir if it is set, or else data/<name>, which defaults to the input's name.

    Raises UserError if the default folder contains other data.
    """
    if cfg.data_dir and cfg.name:
        raise UserError(f"--data_dir={cfg.data_dir} and --name={cfg.name} specify different folders: pass only one")
    if cfg.data_dir or cfg.name:
        return cfg.data_dir or dataset_folder(cfg.name)
    common_dir = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    path = os.path.abspath(input_path) if os.path.exists(input_path) else common_dir
    name = os.path.basename(path).lstrip(".")
    if os.path.isfile(path):
        name = name[: len(name) - len("".join(file_suffixes(name)))] or name
    remedy = "pass --name=NAME to write to data/NAME, or --data_dir=DIR to write to any folder"
    if not name:
        raise UserError(f"{input_path} does not provide a name for the data: {remedy}")
    folder = dataset_folder(name)
    if os.path.exists(os.path.join(folder, "prepare.py")):
        raise UserError(f"data/{name} is reserved for data/{name}/prepare.py: {remedy}")
    source = source_name(input_path)
    with contextlib.suppress(UserError):  # prepare() reports a damaged folder
        source = source_name(read_meta(folder).get("source", source))
    if source != source_name(input_path):
        raise UserError(f"data/{name} contains data prepared from {source}: {remedy}")
    return folder


def source_name(input_path: str) -> str:
    """Return the name of the input that is recorded in meta.json; for datasets without config, split and commit."""
    if input_path.startswith(PREFIX):
        return ":".join(input_path.split(":")[:2]).partition("@")[0]
    return os.path.basename(os.path.normpath(input_path))


def suggest_model(n_tokens: int) -> tuple[dict[str, int], int, float]:
    """Return (settings for config/quickstart.py, parameters in the blocks, passes) for n_tokens training tokens.

    This follows two published rules. Repeating a text up to 4 times is nearly as good as having that much new text
    (Muennighoff et al., arxiv.org/abs/2305.16264), and a model should see about 20 tokens per parameter (Hoffmann et
    al., arxiv.org/abs/2203.15556). Therefore, n tokens suit a model with 4 * n / 20 parameters in its blocks. The
    closest size in MODEL_SIZES is used. Training runs for at least MIN_ITERS iterations, since fewer are not enough.
    """
    wanted = MAX_PASSES * n_tokens / TOKENS_PER_PARAMETER

    def n_params(size: tuple[int, ...]) -> int:
        return 12 * size[0] * size[2] ** 2

    size = min(MODEL_SIZES, key=lambda size: abs(math.log(n_params(size) / wanted)))
    settings = dict(zip(("n_layer", "n_head", "n_embd", "batch_size", "block_size"), size))
    settings["block_size"] = min(settings["block_size"], max(1, n_tokens - 1))
    tokens_per_iter = settings["batch_size"] * settings["block_size"]
    max_iters = max(MIN_ITERS, math.ceil(MAX_PASSES * n_tokens / tokens_per_iter))
    settings |= {"max_iters": max_iters, "lr_decay_iters": max_iters}
    return settings, n_params(size), max_iters * tokens_per_iter / n_tokens


def print_next(prepared: PreparedData):
    """Print a suggested model size and number of iterations, and the command that trains the model."""
    tokens = prepared.meta["tokens"]
    settings, n_params, n_passes = suggest_model(tokens["train"])
    settings["block_size"] = min(settings["block_size"], max(1, tokens["val"] - 1))
    model = f"{settings['n_layer']} layers of width {settings['n_embd']} ({n_params / 1e6:.1f} million parameters)"
    passes = f"{settings['max_iters']:,} iterations, {n_passes:,.0f} passes over the training set"
    print(f"suggestion: {model} and {passes}" + ", enough to memorize the text" * (n_passes > MEMORIZING_PASSES))
    config_path = os.path.join(ROOT, "config", "quickstart.py")
    defaults = configurator.exec_config(config_path)
    script, config = (shlex.quote(shortest_path(path)) for path in (os.path.join(ROOT, "train.py"), config_path))
    in_data = os.path.dirname(os.path.abspath(prepared.folder)) == os.path.join(ROOT, "data")
    name = os.path.basename(os.path.abspath(prepared.folder))
    data = f"--dataset={shlex.quote(name)}" if in_data else f"--data_dir={shlex.quote(shortest_path(prepared.folder))}"
    changes = "".join(f" --{key}={value}" for key, value in settings.items() if value != defaults[key])
    print(f"next: python {script} {config} {data} --out_dir={shlex.quote('out-' + name)}{changes}")


def prepare_dataset(cfg: PrepareConfig, name: str):
    """Prepare a dataset from Hugging Face's Hub or cache, or from a folder."""
    dataset = parse_name(name)
    folder = output_folder(cfg, dataset.source, [os.path.join(dataset.short, "rows")])
    if not dataset.is_local:
        print(f"looking up {dataset} on the Hugging Face Hub", flush=True)
    write(cfg, folder, open_dataset(dataset, cfg.field, folder, cfg.document))


def write(cfg: PrepareConfig, folder: str, opened: contextlib.AbstractContextManager[TextSource], source: str = ""):
    """Prepare documents, report the result, and suggest a model. An error leaves no new folder without data."""
    is_new = not os.path.exists(folder)
    try:
        with opened as documents:
            source = documents.source if isinstance(documents, HubText) else source
            prepared = prepare(folder, documents, cfg, cfg.val_fraction, source, shard_tokens=cfg.shard_tokens)
    except UserError:
        if is_new and os.path.isdir(folder) and os.listdir(folder) == [LOCK_FILE]:  # nothing was written
            shutil.rmtree(folder)
        raise
    report(prepared)
    print_next(prepared)


def main(argv: list[str] | None = None):
    cfg, given_keys, given_paths = configurator.load_with_paths(PrepareConfig, argv, "[TEXT]")
    warn_unused_options(cfg, given_keys)
    if cfg.input and given_paths:
        raise UserError(f"--input={cfg.input} and {given_paths[0]} are two inputs: pass one, or a folder or pattern")
    input_path = cfg.input or "".join(given_paths) or ask_path()
    if input_path.startswith(PREFIX):
        return prepare_dataset(cfg, input_path)
    paths, n_skipped = find_files(input_path)
    folder = output_folder(cfg, input_path, paths)
    skipped = f", skipping {count_of(n_skipped, 'other file')}" if n_skipped else ""
    if len(paths) > 1 or skipped:
        print(f"reading {count_of(len(paths), 'file')} from {input_path}{skipped}")
    if unknown := [os.path.basename(path) for path in paths if file_suffixes(path)[0] not in TEXT_SUFFIXES]:
        more = f" and {count_of(len(unknown) - 1, 'other file')}" if len(unknown) > 1 else ""
        print(f"reading {unknown[0]}{more} as plain text, since the file extension is unknown")
    files = Files(paths, cfg.document, cfg.field, cfg.encoding)
    source = source_name(input_path)
    write(cfg, folder, contextlib.nullcontext(files), source)


if __name__ == "__main__":
    run_program(main)
