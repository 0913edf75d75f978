"""Small programming problems, and how what a model wrote for them is run: pass@1.

A problem is a function's head with its docstring, and assertions that the finished function has to pass. What a model
wrote runs in a process of its own, in an empty folder that is thrown away, with a few seconds of processor time, limited
memory and no environment; it can write no file, start no process and open no connection. That holds back a mistake, such as
an endless loop or a file deleted by accident; it is no prison for a program that means harm.
"""

import ast
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import ClassVar

ASKED = "Complete this Python function. Answer with the whole function in one block of code, and nothing else.\n\n"
BLOCK = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)```", re.DOTALL)
SECONDS, MEMORY = 5, 1 << 30  # of processor time and of addresses, for one answer
PASSED = 41  # exit code of a program that came to its end: one that leaves early by itself has another
FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.remove", "os.rename", "os.rmdir",
    "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.", "socket.", "ctypes.", "pty.", "signal.",
)  # fmt: skip
RUNNER = f"""
import os, resource, sys
for limit, most in ((resource.RLIMIT_CPU, {SECONDS}), (resource.RLIMIT_AS, {MEMORY}), (resource.RLIMIT_FSIZE, 0)):
    resource.setrlimit(limit, (most, most))
def refuse(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith({FORBIDDEN!r}):
        raise PermissionError(event)
program = sys.stdin.read()
sys.addaudithook(refuse)
exec(compile(program, "answer", "exec"), {{"__name__": "answer"}})
raise SystemExit({PASSED})
"""


@dataclasses.dataclass(frozen=True)
class CodeProblem:
    """The head and docstring of a function, and assertions about it."""

    end: ClassVar[re.Pattern] = BLOCK
    shots: ClassVar[int] = 0
    question: str
    tests: str

    @classmethod
    def checked(cls, question: str, tests: str) -> "CodeProblem":
        """`SyntaxError` where the two are not a function's head and Python that follows it."""
        ast.parse(f"{question}\n    pass\n\n{tests}")
        return cls(question, tests)

    def messages(self, examples: Sequence["CodeProblem"]) -> list[dict[str, str]]:
        assert not examples
        return [{"role": "user", "content": f"{ASKED}```python\n{self.question}\n```"}]

    def final(self, text: str) -> str:
        """The program that an answer holds: its first block of code, else all of it."""
        found = BLOCK.search(text)
        return (found.group(1) if found else text).strip()

    def solved(self, text: str) -> bool:
        """Whether the program that an answer holds passes all assertions."""
        program = self.final(text)
        try:
            ast.parse(program)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        return runs(f"{program}\n\n{self.tests}")


def runs(program: str) -> bool:
    """Whether a Python program runs to its end, within the limits that this module's first lines name."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-c", RUNNER], input=program, cwd=folder, env={}, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=3 * SECONDS, check=False, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == PASSED
