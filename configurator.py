"""Typed configuration: dataclass defaults < config files < --key=value, applied from left to right.

    @dataclass(frozen=True)
    class Config:
        batch_size: int = 12  # this comment is what --help shows

    cfg, given = load(Config)            # reads sys.argv; `given` holds the values that the user set

A config file is plain Python in the style of nanoGPT (`batch_size = 5 * 8`). It is run, in a namespace of its own,
so it is code that you trust; only a .py file is ever run. Names that start with an underscore, functions and modules
in it are its own business; every other name must be a key.
Types are int, float, bool, str, Literal and `X | None` (X not str).
"""

import __future__

import ast
import inspect
import os
import re
import sys
import traceback
import types
import warnings
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = os.path.dirname(os.path.abspath(__file__))


class UserError(ValueError):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do about it.

    run_program prints it without a traceback and exits with code 2. Every other exception is a bug of ours.
    """


def parse(text: str, kind: Any) -> Any:
    """Command-line text -> Python value. A str field keeps the text as typed (--start=123, --start=a=b)."""
    if kind is str:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of `5or` on a second line
            return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text  # a bare word, e.g. rope


def describe(kind: Any) -> str:
    """The name of a type as messages and --help show it: `int`, `int or None`, `'auto' or True`."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join("None" if k is types.NoneType else k.__name__ for k in get_args(kind))
    return kind.__name__


def check(value: Any, kind: Any, where: str) -> Any:
    """Return value if it fits kind, else raise UserError. int -> float is the only conversion."""
    if get_origin(kind) is Literal:  # compared with its type, since True == 1
        fits = any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    else:
        kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if float in kinds and type(value) is int and abs(value) < 1e300:
            value = float(value)  # --dropout=0 means 0.0
        fits = type(value) in kinds  # type(), not isinstance(): True is no batch size
    if not fits:
        raise UserError(f"{where}: expected {describe(kind)}, got {value!r}")
    return value


def find_config(name: str) -> str | None:
    """Path of the config file that name means (a path, or the short name of a file in config/), None if none."""
    if name.endswith(".py"):
        candidates = [name, os.path.join(ROOT, name)]
    else:
        candidates = [os.path.join(ROOT, "config", f"{name}.py")] if os.path.basename(name) == name else []
    return next((path for path in candidates if os.path.isfile(path)), None)


def run_config(path: str, keys=()) -> dict[str, Any]:
    """The settings in a config file; scratch names, functions, classes and modules that are no keys are left out."""
    names = {"__name__": "<config>", "__file__": path}
    try:
        with open(path, "rb") as file:  # not runpy.run_path, which runs a zip and byte code whatever their name is
            exec(compile(file.read(), path, "exec"), names)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path and error.lineno:
            lines = [error.lineno]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    scratch = (types.ModuleType, __future__._Feature)
    return {
        key: value
        for key, value in names.items()
        if key in keys or not (key.startswith("_") or callable(value) or isinstance(value, scratch))
    }


def load(cls: type, argv: list[str] | None = None, skips_unknown: bool = False) -> tuple:
    """Return (an instance of the dataclass cls, the values the user set); -h and --help print the keys and exit.

    With skips_unknown config files may have keys that cls lacks, as another program's do: their names come third.
    Raises UserError, with a sentence for the user, for everything that is not a known key with a fitting value.
    """
    argv = sys.argv[1:] if argv is None else argv
    kinds, given, skipped = get_type_hints(cls), {}, {}
    if "-h" in argv or "--help" in argv:
        print_help(cls)
        sys.exit(0)

    def put(key: str, value: Any, where: str) -> None:
        if key not in kinds:
            near = get_close_matches(key, kinds, n=1)
            raise UserError(
                f"{where}: unknown key {key!r}, " + (f"did you mean {near[0]!r}?" if near else "--help lists the keys")
            )
        given[key] = check(value, kinds[key], f"{where}: {key}")

    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if arg.startswith("--"):
            if equals:
                put(key, parse(text, kinds.get(key)), "command line")
            elif key in kinds and kinds[key] is not bool and True not in get_args(kinds[key]):
                raise UserError(f"command line: --{key} needs a value, as in --{key}=...")
            else:
                put(key, True, "command line")  # a bare --eval_only
        elif path := find_config(arg):
            for key, value in run_config(path, kinds).items():
                if skips_unknown and key not in kinds:
                    skipped[key] = value
                else:
                    put(key, value, arg)
        else:
            raise UserError(_not_an_argument(arg))
    cfg = build(cls, given)
    return (cfg, given, list(skipped)) if skips_unknown else (cfg, given)


def build(cls: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass cls. A value that it refuses with a ValueError is the user's mistake."""
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def _not_an_argument(arg: str) -> str:
    """The sentence for an argument that is neither a config file nor --key=value."""
    if "=" in arg:
        return f"{arg!r}: settings are written with two dashes, as in --{arg.lstrip('-')}"
    shelf = os.path.join(ROOT, "config")
    names = sorted(name[:-3] for name in os.listdir(shelf) if name.endswith(".py")) if os.path.isdir(shelf) else []
    near = get_close_matches(os.path.basename(arg).removesuffix(".py"), names, n=1)
    return f"{arg!r} is neither a config file that exists nor --key=value" + (
        f", did you mean config/{near[0]}.py?" if near else f"; config/ holds {', '.join(names)}"
    )


def print_help(cls: type) -> None:
    """Print every key of cls with its type, default and the comment beside it in the source."""
    program = os.path.basename(sys.argv[0])
    print(f"usage: python {program} [config file] [--key=value ...]\n")
    comments, kinds = {}, get_type_hints(cls)
    for owner in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(owner).splitlines():
            if found := re.match(r"    (\w+): .*?  # (.*)", line):
                comments[found[1]] = found[2]
    for field in fields(cls):
        print(f"--{field.name}={field.default!r}  ({describe(kinds[field.name])})")
        if field.name in comments:
            print(f"      {comments[field.name]}")
