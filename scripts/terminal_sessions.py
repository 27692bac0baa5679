"""Records terminal sessions as text: the chat, and clients of the API.

Everything is real: the chat is typed into a pseudo-terminal, and a client of the API prints what
the server sent. POSIX only.
"""

import html
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.local_server import ROOT, running

COLUMNS, ROWS = 100, 40
PATIENCE_S = 120.0  # for the next prompt; the first one comes when the model is loaded
CHAT_PROMPT = re.compile(r"(?:^|\n)[\w.-]+> \Z")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x07")
PROMPTED = re.compile(r"^((?:[\w.-]+>|\$) )(.+)$", re.MULTILINE)
API_PORT = 8000  # what the documentation types

ASK = """\
from openai import OpenAI

api = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
for model in ("{name}", "base"):
    stream = api.chat.completions.create(
        model=model,
        messages=[{{"role": "user", "content": "{question}"}}],
        stream=True,
        stream_options={{"include_usage": True}},
    )
    print(f"{{model}}: ", end="")
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print(f"  ({{chunk.usage.completion_tokens}} tokens)")
"""
CURL = """\
curl -sN http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{name}", "prompt": "{question}",
       "stream": true, "max_tokens": 4}}'"""

PAGE = """\
<!doctype html><meta charset="utf-8">
<style>
body {{ margin: 0; background: #fff; }}
#terminal {{ width: max-content; background: #1d2229; color: #d5dae1; border-radius: 8px; }}
#title {{ padding: 9px 16px; background: #2b323c; border-radius: 8px 8px 0 0; color: #aab3c0;
  font: 13px system-ui, sans-serif; }}
pre {{ margin: 0; padding: 14px 16px 16px; width: {columns}ch; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 14px/1.5 "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; }}
b {{ color: #7fc7a4; font-weight: normal; }}
i {{ color: #f2f4f7; font-style: normal; }}
</style>
<div id="terminal"><div id="title">{title}</div><pre>{text}</pre></div>
"""


def to_page(title: str, session: str) -> str:
    """Return a session as an HTML page whose #terminal is the window, prompts coloured.

    >>> '<b>$ </b><i>echo &lt;3</i>' in to_page("Demo", "$ echo <3")
    True
    """
    escaped = html.escape(session.strip("\n"), quote=False)
    text = PROMPTED.sub(r"<b>\1</b><i>\2</i>", escaped.replace("&gt; ", "> "))
    return PAGE.format(columns=COLUMNS, title=html.escape(title), text=text)


def record_chat(prefix: str, lines: Sequence[str]) -> str:
    """Return the output of `python -m ptuning chat` while lines are typed; the last one ends it.

    prefix is NAME=DIRECTORY, relative to the repository.
    """
    arguments = ["-m", "ptuning", "chat", "--prefix", prefix]
    keyboard, screen = pty.openpty()
    termios.tcsetwinsize(screen, (ROWS, COLUMNS))
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=_environment(),
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
    ) as chat:
        os.close(screen)
        shown = ""
        try:
            for line in lines:
                shown += _read_until_prompt(keyboard, shown)
                os.write(keyboard, f"{line}\r".encode())
            shown += _read_to_end(keyboard)
        finally:
            chat.terminate()
            os.close(keyboard)
    return f"$ python {' '.join(arguments)}\n{_as_seen(shown)}"


def record_api(prefix: str, question: str) -> str:
    """Return a session of a server and two clients: an openai script, and curl."""
    name = prefix.partition("=")[0]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        Path(folder, "ask.py").write_text(ASK.format(name=name, question=question), "utf-8")
        serve = ["serve", "--prefix", prefix]
        with running(serve, port=API_PORT, page="/health", said=log):
            log.seek(0)
            said = log.read().decode("utf-8")
            session = f"$ python -m ptuning {' '.join(serve)} &\n{_as_seen(said)}"
            curl = CURL.format(name=name, question=question)
            for command in ("cat ask.py", "python ask.py", curl):
                session += f"$ {command}\n{_run(command, folder)}"
    return session


def _run(command: str, folder: str) -> str:
    """Return the output of a shell command, which must succeed."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    said = done.stdout.decode("utf-8")
    if done.returncode != 0:
        raise SystemExit(f"{command}\nended with status {done.returncode}:\n{said}")
    return said


def _environment() -> dict[str, str]:
    """Return this process's environment with this Python first on PATH and no colours."""
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "TERM": "dumb", "LC_ALL": "C.UTF-8", "INPUTRC": os.devnull}


def _read_until_prompt(terminal: int, shown: str) -> str:
    """Return the output up to the next prompt; SystemExit if none appears."""
    new = b""
    deadline_s = time.monotonic() + PATIENCE_S
    while not CHAT_PROMPT.search(_as_seen(new.decode("utf-8", "replace"))):
        ready, _, _ = select.select([terminal], [], [], max(deadline_s - time.monotonic(), 0))
        piece = _read(terminal) if ready else b""
        if not piece:
            raise SystemExit(f"the chat gave no prompt; it said:\n{shown}{new.decode()}")
        new += piece
    return new.decode("utf-8")


def _read_to_end(terminal: int) -> str:
    pieces = []
    while piece := _read(terminal):
        pieces.append(piece)
    return b"".join(pieces).decode("utf-8")


def _read(terminal: int) -> bytes:
    """Return some bytes, none at the end (where Linux reports an error)."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def _as_seen(shown: str) -> str:
    """Return what remains on the screen: of an overwritten line, its last version.

    >>> _as_seen("50%\\r100%\\r\\nready\\r\\n")
    '100%\\nready\\n'
    """
    lines = CONTROL.sub("", shown).split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
