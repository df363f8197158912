"""donGPT from Python.

    import dongpt
    generator = dongpt.load("out-quickstart")
    text = generator.generate("The ", max_new_tokens=100, seed=1)

The packages here import `model` and `configurator` from the folder above. A directory in which somebody works may hold
other modules of these names; _RootModules keeps the two apart.
"""

import contextlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from types import ModuleType

__version__ = "0.1.0"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT_MODULES = ("model", "configurator")


def __getattr__(name: str):
    """load and UserError, imported when first used (PEP 562)."""
    if name == "load":
        from dongpt.decode.ready import load

        return load
    if name == "UserError":
        from dongpt.program import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _RootModules(MetaPathFinder):
    """Lets modules of dongpt import our `model` and `configurator`, whatever the caller's directory or imports hold.

    While a module of dongpt is executed, these names mean ours; afterwards they mean again what they meant before. In
    our own programs, and wherever sys.path leads to ours, that is the same module. Function-level imports of dongpt
    modules are covered too, since those are executed in the same way.
    """

    def __init__(self):
        self.modules: dict[str, ModuleType] = {}  # ours, once they are imported
        self.depth = 0  # of modules of dongpt that import each other

    def find_spec(self, name, path=None, target=None):
        if name in ROOT_MODULES and self.depth:
            return importlib.util.spec_from_file_location(name, os.path.join(ROOT, f"{name}.py"))
        if not name.startswith("dongpt."):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec

    @contextlib.contextmanager
    def first(self):
        """`model` and `configurator` in sys.modules are ours, or will be once they are imported."""
        found = {name: sys.modules.get(name) for name in ROOT_MODULES}
        self.modules |= {name: module for name, module in found.items() if module and _is_ours(name, module)}
        theirs = {name: module for name, module in found.items() if module and not _is_ours(name, module)}
        for name in theirs:
            del sys.modules[name]
        sys.modules.update(self.modules)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            self.modules |= {name: sys.modules[name] for name in ROOT_MODULES if name in sys.modules}
            for name in self.modules:
                if self.depth == 0 and not found[name] and not self._is_on_path(name):
                    del sys.modules[name]  # a later `import model` is to find the caller's
            sys.modules.update(theirs)

    def _is_on_path(self, name: str) -> bool:
        """Whether an import by the caller would find our module."""
        ours = sys.modules.pop(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.modules[name] = ours
        return spec is not None and _is_same_file(spec.origin, name)


class _Loader(SourceFileLoader):
    """Executes a module of dongpt while `model` and `configurator` mean ours."""

    def exec_module(self, module):
        with _root_modules.first():
            super().exec_module(module)


def _is_ours(name: str, module: ModuleType) -> bool:
    return _is_same_file(getattr(module, "__file__", None), name)


def _is_same_file(path: str | None, name: str) -> bool:
    return path is not None and os.path.realpath(path) == os.path.realpath(os.path.join(ROOT, f"{name}.py"))


_root_modules = _RootModules()
sys.meta_path.insert(0, _root_modules)
