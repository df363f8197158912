"""Lets the packages of dongpt import `model` and `configurator`, which are in the directory above them.

The caller's working directory, or what the caller imported before, may hold other modules of these names. So while a
module of dongpt is executed the two names mean ours, and afterwards what they meant before.
"""

import functools
import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from types import ModuleType

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # an editable install may link to us
NAMES = ("model", "configurator")


class ImportHook:
    """An entry of sys.meta_path."""

    def __init__(self):
        self.ours: dict[str, ModuleType] = {}  # our `model` and `configurator`, once they are imported
        self.depth = 0  # of modules of dongpt that import each other

    def find_spec(self, name, path=None, target=None):
        if name in NAMES and self.depth:
            return importlib.util.spec_from_file_location(name, os.path.join(ROOT, f"{name}.py"))
        spec = PathFinder.find_spec(name, path) if name.startswith("dongpt.") else None
        if spec and spec.loader:
            setattr(spec.loader, "exec_module", functools.partial(self.execute, spec.loader.exec_module))
        return spec

    def execute(self, exec_module, module: ModuleType):
        """Call exec_module(module) while `model` and `configurator` mean ours."""
        before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
        self.ours |= {name: found for name, found in before.items() if _is_ours(name, getattr(found, "__file__", None))}
        sys.modules.update(self.ours)
        self.depth += 1
        try:
            exec_module(module)
        finally:
            self.depth -= 1
            self.ours |= {name: sys.modules[name] for name in NAMES if name in sys.modules}
            for name in self.ours.keys() - before.keys() if not self.depth else ():
                imported = sys.modules.pop(name)  # so that a later `import model` finds the caller's ...
                spec = importlib.util.find_spec(name)
                if spec and _is_ours(name, spec.origin):  # ... which in our own programs is this one
                    sys.modules[name] = imported
            sys.modules.update(before)


def _is_ours(name: str, path: str | None) -> bool:
    return path is not None and os.path.realpath(path) == os.path.realpath(os.path.join(ROOT, f"{name}.py"))


def install():
    sys.meta_path.insert(0, ImportHook())
