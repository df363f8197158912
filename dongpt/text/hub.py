"""Use `datasets` to read documents from the Hugging Face Hub, from its local cache or from a folder.

A dataset is named hf:[OWNER/]NAME[:CONFIG[:SPLIT]]. hf:./FOLDER and hf:/FOLDER are local folders, which save_to_disk()
may have written. The text column is streamed once into a copy in the data folder: Parquet files with about COPY_BYTES
of text each. All passes of a preparation read the copy, which is removed when the data is complete. An interrupted copy
continues after its last file, using IterableDataset.state_dict().

    dataset = parse_name("hf:roneneldan/TinyStories")
    with open_dataset(dataset, "text", folder) as documents:
        prepared = prepare(folder, documents, Vocabulary("bpe"), source=documents.source)
"""

import contextlib
import dataclasses
import glob
import json
import os
import re
import shutil
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, Iterator

from configurator import UserError
from dongpt.log import progress_bar
from dongpt.program import atomic_write, first_line
from dongpt.text.bins import STAGING_DIR
from dongpt.text.documents import TEXT_SUFFIXES, Document, Files, Progress, TextPart, find_files

PREFIX = "hf:"
COPY_DIR = ".dongpt-hub"  # start of the name of a folder in the data folder; a hash of the dataset follows
COPY_BYTES = 2**26  # of text in each file of the copy: a killed process reads at most this much again
BATCH_ROWS = 1000  # read at a time; a row group of a Parquet file is rarely larger than that, if its rows are long
CONVERTED = "refs/convert/parquet"  # revision with the Hub's own conversion to Parquet: CONFIG/train/0000.parquet
SAVED_FILES = ("dataset_dict.json", "state.json")  # written by save_to_disk()
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "null")


@dataclass(frozen=True)
class DatasetName:
    """A parsed dataset name. path is OWNER/NAME or a local folder. An empty config means the default or only config."""

    path: str
    config: str = ""
    split: str = "train"
    is_local: bool = False
    remedy: str = "pass a local copy as hf:./FOLDER"  # what to do if it cannot be downloaded

    @property
    def short(self) -> str:
        """Return NAME without its OWNER, or the name of the local folder."""
        return os.path.basename(os.path.abspath(self.path)) if self.is_local else self.path.rpartition("/")[2]

    @property
    def source(self) -> str:
        """Return hf:OWNER/NAME, or hf:FOLDER without the path, for meta.json."""
        return PREFIX + (self.short if self.is_local else self.path)

    def __str__(self) -> str:
        return f"{PREFIX}{self.path}"


def parse_name(name: str) -> DatasetName:
    """Parse hf:[OWNER/]NAME[:CONFIG[:SPLIT]]. Raises UserError for anything else."""
    rest = re.sub(r"^((hf:)?//|https?://(www\.)?huggingface\.co/)datasets/", "", name.removeprefix(PREFIX))
    is_local = bool(re.match(r"[A-Za-z]:[/\\]|[/\\~]|\.{1,2}([/\\:]|$)", rest))
    n_drive = 2 if rest[1:2] == ":" and is_local else 0  # C:
    path, *more = [rest] if is_local and os.path.exists(rest) else rest[n_drive:].split(":")
    path = path if path == rest else rest[:n_drive] + path
    if len(more) > 2 or not (path if is_local else re.fullmatch(r"([\w.-]+/)?[\w.-]+", path)):
        form = "hf:[OWNER/]NAME[:CONFIG[:SPLIT]], as in hf:roneneldan/TinyStories or hf:./FOLDER"
        raise UserError(f"{name} is not the name of a dataset: write {form}")
    config, split = [*more, "", ""][:2]
    return DatasetName(os.path.expanduser(path) if is_local else path, config, split or "train", is_local)


# ----------------------------------------------------------------------------------------------------------------------
# finding the dataset


@contextlib.contextmanager
def open_dataset(
    dataset: DatasetName, column: str, folder: str, document: Document = "file", separator: str = "", raw: bool = False
) -> Iterator["HubText"]:
    """Open one column of a dataset as documents. Its copy in folder is removed at the end, unless it can be resumed.

    Raises UserError if the dataset, config, split or column does not exist, or if the column does not contain text.
    """
    documents = find_text(dataset, column, folder, document, separator, raw)
    try:
        yield documents
    except UserError:
        if not (documents.is_unfinished or os.path.isdir(os.path.join(folder, STAGING_DIR))):
            documents.remove_copy()
        raise
    documents.remove_copy()


def find_text(
    dataset: DatasetName, column: str, folder: str, document: Document = "file", separator: str = "", raw: bool = False
) -> "HubText":
    """Return one column of a dataset as documents, without reading them yet."""
    if dataset.is_local and not os.path.isdir(dataset.path):
        problem = "pass a file without the hf: prefix" if os.path.isfile(dataset.path) else "there is no such folder"
        raise UserError(f"{dataset}: {problem}")
    with _quiet(), _explained(dataset):
        if dataset.is_local and any(os.path.isfile(os.path.join(dataset.path, name)) for name in SAVED_FILES):
            stream, n_rows, local_paths = _open_saved(dataset)
            config, revision, is_parquet, remote_paths = "", "", False, []
        else:
            builder, config = _find_builder(dataset)
            if builder.name == "csv":
                builder.config.keep_default_na = False  # otherwise, the texts NA, None, null and nan become null
            streams = builder.as_streaming_dataset()
            if dataset.split not in streams:
                raise UserError(f"{dataset} has no split {dataset.split!r}: {_how_to_name(dataset, 'SPLIT', streams)}")
            stream = streams[dataset.split]
            _check_column(dataset, _features(stream), column)
            if builder.name == "parquet":  # read no other column, and small batches instead of whole row groups
                builder.config.columns, builder.config.batch_size = [column], BATCH_ROWS
                stream = builder.as_streaming_dataset()[dataset.split]
            if builder.name == "text":
                problem = f"{dataset} consists of text files whose lines become documents"
                if separator or document == "blank":
                    option = "--separator" if separator else "--document=blank"
                    remedy = "pass the folder without the hf: prefix"
                    if not dataset.is_local:
                        remedy = f"run `hf download {dataset.path} --repo-type=dataset --local-dir=DIR`, and pass DIR"
                    raise UserError(f"{problem}, so that {option} has no effect: {remedy}")
                print(f"{problem} (--document=none joins the lines)")
            n_rows = getattr((builder.info.splits or {}).get(dataset.split), "num_examples", 0) or 0
            revision, local_paths = "" if dataset.is_local else str(builder.hash), _local_paths(builder, dataset.split)
            is_parquet = builder.name == "parquet" and bool(local_paths)
            remote_paths = [] if local_paths else [*(builder.config.data_files or {}).get(dataset.split, [])]
            if dataset.is_local:
                _report_unread(dataset, builder)
        features = _features(stream)
        _check_column(dataset, features, column)
        is_parquet = is_parquet and "string" in features[column].dtype
        stream = stream.select_columns([column]).with_format("arrow")
    source = f"{dataset.source}:{config}:{dataset.split}" + (f"@{revision}" if revision else "")
    copy_name = f"{COPY_DIR}-{zlib.crc32(repr((dataset, column)).encode('utf-8', 'surrogateescape')):08x}"
    copy_dir = os.path.join(folder, copy_name)
    files = (local_paths, remote_paths, is_parquet, copy_dir)
    return HubText(source, column, *files, stream, n_rows, document, separator, raw)


def _find_builder(dataset: DatasetName) -> tuple[Any, str]:
    """Return (DatasetBuilder, config). If the Hub has only a script, use the Hub's own conversion to Parquet."""
    import datasets

    path = dataset.path
    if not dataset.is_local and os.path.exists(path):  # datasets would read it
        path = f"hf://datasets/{path}"
    try:
        builder = datasets.load_dataset_builder(path, dataset.config or None)
        config = builder.config.name
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error) or dataset.is_local:
            raise
        config = dataset.config or _converted_config(dataset)
        builder = datasets.load_dataset_builder(path, data_dir=config, revision=CONVERTED)
    if not dataset.is_local and builder.repo_id is None:  # a name of one of datasets' own readers, such as json
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{dataset.path}' doesn't exist on the Hub")
    if builder.name == "cache":
        print(f"{dataset}: the Hub cannot be reached; using the copy in Hugging Face's cache")
    return builder, config


def _converted_config(dataset: DatasetName) -> str:
    """Return the only config in the Hub's conversion to Parquet. Raises UserError if it is partial or has several."""
    import huggingface_hub

    tree = huggingface_hub.HfApi().list_repo_tree(dataset.path, recursive=True, revision=CONVERTED, repo_type="dataset")
    paths = [entry.path for entry in tree if entry.path.endswith(".parquet")]
    configs = sorted({path.partition("/")[0] for path in paths})
    if any("/partial-" in path for path in paths) or not paths:
        raise UserError(f"{dataset} has no complete Parquet copy on the Hub, only a script: {dataset.remedy}")
    if len(configs) > 1:
        raise UserError(f"{dataset} has several configs: {_how_to_name(dataset, 'CONFIG', configs)}")
    return configs[0]


def _open_saved(dataset: DatasetName) -> tuple[Any, int, list[str]]:
    """Return (stream, number of rows, files) for a folder that save_to_disk() wrote."""
    import datasets

    loaded: Any = datasets.load_from_disk(dataset.path, keep_in_memory=False)
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if dataset.split not in splits:
        raise UserError(f"{dataset} has no split {dataset.split!r}: {_how_to_name(dataset, 'SPLIT', splits)}")
    if dataset.config:
        raise UserError(f"{dataset} was written by save_to_disk() and has no configs: leave out {dataset.config!r}")
    rows = splits[dataset.split]
    return rows.to_iterable_dataset(), len(rows), sorted({file["filename"] for file in rows.cache_files})


def _features(stream: Any) -> dict:
    """Return the columns of a stream with their types, reading the first row if necessary."""
    if stream.features is not None:
        return dict(stream.features)
    import datasets

    table = next(iter(stream.with_format("arrow").iter(1)), None)
    return {} if table is None else dict(datasets.Features.from_arrow_schema(table.schema))


def _check_column(dataset: DatasetName, features: dict, column: str):
    """Raise UserError unless column exists and contains text."""
    texts = [name for name, kind in features.items() if getattr(kind, "dtype", "") in TEXT_TYPES]
    choices = ", ".join(map(repr, texts[:20])) or "(no column contains text)"
    remedy = f"pass --field=NAME, where NAME is one of {choices}"
    if not features:
        raise UserError(f"{dataset} has no rows in the split {dataset.split!r}: pass another split")
    if column not in features:
        others = "".join(f", {name!r} (not text)" for name in list(features)[:20] if name not in texts)
        raise UserError(f"{dataset} has no column {column!r}: {remedy}{others}")
    if column not in texts:
        kind = str(features[column]).replace("\n", " ")[:60]
        raise UserError(f"{dataset}: the column {column!r} is not text but {kind}: {remedy}")


def _report_unread(dataset: DatasetName, builder: Any):
    """Print how many texts in a local folder are ignored by `datasets`, which reads only the most frequent format."""
    read = {os.path.realpath(path) for paths in (builder.config.data_files or {}).values() for path in paths}
    found: list[str] = []
    with contextlib.suppress(UserError):  # there are none
        found = find_files(dataset.path, suffixes=(*TEXT_SUFFIXES, ".json"))[0]
    if unread := [path for path in found if os.path.realpath(path) not in read]:
        problem = f"{dataset}: `datasets` does not read {len(unread):,} of {len(found):,} files, such as {unread[0]}"
        print(f"{problem}: to read all of them, pass the folder without the hf: prefix")


def _local_paths(builder: Any, split: str) -> list[str]:
    """Return the local files of a split, or none if it is on the Hub."""
    if builder.name == "cache":
        return sorted(glob.glob(os.path.join(glob.escape(builder.cache_dir), "*.arrow")))
    return [path for path in (builder.config.data_files or {}).get(split, []) if os.path.isfile(path)]


# ----------------------------------------------------------------------------------------------------------------------
# messages


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the libraries' progress bars and warnings."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"reading hf: datasets requires a package ({error}): run pip install datasets") from error
    loggers = (datasets.utils.logging, huggingface_hub.utils.logging)
    levels, had_bars = [logger.get_verbosity() for logger in loggers], datasets.utils.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.set_verbosity(logger.CRITICAL)
        datasets.utils.disable_progress_bars()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.set_verbosity(level)
        if had_bars:
            datasets.utils.enable_progress_bars()


def _how_to_name(dataset: DatasetName, part: str, names: Any) -> str:
    """Return the remedy for a missing config or split."""
    middle = "" if part == "CONFIG" else f":{dataset.config}"
    return f"write {dataset}{middle}:{part}, where {part} is one of {', '.join(map(str, names))}"


@contextlib.contextmanager
def _explained(dataset: DatasetName) -> Iterator[None]:
    """Convert the errors of `datasets` and its libraries to UserErrors with a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # from the Hub, from several network and file libraries, or from a file's content
        raise UserError(f"{dataset}: {_explanation(dataset, error)}") from error


def _explanation(dataset: DatasetName, error: Exception) -> str:
    """Return a sentence that states the problem and its remedy."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    text, line = str(error), first_line(error)
    page, remedy = f"https://huggingface.co/datasets/{dataset.path}", dataset.remedy
    if os.path.isdir(dataset.path) and not dataset.is_local:
        remedy = f"write hf:./{dataset.path} to read the folder of that name"
    listed = re.search(r"\[.*\]", text)
    if "gated dataset" in text:
        login = "log in with `hf auth login` or set HF_TOKEN"
        return f"the dataset is gated: ask for access at {page} and {login}, or {remedy}"
    if "scripts are no longer supported" in text:
        return "it is a Python script, which is never run: pass a folder or dataset with Parquet, JSON or CSV files"
    if isinstance(error, ValueError) and re.search(r"[Cc]onfig", text) and listed:
        names = listed.group().strip("[]").replace("'", "").split(", ")
        problem = f"it has no config {dataset.config!r}" if dataset.config else "it has several configs"
        return f"{problem}: {_how_to_name(dataset, 'CONFIG', names)}"
    if isinstance(error, DataFilesNotFoundError) or type(error).__name__ == "EmptyDatasetError":
        return "it has no data files that `datasets` can read: use a folder with Parquet, JSON lines, CSV or text files"
    if dataset.is_local and isinstance(error, FileNotFoundError):
        return f"a file is missing ({line}): copy the folder again"
    if isinstance(error, (DatasetNotFoundError, FileNotFoundError)) or "Please specify the data files" in text:
        return f"the Hub has no such dataset, or it is private: look up OWNER/NAME at huggingface.co, or {remedy}"
    if "OfflineModeIsEnabled" in text:
        problem = "the dataset is not in the local cache, and HF_HUB_OFFLINE forbids downloading it"
        return f"{problem}: unset HF_HUB_OFFLINE, or {remedy}"
    if is_connection_lost(error):
        problem = f"the Hub cannot be reached ({first_line(_first_cause(error))}), and the dataset is not in the cache"
        return f"{problem}: connect to the network, or {remedy}"
    return f"`datasets` cannot read it ({line}): fix its files, or pass them without the hf: prefix"


def is_connection_lost(error: BaseException) -> bool:
    """Return True if an error, or one that caused it, means that the network or the Hub is down."""
    name = f"{type(error).__module__}.{type(error).__name__}"
    is_network = name.startswith(("httpx", "httpcore", "aiohttp", "requests", "urllib3", "huggingface_hub"))
    cause = error.__cause__ or error.__context__
    return is_network or isinstance(error, (ConnectionError, TimeoutError)) or bool(cause and is_connection_lost(cause))


def _first_cause(error: BaseException) -> BaseException:
    """Return the first error in a chain of errors."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


# ----------------------------------------------------------------------------------------------------------------------
# reading it


@dataclass(frozen=True)
class HubText:
    """A text column of a dataset, with the interface of Files. Methods that need the text complete the copy first."""

    source: str  # hf:OWNER/NAME:CONFIG:SPLIT@COMMIT
    field: str  # name of the column
    local_paths: list[str]  # files of a local dataset
    remote_paths: list[str] = dataclasses.field(repr=False)  # files on the Hub
    is_parquet: bool  # whether the local files are Parquet files, which need not be copied
    copy_dir: str = dataclasses.field(repr=False)
    stream: Any = dataclasses.field(repr=False)  # datasets.IterableDataset that yields the column as Arrow tables
    n_rows: int = dataclasses.field(repr=False)  # 0 if unknown
    document: Document = "file"  # document, separator and raw are the same as in Files
    separator: str = ""
    raw: bool = False
    n_left_out: Counter[str] = dataclasses.field(default_factory=Counter, repr=False, compare=False)  # see Files
    encoding = "utf-8"

    @property
    def paths(self) -> list[str]:
        """Return the dataset as if it were a single file."""
        return [self.source]

    @property
    def has_separators(self) -> bool:
        """See Files.has_separators."""
        return self.document == "none"

    def fingerprint(self) -> list[list]:
        """Return the source with its commit, or the sizes and modification times of local files, to detect changes."""
        return [[(s.st_size, s.st_mtime_ns) for s in map(os.stat, self.local_paths)] or [self.source]]

    def download_size(self) -> int:
        """Return the size of the files on the Hub in bytes."""
        import huggingface_hub

        file_system = huggingface_hub.HfFileSystem()
        return sum(file_system.info(path)["size"] for path in self.remote_paths)

    @property
    def size(self) -> int:
        """Return the size of the copy in bytes."""
        return self._files().size

    def count(self, path: str) -> int:
        """Return the number of rows, including blank ones."""
        files = self._files()
        return sum(map(files.count, files.paths))

    def read_documents(self, on_progress: Progress = lambda n: None, digest=None) -> Iterator[TextPart]:
        """See Files.read_documents."""
        return self._files().read_documents(on_progress, digest)

    def read_file(self, path: str, on_progress: Progress = lambda n: None, digest=None) -> Iterator[TextPart]:
        """Yield every row as a document, including blank ones."""
        files = self._files()
        return (part for path in files.paths for part in files.read_file(path, on_progress, digest))

    @property
    def is_unfinished(self) -> bool:
        """Return True if there is an incomplete copy that can be resumed."""
        return bool(self._load_state()["files"]) and not self._load_state()["is_complete"]

    def remove_copy(self):
        """Remove the copy."""
        shutil.rmtree(self.copy_dir, ignore_errors=True)

    def _files(self) -> Files:
        """Return the files of the copy, after completing it."""
        paths, column = self.local_paths, self.field
        if not self.is_parquet:
            state = self._load_state()
            state = state if state["is_complete"] else self._copy(state)
            paths, column = [self._path(i) for i in range(state["files"])], "text"
        left_out = self.n_left_out
        return Files(paths, self.document, column, raw=self.raw, separator=self.separator, n_left_out=left_out)

    def _path(self, number: int) -> str:
        return os.path.join(self.copy_dir, f"{number:05d}.parquet")

    def _load_state(self) -> dict:
        """Return the copy's state, or an empty state if the copy is missing, damaged or made from another text."""
        key = repr((self.source, self.field, self.fingerprint()))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(os.path.join(self.copy_dir, "state.json"), encoding="utf-8") as file:
                state = json.load(file)
            sizes = [os.path.getsize(self._path(i)) for i in range(state["files"])]
            if state["key"] == key and sizes == state["sizes"]:
                return state
        return {"key": key, "files": 0, "sizes": [], "rows": 0, "stream": None, "is_complete": False}

    def _copy(self, state: dict) -> dict:
        """Copy the rows that state does not cover yet, and return the final state."""
        if state["files"]:
            print(f"continuing to read {self.source} after row {state['rows']:,}")
            self.stream.load_state_dict(state["stream"])
        elif os.path.exists(os.path.join(self.copy_dir, "state.json")):
            print("the unfinished copy is damaged or was made from another text: starting over")
            self.remove_copy()
        texts, n_bytes = [], 0
        with _quiet(), progress_bar(self.n_rows or None, unit=" rows", desc="reading ", leave=False) as bar:
            for text in self._read_texts(state):
                texts.append(text)
                n_bytes += text.nbytes
                state["rows"] += len(text)
                if n_bytes >= COPY_BYTES:
                    self._save(state, texts)
                    texts, n_bytes = [], 0
                bar.update(state["rows"] - bar.n)
        self._save(state, texts, is_complete=True)
        return state

    def _read_texts(self, state: dict) -> Iterator[Any]:
        """Yield the rows that state does not cover yet as Arrow arrays, with "" in place of null.

        Raises UserError if the connection is lost or a file cannot be read.
        """
        import pyarrow

        tables = self.stream.iter(BATCH_ROWS)
        while True:
            try:
                text = next(tables).column(0).cast(pyarrow.large_string())
                text.validate(full=True)  # readers of JSON do not check UTF-8
                yield text.fill_null("")
            except StopIteration:
                return
            except Exception as error:  # see _explained
                problem = f"{self.source} cannot be read after row {state['rows']:,} ({first_line(error)})"
                if is_connection_lost(error):
                    raise UserError(f"{problem}: run the same command again to continue") from error
                self.remove_copy()
                raise UserError(f"{problem}: fix its files, or pass them without the hf: prefix") from error

    def _save(self, state: dict, texts: list, is_complete: bool = False):
        """Write texts (Arrow arrays) to the next file of the copy, and then save the state."""
        import pyarrow
        import pyarrow.parquet

        try:
            os.makedirs(self.copy_dir, exist_ok=True)
            if texts:
                table = pyarrow.table({"text": pyarrow.chunked_array([c for text in texts for c in text.chunks])})
                path = self._path(state["files"])
                with atomic_write(path) as file:
                    pyarrow.parquet.write_table(table, file, compression="zstd")
                state["sizes"].append(os.path.getsize(path))
                state["files"] += 1
            state["stream"], state["is_complete"] = self.stream.state_dict(), is_complete
            with atomic_write(os.path.join(self.copy_dir, "state.json"), "w", encoding="utf-8") as file:
                json.dump(state, file)
        except OSError as error:
            remedy = "free some space on that disk, and run the same command again to continue"
            raise UserError(f"{self.copy_dir} cannot be written ({error.strerror or error}): {remedy}") from error
