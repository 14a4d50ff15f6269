"""A bank on a web server: what servers do with ranges, errors and files that are replaced.

fsspec's own `http` is tried where aiohttp is installed; a small file system on urllib always is.
"""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem

from shards import storage
from shards.errors import UserError
from shards.read.bank import Bank, DamagedSample
from tests.shards.test_storage import CLIPS, MakeBank


class Web(AbstractFileSystem):  # type: ignore[misc]
    """`web://host/path`: HTTP by urllib."""

    protocol = "web"

    def _ask(self, path: str, method: str, **headers: str) -> Any:
        try:
            url = f"http://{self._strip_protocol(path)}"
            with urlopen(Request(url, method=method, headers=headers)) as answer:
                return answer.headers, answer.read()
        except HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(path) from None
            raise

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        part = {} if start is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        return bytes(self._ask(path, "GET", **part)[1])

    def info(self, path: str) -> dict[str, Any]:
        headers, _ = self._ask(path, "HEAD")
        size = headers["Content-Length"]
        return {"size": size and int(size), "changed": headers["Last-Modified"]}


class Handler(SimpleHTTPRequestHandler):
    """Answers as Python's own server, which knows no ranges, and as others do."""

    protocol_version = "HTTP/1.1"
    does: ClassVar[str] = "ranges"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        shard = path.suffix == ".tar"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.does == "no length" and path.is_file():
            self.do_HEAD()
            self.wfile.write(path.read_bytes())
            return None
        if not path.is_file() or not asked or self.does == "no ranges":
            return super().do_GET()
        if self.does in ("403", "500") and shard:
            return self.send_error(int(self.does))
        data, begin = path.read_bytes(), int(asked[1])
        if begin >= len(data):
            return self.send_error(416)
        part = data[begin : int(asked[2] or len(data)) + 1]
        if self.does == "answers in part":
            part = part[:7]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.does == "cuts short" and shard:
            part, self.close_connection = part[: len(part) // 2], True
        self.wfile.write(part)
        return None

    def do_HEAD(self) -> None:
        if self.does != "no length":
            return super().do_HEAD()
        self.send_response(200)
        self.send_header("Connection", "close")
        return self.end_headers()


@pytest.fixture(scope="module")
def folder(make_bank: MakeBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = list(CLIPS.items())
    return make_bank(tmp_path_factory.mktemp("web") / "bank", dict(items[:1]), dict(items[1:]))


@pytest.fixture(
    params=[
        "web",
        pytest.param(
            "http", marks=pytest.mark.skipif(not find_spec("aiohttp"), reason="needs aiohttp")
        ),
    ]
)
def url(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A copy of the bank at `tmp_path / "bank"`, served."""
    shutil.copytree(folder, tmp_path / "bank")
    fsspec.register_implementation("web", Web, clobber=True)
    monkeypatch.setattr(Handler, "does", "ranges")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"{request.param}://127.0.0.1:{server.server_port}/bank"
    server.shutdown()
    server.server_close()


def same(bank: Bank) -> bool:
    return all(
        np.array_equal(bank.read(row, stride, [3, 1]), CLIPS[id_][stride][[3, 1]])
        for row, id_ in enumerate(bank.ids)
        for stride in bank.strides
    )


@pytest.mark.parametrize("does", ["ranges", "answers in part"])
def test_a_bank_is_read_from_servers_that_know_ranges(
    url: str, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "does", does)
    bank = Bank.open(url)
    assert same(bank)
    assert same(bank), "by the frame, after the first touch"
    assert bank.meta(2).id == bank.ids[2]
    assert bank.files.read("shards/bank-000000.tar", 1 << 30, 5) == b""
    assert bank.files.read("bank.json", 7) == bank.files.read("bank.json")[7:]


@pytest.mark.parametrize(
    ("does", "error", "said"),
    [
        ("no ranges", UserError, "ignores ranges of bytes"),
        ("403", OSError, "403"),
        ("500", OSError, "500"),
        ("cuts short", OSError, "bank-000000.tar: "),
    ],
)
def test_what_a_server_cannot_do_is_one_line_that_names_the_file(
    url: str, does: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank.open(url)
    monkeypatch.setattr(Handler, "does", does)
    for read in (partial(bank.read, 0, 4), partial(bank.meta, 0)):
        with pytest.raises(error, match=re.escape(said)) as caught:
            read()
        assert str(caught.value).startswith(f"{url}/shards/bank-000000.tar: ")
        assert not isinstance(caught.value, HTTPException)


def test_a_server_that_tells_no_length_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "does", "no length")
    with pytest.raises(UserError, match="does not say how long it is"):
        Bank.open(url)


@pytest.mark.parametrize("at", ["url", "folder", "file"])
def test_a_shard_that_is_replaced_under_an_open_bank_never_gives_other_bytes(
    url: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LOOK_AGAIN", 0.0)
    monkeypatch.setattr(storage, "MOST_OPEN", 1)
    place = {"url": url, "folder": str(tmp_path / "bank"), "file": f"file://{tmp_path}/bank"}[at]
    bank = Bank.open(place)
    assert same(bank)
    shard = tmp_path / "bank/shards/bank-000000.tar"
    was = shard.read_bytes()
    begin = int(bank.columns["stride4_offset"][0])

    def replaced(data: bytes, later: int) -> None:
        new = shard.with_suffix(".new")
        new.write_bytes(data)
        # HTTP tells times in whole seconds
        os.utime(new, (shard.stat().st_mtime + later,) * 2)
        new.replace(shard)

    replaced(was, later=2)
    assert same(bank), "another copy of the same bytes"
    replaced(was[:begin] + bytes(80) + was[begin + 80 :], later=4)
    with pytest.raises(DamagedSample, match="checksum does not match"):
        same(bank)
    replaced(was[: begin + 8], later=6)
    bank.read(1, 4)  # another shard: a local one is closed for it
    with pytest.raises(DamagedSample, match="ends early"):
        bank.read(0, 4)
    replaced(was, later=8)
    bank.read(1, 4)
    assert same(bank)
