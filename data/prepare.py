"""Tokenize any text for training, and write train.bin, val.bin and meta.json to data/<file name>/.

    python data/prepare.py mytext.txt                                           # writes characters to data/mytext/
    python data/prepare.py --input=poems/ --tokenizer=bpe --vocab_size=1024     # writes BPE tokens to data/poems/
    python data/prepare.py --input='logs/*.jsonl.gz' --field=message --name=logs --tokenizer=gpt2
    python data/prepare.py --input=hf:roneneldan/TinyStories --tokenizer=bpe    # downloads from Hugging Face's Hub
    python data/prepare.py stories.txt.zst --separator='<|endoftext|>' --val_input=valid.txt
    python data/prepare.py mytext.txt --data_dir=.                              # writes to any folder
    python data/prepare.py                                                      # asks for a path

The input is a file, a folder (searched recursively) or a pattern. The formats are .parquet, .epub, .txt, .md, .jsonl
and .csv, as well as .json and .tsv if named explicitly. All but .parquet may be compressed (gz, bz2, xz or zst, under
any name) or in an archive (zip or tar). The output ends with a suggested model and a command to train it.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import contextlib
import glob
import math
import shlex
import shutil
from dataclasses import dataclass, replace
from typing import Annotated, Iterable, Iterator

import configurator
from configurator import UserError
from dongpt.program import LOCK_FILE, ROOT, run_program, shortest_path
from dongpt.text.archives import is_archive, read_head
from dongpt.text.bins import PreparedData, dataset_folder, read_meta
from dongpt.text.compressed import file_suffixes
from dongpt.text.documents import (
    BLANK,
    FOLDER_SUFFIXES,
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    VALIDATION_NAME,
    Document,
    Files,
    find_files,
)
from dongpt.text.file_kinds import looks_like_json
from dongpt.text.hub import PREFIX, HubText, open_dataset, parse_name
from dongpt.text.prepare import TextSource, Vocabulary, prepare, warn_unused_options
from dongpt.text.report import count_of, report

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
    input: str = ""  # a file, folder or pattern, or hf:[OWNER/]NAME[:CONFIG[:SPLIT]]; if empty, the program asks
    name: str = ""  # write to data/<name>/; by default, the name of the input file or folder
    data_dir: str = ""  # write to this folder instead; pass the same --data_dir to train.py
    val_fraction: Annotated[float, ">=", 0, "<", 1] = 0.1  # fraction of the characters used for validation; 0 for none
    val_input: str = ""  # separate validation text, in any form that input may have; by default, part of the input
    document: Document = "file"  # document unit: a file or record, a line, a paragraph (blank), or everything (none)
    separator: str = ""  # text of a line that ends a document, such as <|endoftext|>; the line is left out
    field: str = "text"  # field that contains the text in .jsonl, .json, .csv, .tsv and .parquet files
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
    """Return the folder to write to: data_dir if it is set, otherwise data/<name>, named after the input by default.

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
    """Return the name of the input as recorded in meta.json, without the config, split and commit of a Hub dataset."""
    if input_path.startswith(PREFIX):
        return ":".join(input_path.split(":")[:2]).partition("@")[0]
    return os.path.basename(os.path.normpath(input_path))


def check_options(cfg: PrepareConfig, given_keys: Iterable[str]):
    """Raise UserError if two settings contradict each other or the separator is blank."""
    if cfg.separator and not cfg.separator.strip():
        raise UserError("--separator is blank: pass the text of a line, or --document=blank to divide at blank lines")
    if cfg.separator and cfg.document != "file":
        raise UserError(f"--separator and --document={cfg.document} both divide the text: pass only one of them")
    if cfg.val_input and "val_fraction" in given_keys:
        raise UserError("--val_input and --val_fraction both choose the validation text: pass only one of them")


def select_files(cfg: PrepareConfig, paths: list[str]) -> tuple[Files, Files | None]:
    """Return (training files, validation files or None), and print notes about the validation files, if any.

    A file that is named by both --input and --val_input is left out of the training text.
    """
    if not cfg.val_input:
        report_names(cfg, paths, paths)
        return make_files(cfg, paths), None
    val_paths, _ = find_files(cfg.val_input, "--val_input")
    real_val_paths = set(map(os.path.realpath, val_paths))
    train_paths = [path for path in paths if os.path.realpath(path) not in real_val_paths]
    if not train_paths:
        raise UserError(f"--val_input={cfg.val_input} covers the whole input: pass another text, or use --val_fraction")
    n_shared = len(paths) - len(train_paths)
    shared = f"; excluding {count_of(n_shared, 'file')} from the training text" if n_shared else ""
    print(f"validating on {count_of(len(val_paths), 'file')} from {cfg.val_input}{shared}")
    report_names(cfg, paths, train_paths)
    return make_files(cfg, train_paths), replace(make_files(cfg, val_paths), needs_separator=False)


def report_names(cfg: PrepareConfig, paths: list[str], train_paths: list[str]):
    """Print which of several files will be trained on although their names sound like a validation or test text."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    for path in train_paths if len(paths) > 1 else []:
        if VALIDATION_NAME.search(os.path.relpath(path, folder).lower()):
            remedy = f"pass --val_input={shlex.quote(path)} to validate on it"
            remedy = "move it elsewhere to leave it out" if cfg.val_input or not cfg.val_fraction else remedy
            print(f"{path} is part of the input, although its name sounds like a validation or test text: {remedy}")


def make_files(cfg: PrepareConfig, paths: list[str]) -> Files:
    """Return the files and their settings, and print the names of those whose format is unknown."""
    known = (*FOLDER_SUFFIXES, *RECORD_SUFFIXES)
    if unknown := [os.path.basename(p) for p in paths if file_suffixes(p)[0] not in known and not is_archive(p)]:
        more = f" and {count_of(len(unknown) - 1, 'other file')}" if len(unknown) > 1 else ""
        print(f"reading {unknown[0]}{more} as plain text, since the file extension is unknown")
    texts = (p for p in paths if file_suffixes(p)[0] not in (*RECORD_SUFFIXES, ".epub") and not is_archive(p))
    if json_paths := [p for p in texts if looks_like_json(read_head(p))]:
        note = f"{json_paths[0]} is read as plain text although it looks like JSON"
        print(
            f"{note}: rename it so that it ends in .json or .jsonl to read only the field {cfg.field!r} of its records"
        )
    return Files(paths, cfg.document, cfg.field, cfg.encoding, separator=cfg.separator.strip())


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
    settings |= {"max_iters": max_iters, "lr_decay_iters": max_iters, "eval_interval": max(1, max_iters // 10)}
    return settings, n_params(size), max_iters * tokens_per_iter / n_tokens


def print_next(prepared: PreparedData):
    """Print a suggested model size and number of iterations, and the command that trains the model."""
    tokens = prepared.meta["tokens"]
    settings, n_params, n_passes = suggest_model(tokens["train"])
    if tokens["val"]:
        settings["block_size"] = min(settings["block_size"], max(1, tokens["val"] - 1))
    size = f"{n_params / 1e6:.1f} million parameters in its blocks"
    model = f"{settings['n_layer']} layers of width {settings['n_embd']} ({size})"
    passes = f"{settings['max_iters']:,} iterations, {n_passes:,.0f} passes over the training set"
    print(f"suggestion: {model}, trained for {passes}")
    if n_passes > MEMORIZING_PASSES:
        *_, batch_size, block_size = MODEL_SIZES[0]
        n_needed = MIN_ITERS * batch_size * block_size // MEMORIZING_PASSES
        print(
            f"note: the text is too short to learn a language from, which takes at least {n_needed:,} tokens; the model"
            " will mostly memorize the text"
        )
    config_path = os.path.join(ROOT, "config", "quickstart.py")
    defaults = configurator.exec_config(config_path)
    script, config = (shlex.quote(shortest_path(path)) for path in (os.path.join(ROOT, "train.py"), config_path))
    in_data = os.path.dirname(os.path.abspath(prepared.folder)) == os.path.join(ROOT, "data")
    name = os.path.basename(os.path.abspath(prepared.folder))
    data = f"--dataset={shlex.quote(name)}" if in_data else f"--data_dir={shlex.quote(shortest_path(prepared.folder))}"
    changes = "".join(f" --{key}={value}" for key, value in settings.items() if value != defaults[key])
    print(f"next: python {script} {config} {data} --out_dir={shlex.quote('out-' + name)}{changes}")


@contextlib.contextmanager
def open_texts(
    cfg: PrepareConfig, input_path: str, paths: list[str], folder: str
) -> Iterator[tuple[TextSource, TextSource | None]]:
    """Open the text, that is, the files at paths or the dataset input_path, and the validation text, if any."""
    with contextlib.ExitStack() as stack:

        def open_hub(name: str) -> HubText:
            print(f"looking up {name}", flush=True)
            dataset = open_dataset(parse_name(name), cfg.field, folder, cfg.document, cfg.separator.strip())
            return stack.enter_context(dataset)

        if paths and not cfg.val_input.startswith(PREFIX):
            yield select_files(cfg, paths)
            return
        if paths:
            report_names(cfg, paths, paths)
        documents: TextSource = make_files(cfg, paths) if paths else open_hub(input_path)
        val_documents: TextSource | None = None
        if cfg.val_input.startswith(PREFIX):
            val_documents = open_hub(cfg.val_input)
        elif cfg.val_input:
            val_files = make_files(cfg, find_files(cfg.val_input, "--val_input")[0])
            val_documents = replace(val_files, needs_separator=False)
        yield documents, val_documents


def write(cfg: PrepareConfig, folder: str, opened: contextlib.AbstractContextManager, source: str = "") -> PreparedData:
    """Prepare the documents that opened yields, and print a report. An error leaves no new folder behind."""
    is_new = not os.path.exists(folder)
    try:
        with opened as (documents, val_documents):
            source = documents.source if isinstance(documents, HubText) else source
            options = {"shard_tokens": cfg.shard_tokens, "val_documents": val_documents}
            prepared = prepare(folder, documents, cfg, cfg.val_fraction, source, **options)
    except UserError:
        if is_new and os.path.isdir(folder) and os.listdir(folder) == [LOCK_FILE]:  # nothing was written
            shutil.rmtree(folder)
        raise
    assert prepared
    report(prepared, documents)
    for texts in filter(None, (documents, val_documents)):
        for path, n_left_out in texts.n_left_out.items():
            if path != BLANK:
                print(f"skipped {count_of(n_left_out, 'other file')} in {path}")
    names = documents.validation_names if isinstance(documents, Files) else ()
    has_choice = cfg.val_fraction and not cfg.val_input
    remedy = "pass that file as --val_input" if has_choice else "pass a folder without that file"
    for name in sorted(names)[:3]:
        problem = f"{name} is part of the training text, although its name sounds like a validation or test text"
        print(f"{problem}: unpack the archive, and {remedy}")
    return prepared


def main(argv: list[str] | None = None):
    cfg, given_keys, given_paths = configurator.load_with_paths(PrepareConfig, argv, "[TEXT]")
    warn_unused_options(cfg, given_keys)
    if cfg.input and given_paths:
        raise UserError(f"--input={cfg.input} and {given_paths[0]} are two inputs: pass one file, folder or pattern")
    input_path = cfg.input or "".join(given_paths) or ask_path()
    check_options(cfg, given_keys)
    if input_path.startswith(PREFIX):
        dataset = parse_name(input_path)
        folder = output_folder(cfg, dataset.source, [os.path.join(dataset.short, "rows")])
        return print_next(write(cfg, folder, open_texts(cfg, input_path, [], folder)))
    paths, n_skipped = find_files(input_path)
    folder = output_folder(cfg, input_path, paths)
    skipped = f", skipping {count_of(n_skipped, 'other file')}" if n_skipped else ""
    if len(paths) > 1 or skipped:
        print(f"reading {count_of(len(paths), 'file')} from {input_path}{skipped}")
    prepared = write(cfg, folder, open_texts(cfg, input_path, paths, folder), source_name(input_path))
    if prepared.meta["split"] == "position" and len(paths) > 1:
        order = "the end of the files, sorted by name"
        print(f"the validation text is {order} ({paths[-1]} is the last one): pass --val_input=FILE to choose it")
    print_next(prepared)


if __name__ == "__main__":
    run_program(main)
