"""Programs that may hang, crash or talk without end: each is run until it ends or its time is over."""

import json
import os
import pathlib
import signal
import subprocess
import threading
import time
from typing import NamedTuple

# A process that takes longer than this hangs.
LONGEST = 300
# A process that says more than this is ended.
MOST_SAID = 8 << 20
# tests/gpu/watchdog.rs: the GPU hangs; it answers with errors alone.
HANGS, BROKEN = 71, 70


class Done(NamedTuple):
    """How a process ended. `status`: the exit status, minus the signal, or none if it was stopped."""

    status: int | None
    out: str
    err: str
    stopped: str = ""

    def reason(self):
        if self.status is None:
            return f"stopped, {self.stopped}"
        said = (self.err.strip() or self.out.strip() or "it said nothing").splitlines()
        return f"status {self.status}: {said[-1][:500]}"


class Stream(threading.Thread):
    """Collects what a process says, and hands on each whole line."""

    def __init__(self, file, on_line=None):
        super().__init__(daemon=True)
        self.file, self.on_line = file, on_line
        self.said, self.rest, self.full, self.error = bytearray(), b"", threading.Event(), None
        self.start()

    def run(self):
        while chunk := os.read(self.file.fileno(), 1 << 16):
            if len(self.said) + len(chunk) > MOST_SAID:
                self.full.set()
                return
            self.said += chunk
            if self.on_line:
                *lines, self.rest = (self.rest + chunk).split(b"\n")
                for line in lines:
                    self.hand_on(line.decode(errors="replace"))

    def hand_on(self, line):
        try:
            self.on_line(line)
        except Exception as error:  # reading goes on, or the process would wait for its pipe
            self.error = self.error or error

    def text(self):
        self.join(2)  # a grandchild may hold the pipe open
        return self.said.decode(errors="replace")


class Runner:
    """Runs programs in one folder and environment, and logs what they said."""

    def __init__(self, folder, environment, log):
        self.folder, self.environment, self.log = folder, environment, log

    def run(self, command, until, limit=LONGEST, on_line=None, **environment):
        command = [str(word) for word in command]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        out, err = Stream(process.stdout, on_line), Stream(process.stderr)
        end, status, stopped = min(until, time.monotonic() + limit), None, "out of time"
        while status is None:
            if out.full.is_set() or err.full.is_set():
                stopped = f"it said more than {MOST_SAID >> 20} MiB"
                break
            try:
                status = process.wait(max(0, min(0.2, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    break
        # Whatever it has started goes with it.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        done = Done(status, out.text(), err.text(), stopped)
        self.log(f"\n$ {' '.join(command)}\n{ends(done.out)}{ends(done.err)}status: {done.status}\n")
        if out.error:
            raise out.error
        return done


def ends(text, most=20_000):
    """Both ends of a long text."""
    return text if len(text) <= most else text[: most // 2] + "\n[...]\n" + text[-most // 2 :]


def event(line):
    """The JSON object that a line is, if it is one and whole."""
    if line.startswith("{"):
        try:
            value = json.loads(line)
            return value if isinstance(value, dict) else None
        except json.JSONDecodeError:
            pass
    return None


def events(text):
    return [found for line in text.splitlines() if (found := event(line)) is not None]


def libraries():
    """Where CUDA's libraries may be: those that came with PyTorch, the toolkit's, the driver's."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    try:
        import nvidia

        folders += sorted(str(lib) for base in nvidia.__path__ for lib in pathlib.Path(base).glob("*/lib"))
    except ImportError:
        pass
    folders += ["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/local/cuda/compat"]
    return [folder for folder in folders if folder and os.path.isdir(folder)]
