"""Let modules in dongpt import `model` and `configurator`, which are in the parent directory.

The caller may have other modules with these names. Therefore, the two names refer to our modules only while a module of
dongpt is being executed. Afterwards, the caller's modules are restored.
"""

import importlib.util
import os
import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from types import ModuleType

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # an editable install may use a symbolic link
ROOT_MODULE_NAMES = ("model", "configurator")
ROOT_MODULES: dict[str, ModuleType] = {}  # our `model` and `configurator`, if already imported


class RootModuleLoader(SourceFileLoader):
    """A loader that lets `model` and `configurator` refer to our modules while it executes a module of dongpt."""

    def exec_module(self, module: ModuleType):
        if self.is_package(module.__name__):
            install_loader(os.path.dirname(self.path))
        saved_modules = {name: sys.modules.pop(name) for name in ROOT_MODULE_NAMES if name in sys.modules}
        ROOT_MODULES.update({name: module for name, module in saved_modules.items() if _is_root(name, module.__spec__)})
        sys.modules.update(ROOT_MODULES)
        sys.path.insert(0, ROOT)
        try:
            super().exec_module(module)
        finally:
            sys.path.remove(ROOT)
            for name in ROOT_MODULE_NAMES:
                if name in sys.modules:
                    ROOT_MODULES[name] = sys.modules.pop(name)
                if name in saved_modules:
                    sys.modules[name] = saved_modules[name]
                elif name in ROOT_MODULES and _is_root(name, importlib.util.find_spec(name)):  # in one of our programs
                    sys.modules[name] = ROOT_MODULES[name]


def _is_root(name: str, spec) -> bool:
    return bool(spec and spec.origin) and os.path.realpath(spec.origin) == os.path.join(ROOT, f"{name}.py")


def install_loader(directory: str):
    """Use RootModuleLoader for the modules in a directory of dongpt."""
    sys.path_importer_cache[directory] = FileFinder(directory, (RootModuleLoader, SOURCE_SUFFIXES))
