"""A child process that answers requests, can be killed, and reports its bugs to the parent.

    class Echo(ChildProcess):
        program = ("-m", "echo")        # runs serve(lambda request, _: [{"said": request["say"]}])

    with Echo() as child:
        child.ensure_running()
        with child.exchange({"say": "a"}):
            child.receive()                 # {"said": "a"}

A request is one JSON line on the child's stdin, an answer one or more on its stdout. `VideoError`
travels as `{"error": its arguments}`, and so do disk errors and lack of memory; any other exception
comes back with its traceback as a `ChildBug`. Linux only.
"""

# `subprocess`, not `multiprocessing`: workers of a data loader are daemonic and may not start children
# through the latter, and a fresh interpreter starts without torch.

import errno
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, NoReturn

from preprocess.decode.scan import VideoError
from shards.format.quarantine import Reason
from shards.signed import Json

POLL_SECONDS = 0.05
ROOT = Path(__file__).resolve().parents[2]


class ChildBug(Exception):
    """A bug in a child process: its text is the child's traceback."""


class ChildDied(Exception):
    """The child ended without an answer; the text gives its exit code or signal, and its last output."""


class ChildProcess(ExitStack):
    """One child process, started at the first request and restarted after it had to be killed.

    The stack holds the resources of a running child: closing it kills the child and frees them.
    """

    program: ClassVar[tuple[str, ...]]
    """Arguments of Python, such as `-m package.module`."""

    def __init__(self) -> None:
        super().__init__()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def ensure_running(self) -> None:
        """Start the process if none runs; one that died while idle is replaced without an error."""
        if self._process and self._process.poll() is not None:
            self.close()
        if not self._process:
            self.start()

    def interrupt(self) -> None:
        """Kill the process; called from another thread than the one that waits for its answer."""
        process = self._process
        if process:
            process.kill()

    def start(self) -> None:
        """Start the process; subclasses that pass it more than stdin and stdout override this."""
        self._spawn()

    def watch(self) -> None:
        """Raise if the answer is overdue; called every `POLL_SECONDS` while waiting."""

    @contextmanager
    def exchange(self, request: Json) -> Iterator[None]:
        """Send a request to a child that is ready; its answers are received inside.

        Whatever is raised inside kills the child, Ctrl-C too: a half-read answer must not meet the
        next request.
        """
        try:
            self.send(request)
            yield
        except BaseException:
            self.close()
            raise
        os.lseek(self._stderr, 0, os.SEEK_SET)  # the child's position too
        os.ftruncate(self._stderr, 0)

    def send(self, request: Json) -> None:
        """Send a line to the child, inside an exchange."""
        assert self._process
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> Json:
        """Return the child's next answer. Raises ChildBug, ChildDied, and what `watch` raises."""
        assert self._process
        assert self._process.stdout
        while b"\n" not in self._unread:
            # with a timeout: a hanging child sends nothing, and only its CPU time says so
            if not select.select([self._process.stdout], [], [], POLL_SECONDS)[0]:
                self.watch()
                continue
            received = os.read(self._process.stdout.fileno(), 1 << 20)
            if not received:
                raise self._death()
            self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        answer: Json = json.loads(line)
        if "bug" in answer:
            raise ChildBug(answer["bug"])
        return answer

    def _spawn(self, words: Sequence[str] = (), files: Sequence[int] = ()) -> None:
        """Start the process. files: descriptors that it inherits."""
        # a file, not a pipe: FFmpeg may write more than a pipe holds, and would
        # wait for a reader for ever
        self._stderr = os.memfd_create("framebank-stderr")
        self.callback(os.close, self._stderr)
        inherited = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            # -P: a folder called `shards` in the working directory must not be imported
            [sys.executable, "-P", *self.program, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            pass_fds=files,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])},
            start_new_session=True,  # so that Ctrl-C reaches only the parent, which then ends the child
        )
        self.callback(self._kill)
        self._unread = b""

    def _kill(self) -> None:
        assert self._process
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe
            pipe.close()

    def _death(self) -> ChildBug | ChildDied:
        """Return the error that explains why the child will not answer."""
        assert self._process
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:  # it closed its stdout and lives on
            code = 0
        size = os.fstat(self._stderr).st_size
        said = os.pread(self._stderr, 20_000, max(0, size - 20_000)).decode(errors="replace")
        if code == 1:  # Python's exit code after an exception, for example a missing module
            return ChildBug(said)
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        last = " | ".join(said[-2000:].split("\n")[-4:]).strip(" |") or "nothing"
        return ChildDied(f"({how}); its last words: {last}")


def serve(answers: Callable[[Json, Callable[[], Json]], Iterable[Json]]) -> NoReturn:
    """Answer requests until stdin closes: the child's side.

    answers: returns the answers to a request; its second argument returns the next line that the
    parent sends. An exception ends the request, not the process.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output that a library prints must not be taken for an answer
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        try:
            for answer in answers(request, lambda: json.loads(requests.get())):
                print(json.dumps(answer), file=replies)
            continue
        except VideoError as error:
            answer = {"error": error.args}
        except (OSError, MemoryError) as error:
            answer = {"error": _machine_error(error, request.get("path")).args}
        # the child lives on: a bug with one clip says nothing of the next one
        except Exception:
            answer = {"bug": f"with {json.dumps(request)}\n{traceback.format_exc()}"}
        print(json.dumps(answer), file=replies)


def _machine_error(error: OSError | MemoryError, where: object) -> VideoError:
    """Return the VideoError for a clip whose reading failed by the disk or for lack of memory."""
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        fix = "try again with more memory"
        return VideoError(Reason.DECODER_CRASHED, "out of memory", where=where, fix=fix)
    return VideoError(Reason.CANNOT_OPEN, str(error), where=where, fix="check the disk")


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Queue the parent's lines; end the process as soon as the parent has ended."""
    # In a thread, because a decoder in an endless loop never returns to read stdin; it releases the GIL.
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)
