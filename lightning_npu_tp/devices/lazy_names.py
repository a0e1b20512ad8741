"""Names of a package that are imported when they are first asked for (PEP 562); this module imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for `package`.

    modules: a module below `lightning_npu_tp` -> the names it defines; "" -> sub-packages of `package`.
    The first raises DeviceError, with what to do, where torch_npu keeps torch or transformers from being imported.
    """
    places = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from lightning_npu_tp.devices.device import explained_import

        with explained_import():
            if not places[name]:
                return import_module(f"{package}.{name}")
            found: object = getattr(import_module(f"lightning_npu_tp.{places[name]}"), name)
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: sorted({*vars(sys.modules[package]), *places})
