"""Files that are whole or not there, whatever kills the process that writes them."""

import contextlib
import os
import platform
import re
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.pictures import digest


@contextlib.contextmanager
def written_aside(file: Path) -> Iterator[Path]:
    """A path of this process's own to write to: whole, it becomes `file` at a stroke; after an error it goes."""
    partial = file.with_name(f"{file.name}.{_host()}.{os.getpid()}.{os.environ.get('RANK', 0)}.partial")
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())  # or a crash of the machine could leave the name without the bytes
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def opened_whole(file: Path) -> Iterator[safe_open]:
    """A file of a cache; ValueError for one that is broken."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is broken ({error}): delete it and start again, which computes it anew") from None


def save_whole(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a file of a cache aside; ValueError where there is no room for it."""
    try:
        with written_aside(file) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be written ({error}): make room; what is cached already is kept") from None


ASIDE = re.compile(r".+\.(?:safetensors|json|npy|png)\.(?P<host>.+)\.(?P<process>\d+)\.\d+\.partial")
DEAD = 24 * 3600  # seconds since its last change after which a file of another machine is nobody's any more


def remove_dead(*folders: Path) -> None:
    """Removes from these folders what `written_aside` left in a process that was killed: files of this machine's
    processes that are no longer there, and of other machines' those that nobody has written to for a day."""
    for file in (file for folder in folders for file in folder.glob("*.partial")):
        if not (name := ASIDE.fullmatch(file.name)):
            continue  # somebody else's
        with contextlib.suppress(OSError):  # another start removes it, or it is not ours to remove
            if _kernel() and name["host"] == _host():
                dead = not _runs(int(name["process"]))
            else:
                dead = time.time() - file.stat().st_mtime > DEAD
            if dead:
                file.unlink()


def _host() -> str:
    return f"{platform.node()}-{_kernel()}"


@lru_cache
def _kernel() -> str:
    """Tells apart machines and containers of one name, each of which numbers its own processes; "": nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return digest(boot, str(os.stat("/proc/self/ns/pid").st_ino))[:8]
    except OSError:
        return ""


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, and is somebody else's
        return True
    return True
