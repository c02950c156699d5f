"""Keep the Python modules of one hub repository apart from those of every other repository.

Repositories call their modules models.py, utils/ or layers.py. Python finds a module by its name alone, so the second
repository would get the first one's module. Here each repository keeps its own modules. They are in sys.modules, and
their folder is on sys.path, only while the repository's code is imported; afterwards both are as before. An import
inside a function runs later, in a forward pass. It also gets the repository's own modules: the patched import statement
looks up the file that contains it.
"""

import builtins
import contextlib
import functools
import importlib
import os
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# never hidden from a repository that has a module of the same name: they exist once in a process (torchvision, which
# its own hub repository holds as well, registers operators)
_SHARED = frozenset({"torch", "torchvision", "timm", "numpy", "distillery"} | sys.stdlib_module_names)
_REPOSITORIES: dict[tuple[str, ...], "Repository"] = {}
_LOCK = threading.RLock()
_import = builtins.__import__


class Repository:
    """The modules that the code in one repository has imported from its own folders.

    folders: where the repository is, or will be once it is downloaded; paths: what it has on sys.path: these, and what
    its code has added.
    """

    def __init__(self, folders: tuple[str, ...]) -> None:
        self.folders, self.paths = folders, list(folders)
        self.modules: dict[str, types.ModuleType] = {}
        self.importlib = types.ModuleType("importlib", importlib.__doc__)
        self.importlib.import_module = self._import_module
        self._is_active = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Imports find this repository's modules first. Other threads wait; within itself it does nothing."""
        with _LOCK:
            if self._is_active:
                yield
                return
            path, others = list(sys.path), _take_modules(self._names(for_hiding=True))
            known = set(sys.modules)
            sys.path[:] = [*self.paths, *path]
            sys.modules.update(self.modules)
            self._is_active = True
            try:
                yield
            finally:
                self._is_active = False
                self.paths += [added for added in sys.path if added not in path and added not in self.paths]
                sys.path[:] = path
                new = {name.partition(".")[0] for name in set(sys.modules) - known}
                self.modules |= _take_modules({name for name in new if self._owns(name)})
                sys.modules.update(others)

    def has_code_in(self, file: str) -> bool:
        """Whether a source file is this repository's."""
        return file.startswith(tuple(folder + os.sep for folder in self.folders))

    def import_(self, name: str, scope: Any, others: Any, names: Sequence[str], level: int) -> types.ModuleType:
        """What `__import__` gives to code of this repository."""
        top = name.partition(".")[0]
        if top == "importlib" and not level and (name == top or not names):
            _import(name)
            vars(self.importlib).update(
                {key: value for key, value in vars(importlib).items() if key != "import_module"}
            )
            return self.importlib
        if self._is_active or not level and (top in _SHARED or top not in self._names()):
            return _import(name, scope, others, names, level)
        with self.active():
            return _import(name, scope, others, names, level)

    def _import_module(self, name: str, package: str | None = None) -> types.ModuleType:
        with self.active():
            return importlib.import_module(name, package)

    def _names(self, *, for_hiding: bool = False) -> set[str]:
        """Names of the modules at the top of its paths; folders without __init__.py never hide another's module."""
        names = set(self.modules)
        for entry in (entry for path in self.paths if os.path.isdir(path) for entry in os.scandir(path)):
            name, _, suffix = entry.name.partition(".")
            is_file = suffix in ("py", "so") or suffix.startswith("cpython")
            is_package = os.path.isfile(os.path.join(entry.path, "__init__.py"))
            if is_file or is_package or (not for_hiding and entry.is_dir()):
                names.add(name)
        return {name.partition(".")[0] for name in names} - _SHARED

    def _owns(self, name: str) -> bool:
        """Whether a module of sys.modules was found at the top of one of its paths."""
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if spec is None or name in _SHARED:
            return False
        places = list(spec.submodule_search_locations or ()) or [spec.origin or ""]
        paths = {os.path.realpath(path) for path in self.paths}
        return any(os.path.dirname(os.path.realpath(place)) in paths for place in places)


def _take_modules(tops: set[str]) -> dict[str, types.ModuleType]:
    """Take modules and what lies below them out of sys.modules; tops: names without dots."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops}


def repository_of(folders: Sequence[str | Path]) -> Repository:
    """Return the repository in these folders. Every call returns the same object, with the modules it has loaded."""
    key = tuple(os.path.abspath(folder) for folder in folders)
    if builtins.__import__ is _import:
        builtins.__import__ = _import_by_place
    return _REPOSITORIES.setdefault(key, Repository(key))


@functools.wraps(_import)
def _import_by_place(
    name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
) -> types.ModuleType:
    scope = sys._getframe(1).f_globals
    globals = scope if globals is None else globals
    file = globals.get("__file__") if isinstance(globals, dict) else None
    for repository in _REPOSITORIES.values() if isinstance(file, str) else ():
        if repository.has_code_in(file):
            if scope is not globals:  # torch.compile, which knows modules by their names alone
                raise ImportError(f"{name} is a module of {repository.folders[0]}: not to be traced")
            return repository.import_(name, globals, locals, fromlist, level)
    return _import(name, globals, locals, fromlist, level)
