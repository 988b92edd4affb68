"""Downloads that an interruption costs nothing: they go on where they stopped, and are checked for their size."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vgf_fast.common.progress import progress_bar
from vgf_fast.data.writing import is_open_at, wait

if TYPE_CHECKING:
    from http.client import HTTPResponse

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
CHUNK_BYTES = 2**20


def download(url: str, file: Path, progress: bool = True) -> Path:
    """Download to ``file``, going on with what an interrupted download of ``url`` left beside it.

    A call at the same time waits, and takes the file of the first one. Raises ``ConnectionError`` when the server is
    away, or sends another number of bytes than it said, and ``OSError`` when the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # What one address began is not another's to go on with.
    part = file.with_name(f"{file.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
    while True:
        with part.open("ab") as out:
            wait(out.fileno())
            # Whoever held the lock may have finished, and renamed what is open here.
            if is_open_at(out.fileno(), part):
                try:
                    if not file.is_file():
                        _download(url, file, out, progress)
                        os.replace(part, file)
                    return file
                finally:
                    if os.fstat(out.fileno()).st_size == 0:
                        part.unlink(missing_ok=True)


def _download(url: str, file: Path, out: BinaryIO, progress: bool) -> None:
    """Add what ``out`` lacks of the file at ``url``."""
    advice = f"get {url} elsewhere and put it at {file}, or give its path or a mirror's address"
    have = out.seek(0, os.SEEK_END)
    try:
        answer, have = _request(url, have)
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{url} could not be downloaded ({error}): {advice}") from error
    length = answer.headers.get("Content-Length")
    total = None if length is None else have + int(length)
    out.truncate(have)
    with answer, progress_bar(f"downloading {file.name}", -(-(total or 0) // CHUNK_BYTES), progress) as advance:
        advance(have // CHUNK_BYTES)
        free = shutil.disk_usage(file.parent).free
        if total is not None and total - have > free:
            missing = (total - have - free) / 2**30
            raise OSError(errno.ENOSPC, f"takes {total / 2**30:.3g} GiB: {missing:.3g} GiB are missing", str(file))
        while True:
            try:
                chunk = answer.read(CHUNK_BYTES)
            except (OSError, HTTPException) as error:
                raise ConnectionError(f"{url} could not be downloaded ({error}): {advice}") from error
            if not chunk:
                break
            out.write(chunk)
            advance()
        out.flush()
    size = os.fstat(out.fileno()).st_size
    if total is not None and size != total:
        if size > total:
            out.truncate(0)
        raise ConnectionError(f"{url} ended after {size} of {total} bytes: call again to go on, or {advice}")


def _request(url: str, have: int) -> tuple[HTTPResponse, int]:
    """The answer, and how many of its file's bytes come before it: none if the server does not go on."""
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urlopen(request, timeout=DOWNLOAD_TIMEOUT)
    except HTTPError as error:
        # 416: there is nothing after what we have, so it is another file's, or whole already.
        if have and error.code == 416:
            return urlopen(Request(url), timeout=DOWNLOAD_TIMEOUT), 0
        raise
    return answer, have if answer.status == 206 else 0
