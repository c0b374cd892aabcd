"""Many commands and snippets without importing torch for each: all are processes forked from one that did so once."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# What the process does that all commands are forked from. A command ends with its exit status, as a byte. The words
# of a Python snippet are "snippet" and its code.
SERVER = """
import json, os, signal, socket, sys
import open_clip
import finealign.classifier, finealign.run.adapt, finealign.run.report
from finealign.cli import main
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen(64)
print("ready", flush=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    asked, _ = listening.accept()
    if os.fork():
        asked.close()
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listening.close()
    with asked.makefile("r") as lines:
        message, streams, _, _ = socket.recv_fds(asked, 1, 3)
        told = json.loads(lines.readline())
    if command := os.fork():
        for stream in streams:
            os.close(stream)
        asked.sendall(f"{command}\\n".encode())
        _, ended = os.waitpid(command, 0)
        asked.sendall(bytes([os.waitstatus_to_exitcode(ended) % 256]))
        os._exit(0)
    asked.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in more if path and path not in sys.path]
    sys.argv = told["words"]
    status = 1
    try:
        if sys.argv[0] == "snippet":
            exec(compile(sys.argv.pop(1), "snippet", "exec"), {"__name__": "__main__"})
        else:
            main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking torch apart takes longer than most commands
"""
# The end of a script that has such a command run with its words, streams, folder and environment, and hands on signals.
CLIENT = """
import json, os, signal, socket
asked = socket.socket(socket.AF_UNIX)
asked.connect({address!r})
socket.send_fds(asked, [b"."], [0, 1, 2])
told = dict(words=sys.argv, folder=os.getcwd(), environment=dict(os.environ))
asked.sendall((json.dumps(told) + "\\n").encode())
with asked.makefile("rb", buffering=0) as answers:
    command = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(command, number))
    sys.exit((answers.read(1) or b"\\x01")[0])
"""


@contextmanager
def forking(first: str = "") -> Iterator[str]:
    """The address of such a process, which begins with this code and ends with the block."""
    with (
        tempfile.TemporaryDirectory() as folder,  # a short path, as a socket wants
        subprocess.Popen(
            [sys.executable, "-c", first + SERVER, address := f"{folder}/socket"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as server,
    ):
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield address
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # with what of its commands is left
