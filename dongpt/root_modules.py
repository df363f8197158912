"""Lets the packages of dongpt import `model` and `configurator`, which are in the directory above them.

The caller's working directory, or what the caller imported before, may hold other modules of these names. So while a
module of dongpt is executed the two names mean ours, and afterwards what they meant before.
"""

import importlib.util
import os
import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from types import ModuleType

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # an editable install may link to us
NAMES = ("model", "configurator")
OURS: dict[str, ModuleType] = {}  # our `model` and `configurator`, once they are imported


class Loader(SourceFileLoader):
    """Executes a module of dongpt."""

    def exec_module(self, module: ModuleType):
        if self.is_package(module.__name__):
            install(os.path.dirname(self.path))
        before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
        OURS.update({name: found for name, found in before.items() if _is_ours(name, found.__spec__)})
        sys.modules.update(OURS)
        sys.path.insert(0, ROOT)
        try:
            super().exec_module(module)
        finally:
            sys.path.remove(ROOT)
            for name in NAMES:
                if name in sys.modules:
                    OURS[name] = sys.modules.pop(name)
                if name in before:
                    sys.modules[name] = before[name]
                elif name in OURS and _is_ours(name, importlib.util.find_spec(name)):  # as in our own programs
                    sys.modules[name] = OURS[name]


def _is_ours(name: str, spec) -> bool:
    return bool(spec and spec.origin) and os.path.realpath(spec.origin) == os.path.join(ROOT, f"{name}.py")


def install(directory: str):
    """Let Loader execute the modules in a directory of dongpt."""
    sys.path_importer_cache[directory] = FileFinder(directory, (Loader, SOURCE_SUFFIXES))
