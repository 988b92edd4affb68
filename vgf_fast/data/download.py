"""Downloads that an interruption costs nothing: they go on where they stopped, and are checked for their size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from vgf_fast.progress import progress_bar

if TYPE_CHECKING:
    from http.client import HTTPResponse

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
CHUNK_BYTES = 2**20


def download(url: str, file: Path, progress: bool = True) -> Path:
    """Download to ``file``, going on with what an interrupted download left beside it.

    Raises ``ConnectionError`` when the server is away, or sends another number of bytes than it said.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    have = part.stat().st_size if part.is_file() else 0
    advice = f"get {url} elsewhere and put it at {file}, or give its path or a mirror's address"
    try:
        answer, have = _request(url, have)
        with answer:
            length = answer.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            with (
                part.open("ab" if have else "wb") as out,
                progress_bar(f"downloading {file.name}", -(-(total or 0) // CHUNK_BYTES), progress) as advance,
            ):
                advance(have // CHUNK_BYTES)
                while chunk := answer.read(CHUNK_BYTES):
                    out.write(chunk)
                    advance()
    except (URLError, ConnectionError, TimeoutError, OSError) as error:
        raise ConnectionError(f"{url} could not be downloaded ({error}): {advice}") from error
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise ConnectionError(f"{url} ended after {size} of {total} bytes: call again to go on, or {advice}")
    os.replace(part, file)
    return file


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
