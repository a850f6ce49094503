"""Modules of a trainer's work tree, imported beside mocks for what they import and is not installed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


class Mock(ModuleType):
    """A module whose names are classes, so that others can be derived from them, and that decorate by doing nothing."""

    __path__ = __all__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


class _AnythingsClass(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Anything(metaclass=_AnythingsClass):
    """Takes anything, has no items, and decorates by doing nothing."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """Keeps none of it."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a mock for each module of packages that are not installed, and of the work tree's own where it has none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package = name.partition(".")[0]
        installed = package in sys.modules and not isinstance(sys.modules[package], Mock)
        if (installed or ("." not in name and self._is_there(package))) and not (self._folder / package).is_dir():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def _is_there(self, package: str) -> bool:
        return importlib.machinery.PathFinder.find_spec(package) is not None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Mock(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A mock is complete."""


@contextmanager
def imported_from(folder: Path) -> Iterator[None]:
    """Modules of a work tree, and mocks for those that are not there."""
    missing = _Missing(folder)
    sys.path.insert(0, str(folder))
    sys.meta_path.append(missing)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(missing)
        own = {path.stem for path in folder.iterdir()}
        for name in [
            name for name, module in sys.modules.items() if isinstance(module, Mock) or name.partition(".")[0] in own
        ]:
            del sys.modules[name]
