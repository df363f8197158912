"""Typed configuration: dataclass defaults < config files < --key=value, applied from left to right.

    @dataclass(frozen=True)
    class Config:
        batch_size: Annotated[int, ">=", 1] = 12  # --help shows this comment

    cfg, overrides = load(Config)                                    # reads sys.argv; overrides: the user's settings
    cfg, overrides, paths = load_with_paths(Config, None, "IN OUT")  # for a program that takes two paths

Fields may be int, float, bool, str, Literal and `X | None`, where X is not str. Annotated adds bounds, as in
Annotated[float | None, ">", 0, "<=", 1]. Bounds do not apply to None.

`--max-iters 1e3` and `--max_iters=1000` are equivalent. A bare `--eval_only` sets a bool to True; `--eval_only=off`
requires the equals sign. An argument without dashes is a config file if it ends in .py. Otherwise, programs that take
paths treat it as a path, and other programs as the short name of a file in config/. If a key is set several times, the
last value wins. If a config file replaces an earlier value, a message is printed.

A config file is plain Python, as in nanoGPT (`batch_size = 5 * 8`). Pass only files that you trust, because their code
is executed. Functions, classes, modules and _names in it are ignored; every other name must be a key.
"""

import ast
import glob
import inspect
import os
import sys
import traceback
import types
import warnings
from difflib import get_close_matches
from operator import ge, gt, le, lt
from typing import Any, Collection, Literal, TypeVar, get_args, get_origin, get_type_hints

ROOT = os.path.dirname(os.path.abspath(__file__))
BOUND_OPERATORS = {">=": (ge, "at least"), ">": (gt, "above"), "<=": (le, "at most"), "<": (lt, "below")}
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
T = TypeVar("T")


class UserError(ValueError):
    """An error caused by the user's input. The message says what is wrong, where, and how to fix it.

    run_program prints it without a traceback and exits with code 2. Any other exception is a bug.
    """


class HelpRequest(Exception):
    """Raised for --help. args: config class, usage, and the settings in config files given on the command line."""


def parse_value(text: str, field_type: Any) -> Any:
    """Convert command-line text to a Python value. A str field keeps the text unchanged (--start=123, --start=a=b)."""
    if field_type is str:
        return text
    if text.lower() in BOOL_WORDS and (field_type is bool or True in get_args(field_type)):
        return BOOL_WORDS[text.lower()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `5or` makes Python print a SyntaxWarning
            value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text  # a bare word, e.g. rope
    is_int = int in (field_type, *get_args(field_type))
    return int(value) if is_int and type(value) is float and value.is_integer() else value  # --max_iters=1e3


def type_name(field_type: Any) -> str:
    """Return the name of a type for messages and --help: `int`, `int or None`, `'auto' or True`."""
    if get_origin(field_type) is Literal:
        return " or ".join(map(repr, get_args(field_type)))
    return " or ".join("None" if t is types.NoneType else t.__name__ for t in get_args(field_type) or (field_type,))


def check_type(value: Any, field_type: Any, location: str) -> Any:
    """Return value if it has the type field_type, else raise UserError. The only conversion is int to float."""
    choices = get_args(field_type) or (field_type,)  # the values of a Literal, or types
    if float in choices and type(value) is int and abs(value) < 1e300:
        value = float(value)  # --dropout=0 means 0.0
    if get_origin(field_type) is Literal:
        is_valid = any(type(value) is type(choice) and value == choice for choice in choices)  # True == 1 is not enough
    else:
        is_valid = type(value) in choices  # type(), not isinstance(): True is not a batch size
    if not is_valid:
        raise UserError(f"{location}: expected {type_name(field_type)}, got {value!r}")
    return value


def bounds_errors(cls: type, values: dict[str, Any]) -> list[str]:
    """Return a message such as `batch_size=0 must be at least 1` for each value outside the bounds set in cls."""
    messages = []
    for key, field_type in get_type_hints(cls, include_extras=True).items():
        meta, value = getattr(field_type, "__metadata__", ()), values.get(key)
        bounds = [(*BOUND_OPERATORS[sign], limit) for sign, limit in zip(meta[::2], meta[1::2])]
        if value is not None and not all(compare(value, limit) for compare, _, limit in bounds):
            messages.append(f"{key}={value} must be " + " and ".join(f"{text} {limit}" for _, text, limit in bounds))
    return messages


def check_setting(key: str, value: Any, cls: type, location: str) -> Any:
    """Convert value to the type of cls's field `key`. Raises UserError, prefixed with location, if it is invalid."""
    hints = get_type_hints(cls)
    if key not in hints:
        flags = ["help", "version", *(["list"] if "n_layer" in hints else [])]  # see run_program
        name = next(iter(get_close_matches(key, [*hints, *(flags if location == "command line" else [])], n=1)), "")
        hint = f", did you mean {'--' + name if name in flags else repr(name)}?" if name else "; --help lists all keys"
        raise UserError(f"{location}: unknown key {key!r}{hint}")
    return check_type(value, hints[key], f"{location}: {key}")


def build_config(cls: type[T], values: dict[str, Any], location: str = "settings") -> T:
    """Return an instance of the dataclass cls with these values.

    Raises UserError for an unknown key or a wrong type; `location` names the source of the values in its message.
    Otherwise, a single UserError reports all values that are out of bounds and any ValueError raised by cls itself.
    """
    values = {key: check_setting(key, value, cls, location) for key, value in values.items()}
    problems = bounds_errors(cls, values)
    try:
        config = cls(**values)
    except ValueError as error:
        problems += [] if str(error) in problems else [str(error)]
    if problems:
        raise UserError("; ".join(problems))
    return config


def find_config_file(name: str) -> str | None:
    """Find a config file by its path, or by the short name of a file in config/. Return its path or None."""
    short_path = os.path.join(ROOT, "config", f"{name}.py") if os.path.basename(name) == name else ""
    candidates = [name, os.path.join(ROOT, name)] if name.endswith(".py") else [short_path]
    return next((path for path in candidates if os.path.isfile(path)), None)


def exec_config(path: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Run a config file and return its settings: all names except _private ones, functions, classes and modules."""
    namespace = {"__name__": "<config>", "__file__": path}
    try:
        with open(path, "rb") as file:  # runpy.run_path would also run a zip or byte code named .py
            exec(compile(file.read(), path, "exec"), namespace)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        line_numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path and error.lineno:
            line_numbers = [error.lineno]
        location = f"{path}, line {line_numbers[-1]}" if line_numbers else path
        raise UserError(f"{location}: {type(error).__name__}: {error}") from error
    return {
        key: value
        for key, value in namespace.items()
        if key in keys
        or not (
            key.startswith("_") or callable(value) or inspect.ismodule(value) or type(value).__module__ == "__future__"
        )
    }


def load(cls: type[T], argv: list[str] | None = None, skipped_keys: list[str] | None = None) -> tuple[T, dict]:
    """Return an instance of the dataclass cls and the user's settings. Raises HelpRequest for -h and --help.

    If skipped_keys is a list, config files may contain keys for other programs, which are appended to it. Raises
    UserError for any argument that is neither a known key with a valid value nor a config file with such keys.
    """
    return load_with_paths(cls, argv, "", skipped_keys)[:2]


def load_with_paths(cls: type[T], argv, usage: str, skipped_keys=None) -> tuple[T, dict[str, Any], list[str]]:
    """Return an instance of cls, the user's settings and the paths, for a program that takes paths.

    usage determines the number of paths: "IN OUT" means two, "[CHECKPOINT]" at most one, "[CHECKPOINT ...]" any number.
    """
    overrides, paths = read_arguments(cls, argv, usage, skipped_keys)
    return build_config(cls, overrides), overrides, paths


def join_values(cls: type, argv: list[str]) -> list[str]:
    """Return argv with every setting as --key=value: --max-iters 9 --eval_only -> --max_iters=9 --eval_only=True."""
    hints, args, joined = get_type_hints(cls), [*argv], []
    while args:
        arg = args.pop(0)
        key, separator, text = arg.removeprefix("--").partition("=")
        key, next_arg = key.replace("-", "_"), args[0] if args else "--"
        is_bare = arg.startswith("--") and not separator and key in hints
        if is_bare and (hints[key] is bool or True in get_args(hints[key])):
            text = "True"
            if next_arg.lower() in (*BOOL_WORDS, "auto") and not os.path.exists(next_arg):
                raise UserError(f"command line: --{key} {next_arg} needs an equals sign: use --{key}={next_arg}")
        elif is_bare:
            if next_arg.startswith("--"):
                raise UserError(f"command line: --{key} needs a value ({type_name(hints[key])}): use --{key}=VALUE")
            text = args.pop(0)
        joined.append(f"--{key}={text}" if arg.startswith("--") else arg)
    return joined


def read_arguments(cls: type, argv, usage: str = "", skipped_keys=None) -> tuple[dict[str, Any], list[str]]:
    """Return the user's settings and the paths, for a program that adds other values before it calls build_config()."""
    argv, hints = sys.argv[1:] if argv is None else argv, get_type_hints(cls)
    if "-h" in argv or "--help" in argv:
        files = [find_config_file(arg) for arg in argv if not (usage and _is_path(arg, hints))]
        raise HelpRequest(cls, usage, {k: v for path in files if path for k, v in exec_config(path, hints).items()})
    overrides, paths = {}, []
    joined = join_values(cls, argv)
    for previous_arg, arg in zip(["", *joined], joined):
        key, _, text = arg.removeprefix("--").partition("=")
        if arg.startswith("--"):
            overrides[key] = check_setting(key, parse_value(text, hints.get(key)), cls, "command line")
        elif usage and _is_path(arg, hints):
            paths.append(arg)
        elif path := find_config_file(arg):
            settings = exec_config(path, hints)
            for key in [key for key in settings if skipped_keys is not None and key not in hints]:
                skipped_keys.append(key)
                del settings[key]
            settings = {key: check_setting(key, value, cls, arg) for key, value in settings.items()}
            if replaced := [f"{k}={v!r}" for k, v in settings.items() if overrides.get(k, v) != v]:
                print(f"{arg} replaces earlier values: {', '.join(replaced)}", file=sys.stderr)
            overrides |= settings
        else:
            raise UserError(_bad_argument_message(arg, previous_arg, usage, hints, skipped_keys is not None))
    min_paths, max_paths = len(usage.partition("[")[0].split()), len(usage.split())
    usage_text = f"run python {os.path.basename(sys.argv[0])} {usage}, with settings as --key=value"
    if len(paths) < min_paths:
        raise UserError(f"expected {min_paths} path{'s' * (min_paths > 1)}, got {len(paths)}: {usage_text}")
    if len(paths) > max_paths and "..." not in usage:
        raise UserError(f"too many paths ({', '.join(paths)}): {usage_text}, and put text with spaces in quotes")
    return overrides, paths


def _is_path(arg: str, hints: dict[str, Any]) -> bool:
    """Return True if arg is a path in programs that take paths, such as block_size=64/ckpt.pt but not block_size=64."""
    if arg.startswith("-") or arg.endswith(".py") and not os.path.isdir(arg):
        return False
    is_setting = "=" in arg and arg.partition("=")[0] in hints and os.path.basename(arg) == arg
    return os.path.exists(arg) or arg != "" and not is_setting


def _bad_argument_message(arg: str, previous_arg: str, usage: str, hints: dict, allows_other_keys: bool) -> str:
    """Return the error message for an argument that is not a config file, setting or path."""
    if "=" in arg:
        setting = arg.lstrip("-\N{EN DASH}\N{EM DASH}")  # as typed, or pasted from a formatted page
        return f"{arg!r}: settings start with two dashes, as in --{setting}"
    if usage and not arg.endswith(".py"):
        return f"{arg!r} is not a path: write a path that starts with a dash as ./{arg}, and a setting as --key=value"
    if "out_dir" in hints and os.path.isdir(arg):
        return f"{arg!r} is a directory: use --out_dir={arg}"
    files = glob.glob(os.path.join(ROOT, "config", "*.py")) if "eval_iters" in hints or allows_other_keys else []
    names = sorted(os.path.basename(path)[:-3] for path in files)
    close_names = get_close_matches(os.path.basename(arg).removesuffix(".py"), names, n=1)
    hint = f"; config/ contains {', '.join(names)}" if names else "; see --help"
    if hints.get(key := previous_arg.partition("=")[0].removeprefix("--")) is str:
        hint = f'; if it is part of --{key}, put the whole text in quotes: --{key}="..."'
    hint = f", did you mean config/{close_names[0]}.py?" if close_names else hint
    return f"{arg!r} is neither a config file nor a setting (--key=value){hint}"
