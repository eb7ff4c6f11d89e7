"""Places that results go to, tried before any work starts: a run must not end in what it could have known."""

import tempfile
from pathlib import Path


def check_folder(path: str | Path, setting: str = "output_dir") -> Path:
    """The folder, with ``~`` spelled out, that files can be written into. It need not be there yet, and is not made.

    A file is written to see, in the folder or in the nearest one above that is there: permissions alone tell nothing of
    read-only file systems, quotas, or a user who may do everything.

    Raises:
        ValueError: it is a file, or files cannot be written into it.
    """
    folder = Path(path).expanduser()
    _try_to_write(folder, f"{setting}={str(path)!r}")
    return folder


def check_file(path: str | Path, setting: str) -> Path:
    """The file, with ``~`` spelled out, that can be written, in a folder that need not be there yet.

    Raises:
        ValueError: it is a folder, or cannot be written.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{setting}={str(path)!r} is a folder; allowed: a file")
    _try_to_write(file.parent, f"{setting}={str(path)!r}")
    return file


def _try_to_write(folder: Path, given: str) -> None:
    here = folder.absolute()
    while not here.exists() and here != here.parent:
        here = here.parent
    if not here.is_dir():
        raise ValueError(f"{given}: {here} is a file; allowed: a folder, or one to be made")
    try:
        with tempfile.TemporaryFile(dir=here) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise ValueError(f"{given}: cannot write into {here}: {error.strerror}") from None
