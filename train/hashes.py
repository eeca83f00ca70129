"""Hashes of files, remembered: a set is read whole the first time only."""

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from train.aside import written_aside
from train.pictures import file_hash

REMEMBERED = "hashes.json"  # in the cache's folder: path -> (size, time of change in ns, hash)
SETTLED = 2.0  # seconds since its last change after which a file's time of change tells of the next one


class FileHashes:
    """SHA-256 of files; with a folder, those whose size and time of change are as they were are not read again."""

    def __init__(self, folder: Path | None = None):
        self.file = folder / REMEMBERED if folder else None
        self.known: dict[str, list] = {}
        if self.file and self.file.is_file():
            with contextlib.suppress(ValueError, OSError):  # then everything is read anew
                self.known = json.loads(self.file.read_text())

    def of(self, files: Iterable[Path]) -> list[str]:
        """The hash of each file; what is new is written down."""
        found, changed = [], False
        for file in files:
            path, stat = str(file.absolute()), file.stat()
            known = self.known.get(path)
            if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
                known = [stat.st_size, stat.st_mtime_ns, file_hash(file)]
                if time.time() - stat.st_mtime > SETTLED:
                    self.known[path] = known
                    changed = True
            found.append(known[2])
        if self.file and changed:
            with contextlib.suppress(OSError):  # then the next start reads the files again
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with written_aside(self.file) as partial:
                    partial.write_text(json.dumps(self.known))
        return found
