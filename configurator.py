"""Typed configuration: dataclass defaults < config files < --key=value, applied from left to right.

    @dataclass(frozen=True)
    class Config:
        batch_size: Annotated[int, ">=", 1] = 12  # this comment is what --help shows

    cfg, overrides = load(Config)                                    # reads sys.argv; overrides: what the user set
    cfg, overrides, paths = load_with_paths(Config, None, "IN OUT")  # the same for a program that takes two paths

Types are int, float, bool, str, Literal and `X | None` (X not str). Annotated adds bounds for every value but None, as
in Annotated[float | None, ">", 0, "<=", 1].

`--max-iters 1e3` and `--max_iters=1000` are the same. A bare `--eval_only` sets a bool to True; `--eval_only=off` needs
its equals sign. An argument without dashes is a config file if it ends in .py. Otherwise it is a path in a program that
takes paths, and the short name of a file in config/ in the others. The last of several values for a key wins, and a
config file that replaces an earlier value says so.

A config file is plain Python in the style of nanoGPT (`batch_size = 5 * 8`). It is run in a namespace of its own: pass
only files that you trust. Functions, classes, modules and _names in it are ignored; every other name must be a key.
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
    """A user's mistake, in one sentence: what is wrong, where, and what to do about it.

    run_program prints it without a traceback and exits with code 2. Every other exception is a bug of ours.
    """


class HelpRequest(Exception):
    """--help was given. args: the config class, its usage, the settings of the config files given with it."""


def parse_value(text: str, field_type: Any) -> Any:
    """Python value of a command-line text. A str field keeps the text as typed (--start=123, --start=a=b)."""
    if field_type is str:
        return text
    if text.lower() in BOOL_WORDS:
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
    """Name of a type in messages and --help: `int`, `int or None`, `'auto' or True`."""
    if get_origin(field_type) is Literal:
        return " or ".join(map(repr, get_args(field_type)))
    return " or ".join("None" if t is types.NoneType else t.__name__ for t in get_args(field_type) or (field_type,))


def check_type(value: Any, field_type: Any, location: str) -> Any:
    """Return value if it has the type field_type, else raise UserError. int -> float is the only conversion."""
    choices = get_args(field_type) or (field_type,)  # the values of a Literal, or types
    if float in choices and type(value) is int and abs(value) < 1e300:
        value = float(value)  # --dropout=0 means 0.0
    if get_origin(field_type) is Literal:
        is_valid = any(type(value) is type(choice) and value == choice for choice in choices)  # True == 1 is not enough
    else:
        is_valid = type(value) in choices  # type(), not isinstance(): True is no batch size
    if not is_valid:
        raise UserError(f"{location}: expected {type_name(field_type)}, got {value!r}")
    return value


def bounds_errors(cls: type, values: dict[str, Any]) -> list[str]:
    """A message such as `batch_size=0 must be at least 1` for every value outside the bounds that cls declares."""
    messages = []
    for key, field_type in get_type_hints(cls, include_extras=True).items():
        meta, value = getattr(field_type, "__metadata__", ()), values.get(key)
        bounds = [(*BOUND_OPERATORS[sign], limit) for sign, limit in zip(meta[::2], meta[1::2])]
        if value is not None and not all(compare(value, limit) for compare, _, limit in bounds):
            messages.append(f"{key}={value} must be " + " and ".join(f"{text} {limit}" for _, text, limit in bounds))
    return messages


def check_setting(key: str, value: Any, cls: type, location: str) -> Any:
    """Return the value of one of cls's fields, of the right type; else raise UserError, which begins with location."""
    hints = get_type_hints(cls)
    if key not in hints:
        close_keys = get_close_matches(key, hints, n=1)
        hint = f"did you mean {close_keys[0]!r}?" if close_keys else "--help lists the keys"
        raise UserError(f"{location}: unknown key {key!r}, {hint}")
    return check_type(value, hints[key], f"{location}: {key}")


def build_config(cls: type[T], values: dict[str, Any], location: str = "settings") -> T:
    """An instance of the dataclass cls with these values, from whatever source.

    Raises UserError for an unknown key or a wrong type; else for all values out of bounds, and for what cls itself
    rejects with a ValueError, together.
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
    """Path of the config file called name (a path, or the short name of a file in config/), or None."""
    short_path = os.path.join(ROOT, "config", f"{name}.py") if os.path.basename(name) == name else ""
    candidates = [name, os.path.join(ROOT, name)] if name.endswith(".py") else [short_path]
    return next((path for path in candidates if os.path.isfile(path)), None)


def exec_config(path: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Settings in a config file, without names that are its own: _scratch names, functions, classes and modules."""
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
    """Return (an instance of the dataclass cls, the values the user set). Raises HelpRequest for -h and --help.

    If skipped_keys is a list, config files may hold keys that cls lacks (another program's), which are appended to it.
    Raises UserError for everything that is not a known key with a valid value.
    """
    return load_with_paths(cls, argv, "", skipped_keys)[:2]


def load_with_paths(cls: type[T], argv, usage: str, skipped_keys=None) -> tuple[T, dict[str, Any], list[str]]:
    """Return (an instance of cls, the values the user set, the paths), for a program that takes paths.

    usage says how many: "IN OUT" is two, "[CHECKPOINT]" at most one, "[CHECKPOINT ...]" any number.
    """
    overrides, paths = read_arguments(cls, argv, usage, skipped_keys)
    return build_config(cls, overrides), overrides, paths


def join_values(cls: type, argv: list[str]) -> list[str]:
    """argv with every setting as --key=value: ["--max-iters", "9", "--eval_only"] -> --max_iters=9 --eval_only=True."""
    hints, args, joined = get_type_hints(cls), [*argv], []
    while args:
        arg = args.pop(0)
        key, separator, text = arg.removeprefix("--").partition("=")
        key, next_arg = key.replace("-", "_"), args[0] if args else "--"
        is_bare = arg.startswith("--") and not separator and key in hints
        if is_bare and (hints[key] is bool or True in get_args(hints[key])):
            text = "True"
            if next_arg.lower() in (*BOOL_WORDS, "auto") and not os.path.exists(next_arg):
                raise UserError(f"command line: --{key} {next_arg} needs an equals sign: --{key}={next_arg}")
        elif is_bare:
            if next_arg.startswith("--"):
                raise UserError(f"command line: --{key} needs a value ({type_name(hints[key])}): --{key}=VALUE")
            text = args.pop(0)
        joined.append(f"--{key}={text}" if arg.startswith("--") else arg)
    return joined


def read_arguments(cls: type, argv, usage: str = "", skipped_keys=None) -> tuple[dict[str, Any], list[str]]:
    """(the values the user set, the paths), for a program with more values from elsewhere before build_config()."""
    argv, hints = sys.argv[1:] if argv is None else argv, get_type_hints(cls)
    if "-h" in argv or "--help" in argv:
        files = [find_config_file(arg) for arg in argv if not (usage and _is_path(arg, hints))]
        raise HelpRequest(cls, usage, {k: v for path in files if path for k, v in exec_config(path, hints).items()})
    overrides, paths = {}, []
    for arg in join_values(cls, argv):
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
            raise UserError(_bad_argument_message(arg, usage, hints, skipped_keys is not None))
    min_paths, max_paths = len(usage.partition("[")[0].split()), len(usage.split())
    usage_text = f"python {os.path.basename(sys.argv[0])} {usage}, with settings as --key=value"
    if len(paths) < min_paths:
        raise UserError(f"{len(paths)} of {min_paths} paths given: {usage_text}")
    if len(paths) > max_paths and "..." not in usage:
        raise UserError(f"{paths[max_paths]!r} is one path too many: {usage_text}")
    return overrides, paths


def _is_path(arg: str, hints: dict[str, Any]) -> bool:
    """Whether a program that takes paths treats arg as one: block_size=64/ckpt.pt is a path, block_size=64 is not."""
    if arg.startswith("-") or arg.endswith(".py") and not os.path.isdir(arg):
        return False
    is_setting = "=" in arg and arg.partition("=")[0] in hints and os.path.basename(arg) == arg
    return os.path.exists(arg) or arg != "" and not is_setting


def _bad_argument_message(arg: str, usage: str, hints: dict[str, Any], allows_other_keys: bool) -> str:
    """Error message for an argument that is no config file, setting or path."""
    if "=" in arg:
        setting = arg.lstrip("-\N{EN DASH}\N{EM DASH}")  # as typed, or pasted from a formatted page
        return f"{arg!r}: settings are written with two dashes, as in --{setting}"
    if usage and not arg.endswith(".py"):
        return f"{arg!r} is not a path: write a path that starts with a dash as ./{arg}, and a setting as --key=value"
    if "out_dir" in hints and os.path.isdir(arg):
        return f"{arg!r} is a directory: write --out_dir={arg}"
    # a program without training's settings, such as sample.py, cannot use the files in config/
    files = glob.glob(os.path.join(ROOT, "config", "*.py")) if "eval_iters" in hints or allows_other_keys else []
    names = sorted(os.path.basename(path)[:-3] for path in files)
    close_names = get_close_matches(os.path.basename(arg).removesuffix(".py"), names, n=1)
    hint = f", did you mean config/{close_names[0]}.py?" if close_names else f"; config/ holds {', '.join(names)}"
    return f"{arg!r} is neither a config file that exists nor --key=value{hint if names else '; --help lists the keys'}"
