"""For the reference: what a package exports, where it has a file of the same name.

`wspace.merge.ties` is the function in `wspace/merge/ties.py`, as in Python, and not the file.
"""

from typing import Any

import griffe


class Members(griffe.Extension):
    """Puts what packages export in the place of their files of the same names."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Looks all of it up first, by paths that lead to files as long as they are there."""
        exported = [
            (package, name, loader.modules_collection[path])
            for package in _packages(pkg)
            if package.modules.keys() & package.imports.keys()
            for name, path in package.imports.items()
            if path.startswith(f"{package.path}.")
        ]
        for package, name, found in exported:
            if not found.is_module:
                package.set_member(name, griffe.Alias(name, found, parent=package))


def _packages(module: griffe.Module) -> list[griffe.Module]:
    return [module, *(x for child in module.modules.values() for x in _packages(child))]
