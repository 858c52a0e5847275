"""Where an output may be put, and what goes and what stays where it replaces another one."""

import errno
import os
import re
from collections.abc import Collection
from pathlib import Path

from wspace.checkpoint.folder import is_weights, refuse_suffix
from wspace.checkpoint.tensors import writing

_SETTINGS = re.compile(
    r".*config\.json|tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template.*|wspace\.json",
    re.DOTALL,
)
"""Files that belong to the weights beside them: not to be left to others."""


def refuse_existing(target: Path, force: bool, is_file: bool) -> None:
    """Raises if the output exists and may not be replaced."""
    if not os.path.lexists(target):
        return
    if not force:
        raise FileExistsError(f"{target} exists: give another path, or force=True to replace it")
    if is_file and target.is_dir():
        raise FileExistsError(f"{target} is a folder, which no file replaces: give another path")
    if not is_file and not (target.is_dir() and _is_checkpoint(target)):
        raise FileExistsError(
            f"{target} holds no .safetensors file, so it is not replaced by a checkpoint: remove "
            "it yourself, or give another path"
        )


def refuse_place(target: Path) -> None:
    """Raises if nothing can be written by this path, as far as that shows before it is tried."""
    refuse_suffix(target)
    parent = target.parent
    with writing(target):
        target_is_folder = os.path.isdir(target) and not os.path.islink(target)
        parent.stat()
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        # A folder that is replaced is moved, for which it must be writable itself.
        for folder in (parent, target) if target_is_folder else (parent,):
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
                raise PermissionError(number, f"{os.strerror(number)}: {folder}")
        longest = os.fsencode(f".{target.name}.{16 * '0'}.partial")
        if len(longest) > os.pathconf(parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def refuse_size(target: Path, nbytes: int) -> None:
    """Raises if the disk has not so many bytes left."""
    with writing(target):
        disk = os.statvfs(target.parent)
        free = disk.f_bavail * disk.f_frsize
        # Some file systems say nothing of their size.
        if disk.f_blocks and nbytes > free:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: it takes {nbytes} bytes, {free} are left",
            )


def replaced(target: Path, new: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """What goes and what stays where a folder is replaced by a checkpoint with these other files.

    Weights in any format go, and what belongs to them: indices, configuration and tokenizer.
    """
    names = sorted(os.listdir(target)) if target.is_dir() and not target.is_symlink() else []
    goes = [
        name
        for name in names
        if name in new
        or (not (target / name).is_dir() and (is_weights(name) or _SETTINGS.fullmatch(name)))
    ]
    return goes, [name for name in names if name not in goes]


def _is_checkpoint(folder: Path) -> bool:
    names = os.listdir(folder)
    return not names or any(name.endswith(".safetensors") for name in names)
