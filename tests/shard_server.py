"""A real HTTP server on loopback that serves a folder and can be told to fail as servers do; and a client process."""

import contextlib
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from webdataset.writer import TarWriter

from datamodules.cache import ShardCache
from datamodules.index import ShardIndex
from datamodules.indexer import index_dataset
from datamodules.reader import ShardReader
from datamodules.remote import RemoteFolder
from datamodules.types import DataError

SHARDS, SAMPLES = 6, 4
IMAGE_BYTES = 20_000  # so that a shard takes about 90 kB


class FaultyServer:
    """Serves `folder` at `url`; `faults` maps a path's end to a list of faults, one for each coming GET.

    Faults: "break" (half of the bytes, then the connection ends), "status 503", "hang" (headers, then silence), "slow"
    (small pieces), "flip" (one wrong bit), "page" (an HTML page with status 200), "endless" (no length, no end).
    """

    def __init__(self, folder):
        self.faults = {}
        self.gets = []
        self.released = threading.Event()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(folder))

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                path = self.path.partition("?")[0]
                server.gets.append(path)
                fault = next((rest.pop(0) for end, rest in server.faults.items() if path.endswith(end) and rest), None)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.answer(fault, path)

            def answer(self, fault, path):
                if fault is None:
                    super().do_GET()
                    return
                if fault.startswith("status"):
                    self.send_error(int(fault.split()[1]))
                    return
                data = (folder / path.lstrip("/")).read_bytes()
                if fault == "flip":
                    data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
                if fault == "page":
                    data = b"<html>log in first</html>"
                self.send_response(200)
                if fault != "endless":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.send_body(fault, data)

            def send_body(self, fault, data):
                if fault == "break":
                    self.wfile.write(data[: len(data) // 2])
                elif fault == "hang":
                    server.released.wait(30)
                elif fault == "slow":
                    for start in range(0, len(data), 4096):
                        self.wfile.write(data[start : start + 4096])
                        time.sleep(0.02)
                elif fault == "endless":
                    while not server.released.is_set():
                        self.wfile.write(bytes(1 << 16))
                else:
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self):
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def write_dataset(folder):
    """The dataset as it lies on a server."""
    (folder / "train").mkdir(parents=True)
    for shard in range(SHARDS):
        with (
            (folder / "train" / f"s{shard}.tar").open("wb") as stream,
            TarWriter(stream, encoder=False, mtime=0) as writer,
        ):
            for sample in range(SAMPLES):
                image = bytes([shard, sample]) * (IMAGE_BYTES // 2)
                writer.write({"__key__": f"k{shard}{sample}", "jpg": image, "cls": b"%d" % sample})
    index_dataset(folder)
    return folder


def shard_bytes(folder):
    return (folder / "train" / "s0.tar").stat().st_size


def cache_of(url, tmp_path, limit=1 << 30, timeout_s=5.0):
    return ShardCache(RemoteFolder(url, timeout_s), tmp_path / "cache", limit)


def open_train(cache):
    info = cache.describe()
    index = cache.open_index("train", info.splits["train"].digest)
    index.check_shards()
    return index


def expected(folder):
    return contents(ShardIndex(folder / "train"))


def files(tmp_path, pattern="*/*/*.tar"):
    return sorted(path.name for path in (tmp_path / "cache").glob(pattern))


def contents(index):
    reader = ShardReader(index)
    return [reader.read(sample, ("jpg", "cls")).fields for sample in range(len(index))]


def read_in_process(cache, digest, seconds, queue):
    """Read all samples again and again; reports every different content read, and an error if there was one."""
    index = cache.open_index("train", digest)
    deadline = time.monotonic() + seconds
    seen = set()
    try:
        while time.monotonic() < deadline:
            seen.add(tuple(fields["jpg"][:2] for fields in contents(index)))
    except DataError as error:
        seen.add(str(error))
    queue.put(seen)
