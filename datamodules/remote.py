"""Files at a URL through fsspec: which protocols are allowed, how a file is fetched, and errors without credentials."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.callbacks import Callback

from datamodules.types import DataError

PROTOCOLS = ("http", "https", "s3", "gs", "az", "abfs", "hdfs", "sftp", "file", "memory")
"""Plain storage only: fsspec's chained, archive and caching protocols, and anything that runs a command, stay out."""
RETRY_PAUSES_S = (1.0, 5.0)
_LOCAL_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_QUESTIONS = 16  # file sizes asked for at a time


def is_url(path: str) -> bool:
    """Whether a data path names something to fetch instead of a local folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None or "::" in path


def shown_path(path: str) -> str:
    """A data path for messages and names: a URL without user, password, query and fragment."""
    return RemoteFolder(path).shown() if is_url(path) else path


class TooLongError(Exception):
    """A file is longer than it may be."""


class _Limit(Callback):
    """Ends a transfer that brings more bytes than expected."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def relative_update(self, inc: int = 1) -> None:
        self.left -= inc
        if self.left < 0:
            raise TooLongError


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL.

    Attributes:
        url: may hold a user name, a password or a signed query, which no message repeats.
        timeout_s: a connection that is silent for so long is given up (http; other protocols have their own).

    Raises:
        DataError: a protocol that is not allowed.
    """

    url: str
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS or "::" in self.url:
            raise DataError(f"data.path protocol {self.protocol!r} is not allowed; use one of {', '.join(PROTOCOLS)}")

    @property
    def protocol(self) -> str:
        """What the URL begins with, in small letters."""
        return self.url.partition("://")[0].lower()

    def shown(self, name: str = "") -> str:
        """The URL of a file for messages: no user, password, query or fragment."""
        parts = urlsplit(self._join(name))
        shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        return shown if shown.isprintable() else repr(shown)

    def _join(self, name: str) -> str:
        parts = urlsplit(self.url)
        if not name:
            return self.url
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def _open(self, name: str) -> tuple[Any, str]:
        """The file system and the file's path in it; made for each use, since fsspec's do not survive a fork."""
        options: dict[str, Any] = {}
        if self.protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout_s, sock_read=self.timeout_s)
            # identity: a compressed answer could unfold to any length
            options = {
                "client_kwargs": {"timeout": timeout, "auto_decompress": False},
                "headers": {"Accept-Encoding": "identity"},
            }
        try:
            filesystem, path = fsspec.core.url_to_fs(self._join(name), **options)
        except ImportError as error:
            package = re.search(r"[Ii]nstall ['\"]?([a-z0-9-]+)", str(error))
            named = package[1] if package else f"the fsspec package for {self.protocol}"
            raise DataError(f"{self.shown()} needs {named}: pip install {named}") from None
        return filesystem, path

    def fetch(self, name: str, target: Path, most: int) -> None:
        """Copy a file into a local one, trying again after faults that may pass.

        Args:
            name: path below the folder.
            target: local file, overwritten; if it exists its inode is kept.
            most: more bytes than this are refused.

        Raises:
            DataError: in one line, for a missing file, no access, silence, a broken connection or too many bytes.
            OSError: the local disk is full or cannot be written.
        """
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                filesystem, path = self._open(name)
                filesystem.get_file(path, str(target), callback=_Limit(most))
                return
            except (FileNotFoundError, PermissionError, TooLongError) as error:
                raise self.error(name, error, most) from None
            except DataError:
                raise
            except Exception as error:  # each protocol has errors of its own
                if isinstance(error, OSError) and error.errno in _LOCAL_FAULTS:
                    raise
                if pause_s is None or _lasting(error):
                    raise self.error(name, error, most) from None
                time.sleep(pause_s)

    def error(self, name: str, error: Exception, most: int = 0) -> DataError:
        """What went wrong, without the texts of other libraries: they may repeat the whole URL."""
        status = getattr(error, "status", None)
        if isinstance(error, TooLongError):
            fault = f"is longer than the expected {most} bytes"
        elif isinstance(error, FileNotFoundError):
            fault = "was not found; check data.path"
        elif isinstance(error, PermissionError) or status in (401, 403):
            fault = "may not be read; check the credentials"
        elif isinstance(error, TimeoutError):
            fault = f"gave no answer within {self.timeout_s:g} s"
        elif isinstance(status, int):
            fault = f"was answered with HTTP status {status}"
        else:
            strerror = error.strerror if isinstance(error, OSError) else None
            fault = f"could not be fetched ({strerror or type(error).__name__})"
        return DataError(f"{self.shown(name)} {fault}")

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of files, None where the server does not say.

        Raises:
            DataError: naming the first file that is missing or cannot be asked for.
        """
        with ThreadPoolExecutor(_QUESTIONS) as pool:
            return list(pool.map(self._size, names))

    def _size(self, name: str) -> int | None:
        try:
            filesystem, path = self._open(name)
            size = filesystem.size(path)
        except DataError:
            raise
        except Exception as error:  # each protocol has errors of its own
            raise self.error(name, error) from None
        return None if size is None else int(size)


def _lasting(error: Exception) -> bool:
    """Whether trying again is in vain, because the server refuses the request itself."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
