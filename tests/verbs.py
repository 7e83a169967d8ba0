"""Real verbs in processes of their own, forked from one that has imported everything: a verb starts in milliseconds.

Imported, it gives `Verbs`; run as a script it is the server: a line of JSON in starts `mirrorla` with these words, a
line out says how it ended.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__)
LIMIT_S = 120


class Ended:
    """How a verb ended.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        told: what it wrote.
    """

    def __init__(self, code, told):
        self.code, self.told = code, told

    @property
    def refusal(self):
        """The one line in which it was refused."""
        assert "Traceback" not in self.told, self.told
        (line,) = [line for line in self.told.splitlines() if line.startswith("mirrorla ")]
        return line


class Verbs:
    """Starts verbs; a context manager.

    Args:
        folder: for what they write.
    """

    def __init__(self, folder):
        self._log = folder / "verb.log"

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
        self._server = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        assert self._server.wait(30) == 0
        self._server.stdout.close()

    def __call__(self, *words, **environment):
        """Run `mirrorla` with these words; further arguments are variables of its environment."""
        order = {"words": [str(word) for word in words], "environment": environment, "log": str(self._log)}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return Ended(json.loads(self._server.stdout.readline()), self._log.read_text())


def run(order):
    """One verb; its process never comes back here."""
    from lightning_modules import cli

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    sys.argv = ["mirrorla", *order["words"]]
    code = 1
    try:
        code = cli.main(order["words"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    for name in ("datamodules.module", "lightning_modules.classification", "lightning_modules.training_cli"):
        importlib.import_module(name)

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(json.loads(line))
        began_s = time.monotonic()
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            time.sleep(0.005)
            if time.monotonic() - began_s > LIMIT_S:
                os.kill(pid, signal.SIGKILL)
        print(json.dumps(os.waitstatus_to_exitcode(ended[1])), flush=True)


if __name__ == "__main__":
    main()
