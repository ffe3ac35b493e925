"""``minigpt5 COMMAND``: every command is found, helps with examples and ends as it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commands import serve
from minigpt5_jax import __main__ as line

ROOT = Path(__file__).parents[1]
KNOWN = sorted(line.commands())


@pytest.fixture(scope="module")
def minigpt5(tmp_path_factory):
    """The command in a process of its own, most of which is imported once."""
    code = "from minigpt5_jax.__main__ import main\nsys.argv[0] = 'minigpt5'\nmain()"
    yield from serve(tmp_path_factory.mktemp("said"), "minigpt5_jax.wiring.generation", code)


def test_commands_are_the_files_that_can_be_run(tmp_path, monkeypatch):
    assert {"train", "generate", "chat", "evaluate", "prepare", "convert", "export", "plan", "demo"} <= {
        *KNOWN
    }
    assert not {"cli", "minigpt5", "batch", "__main__"} & {*KNOWN}
    (tmp_path / "diagnose.py").write_text(
        '"""Look at a run.\n\nMore."""\nif __name__ == "__main__":\n    1\n'
    )
    (tmp_path / "helper.py").write_text('"""None."""\n')
    monkeypatch.setattr(line, "__file__", str(tmp_path / "__main__.py"))
    assert "diagnose   Look at a run." in line.overview(line.commands()), "a new file needs no entry"
    assert [*line.commands()] == ["diagnose"]


def test_the_overview_needs_no_jax():
    code = "import sys; sys.argv = ['minigpt5', '--help']; from minigpt5_jax.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and all(f"\n    {name} " in done.stdout for name in KNOWN)
    assert "| jax\n" not in done.stderr
    assert "minigpt5 chat --checkpoint shapes" in done.stdout


@pytest.mark.parametrize("name", KNOWN)
def test_help_has_examples_and_succeeds(name, minigpt5):
    done = minigpt5(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m minigpt5_jax.{name} " in done.stdout and "flags:" in done.stdout


def test_words_are_passed_on(minigpt5, tmp_path):
    done = minigpt5("generate", "--checkpoint=/no/such/run", "--prompt=a", f"--output={tmp_path / 'page'}")
    assert done.returncode == 1 and "error: no complete checkpoint in /no/such/run" in done.stderr
    done = minigpt5("story", f"--checkpoint={tmp_path}", f"--output={tmp_path / 'page'}")
    assert done.returncode == 1 and not done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'? `minigpt5 --help` lists them"),
        (["export", "more"], "error: unexpected arguments: more"),
        (["chat"], "error: give a model: --checkpoint shapes"),
        (["chat", "--checkpoint=someone/fox"], "hf download someone/fox"),
    ],
)
def test_what_is_wrong_is_one_message(words, message, minigpt5):
    if words == ["export", "more"]:
        words = [*words, "--checkpoint=x", "--to=peft", "--output=y"]
    done = minigpt5(*words)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr


def test_messages_are_flags_or_lines():
    # In a process of its own: commands define the same flags.
    code = "import sys; from minigpt5_jax import chat; chat.flags.FLAGS(sys.argv); print([*chat.messages()])"
    for given, lines, messages in (
        (["--message=a", "--message=b"], "", ["a", "b"]),
        ([], "one\n two \n\nnot said\n", ["one", "two"]),
    ):
        command = [sys.executable, "-c", code, *given]
        done = subprocess.run(command, input=lines, capture_output=True, text=True)
        assert done.stdout.strip() == repr(messages), done.stderr
