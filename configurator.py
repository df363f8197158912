"""Typed configuration: dataclass defaults < config files < --key=value, applied from left to right.

    @dataclass(frozen=True)
    class Config:
        batch_size: Annotated[int, ">=", 1] = 12  # this comment is what --help shows

    cfg, overrides = load(Config)                                    # reads sys.argv; overrides: what the user set
    cfg, overrides, paths = load_with_paths(Config, None, "OLD NEW") # the same for a program that takes two paths

Types are int, float, bool, str, Literal and `X | None` (X not str); Annotated adds bounds that any value but None must
keep, as in Annotated[float | None, ">", 0, "<=", 1].

An argument without dashes is a config file if it ends in .py. Otherwise it is a path in a program that takes paths,
whatever its name, and in any other program the short name of a file in config/. A config file is plain Python in the
style of nanoGPT (`batch_size = 5 * 8`). It is run, in a namespace of its own: pass only files that you trust.
Its functions, classes, modules and _names are ignored; every other name must be a key.
"""

import ast
import glob
import inspect
import os
import re
import sys
import traceback
import types
import warnings
from dataclasses import fields
from difflib import get_close_matches
from operator import ge, gt, le, lt
from typing import Any, Collection, Literal, TypeVar, get_args, get_origin, get_type_hints

ROOT = os.path.dirname(os.path.abspath(__file__))
BOUND_OPERATORS = {">=": (ge, "at least"), ">": (gt, "above"), "<=": (le, "at most"), "<": (lt, "below")}
T = TypeVar("T")


class UserError(ValueError):
    """A user's mistake, in one sentence: what is wrong, where, and what to do about it.

    run_program prints it without a traceback and exits with code 2. Every other exception is a bug of ours.
    """


def parse_value(text: str, field_type: Any) -> Any:
    """Python value of a command-line text. A str field keeps the text as typed (--start=123, --start=a=b)."""
    if field_type is str:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `5or` makes Python print a SyntaxWarning
            return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text  # a bare word, e.g. rope


def type_name(field_type: Any) -> str:
    """Name of a type in messages and --help: `int`, `int or None`, `'auto' or True`."""
    if get_origin(field_type) is Literal:
        return " or ".join(map(repr, get_args(field_type)))
    return " or ".join("None" if t is types.NoneType else t.__name__ for t in get_args(field_type) or (field_type,))


def check_type(value: Any, field_type: Any, location: str) -> Any:
    """Return value if it has the type field_type, else raise UserError. int -> float is the only conversion."""
    choices = get_args(field_type) or (field_type,)  # of a Literal, the values
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
    """Return (an instance of the dataclass cls, the values the user set); -h and --help print the keys and exit.

    If skipped_keys is a list, config files may hold keys that cls lacks (another program's), which are appended to it.
    Raises UserError for everything that is not a known key with a valid value.
    """
    return load_with_paths(cls, argv, "", skipped_keys)[:2]


def load_with_paths(cls: type[T], argv, usage: str, skipped_keys=None) -> tuple[T, dict[str, Any], list[str]]:
    """Return (an instance of cls, the values the user set, the paths), for a program that takes paths.

    usage says how many: "OLD NEW" is two, "[PATH]" at most one, "[PATH ...]" any number.
    """
    overrides, paths = read_arguments(cls, argv, usage, skipped_keys)
    return build_config(cls, overrides), overrides, paths


def read_arguments(cls: type, argv, usage: str = "", skipped_keys=None) -> tuple[dict[str, Any], list[str]]:
    """(the values the user set, the paths), for a program with more values from elsewhere before build_config()."""
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print_help(cls, usage)
        sys.exit(0)
    hints, overrides, paths = get_type_hints(cls), {}, []
    for arg in argv:
        key, separator, text = arg.removeprefix("--").partition("=")
        if arg.startswith("--"):
            if not separator and key in hints and hints[key] is not bool and True not in get_args(hints[key]):
                raise UserError(f"command line: --{key} needs a value, as in --{key}=...")
            value = parse_value(text, hints.get(key)) if separator else True  # a bare --eval_only
            overrides[key] = check_setting(key, value, cls, "command line")
        elif usage and _is_path(arg, hints):
            paths.append(arg)
        elif path := find_config_file(arg):
            for key, value in exec_config(path, hints).items():
                if skipped_keys is not None and key not in hints:
                    skipped_keys.append(key)
                else:
                    overrides[key] = check_setting(key, value, cls, arg)
        else:
            raise UserError(_bad_argument_message(arg, usage))
    min_paths, max_paths = len(usage.partition("[")[0].split()), len(usage.split())
    usage_text = f"python {os.path.basename(sys.argv[0])} {usage}, with settings as --key=value"
    if len(paths) < min_paths:
        raise UserError(f"{len(paths)} of {min_paths} paths: {usage_text}")
    if len(paths) > max_paths and "..." not in usage:
        raise UserError(f"{paths[max_paths]!r} is one too many: {usage_text}")
    return overrides, paths


def _is_path(arg: str, hints: dict[str, Any]) -> bool:
    """Whether a program that takes paths takes arg for one: block_size=64/ckpt.pt is a path, block_size=64 is none."""
    if arg.startswith("-") or arg.endswith(".py") and not os.path.isdir(arg):
        return False
    is_setting = "=" in arg and arg.partition("=")[0] in hints and os.path.basename(arg) == arg
    return os.path.exists(arg) or arg != "" and not is_setting


def _bad_argument_message(arg: str, usage: str) -> str:
    """Error message for an argument that is no config file, setting or path."""
    if "=" in arg:
        return f"{arg!r}: settings are written with two dashes, as in --{arg.lstrip('-')}"
    if usage and not arg.endswith(".py"):
        return f"{arg!r} is no path: one that starts with a dash is written ./{arg}, and a setting --key=value"
    names = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "config", "*.py")))
    close_names = get_close_matches(os.path.basename(arg).removesuffix(".py"), names, n=1)
    hint = f", did you mean config/{close_names[0]}.py?" if close_names else f"; config/ holds {', '.join(names)}"
    return f"{arg!r} is neither a config file that exists nor --key=value{hint}"


def print_help(cls: type, usage: str = ""):
    """Print every key of cls with its type, default and the comment beside it in the source."""
    program = " ".join(filter(None, [os.path.basename(sys.argv[0]), usage]))
    print(f"usage: python {program} [config file] [--key=value ...]\n")
    class_source, hints = "".join(map(inspect.getsource, reversed(cls.__mro__[:-1]))), get_type_hints(cls)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", class_source, re.MULTILINE))  # of the last class with one
    for field in fields(cls):
        print(f"--{field.name}={field.default!r}  ({type_name(hints[field.name])})")
        if field.name in comments:
            print(f"      {comments[field.name]}")
