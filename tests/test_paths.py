"""Where paths enter: ``~`` means the home folder everywhere, and what cannot be written is said at once."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError, get_config, keys_of, validate, value_at
from minigpt5_jax.data.paths import not_found
from minigpt5_jax.parts.contracts import Key

ROOT = Path(__file__).parents[1]
FREE_TEXT = {
    "prompt", "message", "inference", "weights", "to", "beam_runner", "beam_options", "data", "switch",
    "paper_row", "profile_steps", "system", "base_url", "completion_code", "judge", "host",
}  # fmt: skip
"""Flags of the commands that are no paths; ``weights`` and ``system`` go through :func:`cli.folders`."""
NO_PATHS = {"run.name", "run.tracker", "run.compile_cache", "data.index_cache", "run.best_metric"}
"""Keys of free text: names, and folders of caches, which are in the home of whoever runs the program."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_flag_with_free_text_is_a_path_or_named_here():
    files = [*(ROOT / "minigpt5_jax").glob("*.py"), ROOT / "minigpt5_jax/evaluation/shapes/__main__.py"]
    found = {
        name
        for file in files
        for name in re.findall(r'DEFINE_(?:multi_)?string\(\s*"(\w+)"', file.read_text())
    }
    assert found == FREE_TEXT


def test_every_command_begins_in_one_place():
    """Where ``--help`` ends with status 0, and wrong flags with a line."""
    starts = [file for file in (ROOT / "minigpt5_jax").rglob("*.py") if "app.run(" in file.read_text()]
    assert starts == [ROOT / "minigpt5_jax/cli.py"]


@pytest.mark.parametrize(
    "given, advised",
    [
        (["--limit=abc"], cli.LIST_FLAGS),
        (["--limut=1"], cli.LIST_FLAGS),
        (["word"], cli.LIST_FLAGS),
        ([f"--config={ROOT / 'configs/shapes_stage1.py'}", "--config.run.seed=abc"], cli.LIST_KEYS),
    ],
)
def test_a_wrong_flag_is_told_with_the_list_that_it_is_missing_from(given, advised, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare", *given])
    with flagsaver.flagsaver(), pytest.raises(SystemExit):
        flags.DEFINE_integer("limit", 1, "a number", allow_override=True)
        cli.parse(["prepare", *given])
    assert capsys.readouterr().err.endswith(f"{advised}\n")


def test_what_is_not_there_is_told_with_what_is_probably_meant(tmp_path):
    (tmp_path / "train.tsv").touch()
    assert not_found("data file", tmp_path / "trian.tsv") == (
        f"data file not found: {tmp_path}/trian.tsv; did you mean {tmp_path}/train.tsv?"
    )
    (tmp_path / "photos").mkdir()
    assert not_found("data file", tmp_path / "photo/a/b.tsv").endswith(f"did you mean {tmp_path}/photos?")
    assert not_found("data file", tmp_path / "x").endswith("/x")
    (tmp_path / "dead").symlink_to("/nowhere")
    dead = not_found("data file", tmp_path / "dead")
    assert dead.endswith("dead, a link to /nowhere, where nothing is; fetch it again")


def test_a_path_of_a_flag(home):
    values = flags.FlagValues()
    one = cli.define_path("one", None, "a path", flag_values=values)
    more = cli.define_path("more", None, "paths", multi=True, flag_values=values)
    values(["x", "--one=~/a b", "--more=~/c", "--more=x~/~", "--more=org/name"])
    assert one.value == str(home / "a b")
    assert more.value == [str(home / "c"), "x~/~", "org/name"]


def test_every_free_text_of_a_configuration_is_a_path_or_named_here(home):
    config = get_config()

    def is_text(key: Key) -> bool:
        return not key.choices and (key.kind is str or isinstance(key.default, str))

    keys = keys_of(config)
    texts = {name for name, key in keys.items() if is_text(key) and not name.startswith("model.")}
    assert {name for name in texts if not keys[name].path} == NO_PATHS
    for name in texts - NO_PATHS:
        section, _, last = name.rpartition(".")
        value_at(config, section)[last] = "~/x"
    validate(config)
    assert {value_at(config, name) for name in texts - NO_PATHS} == {str(home / "x")}


def test_a_workdir_below_home_is_one_folder_for_the_whole_run(home, monkeypatch):
    run_file = f"--config={ROOT / 'configs/shapes_stage1.py'}"
    given = ["train", run_file, "--workdir=~/run1", "--config.data.train=~/a.tsv"]
    monkeypatch.setattr("sys.argv", given)  # where ml_collections looks for overrides
    with flagsaver.flagsaver():
        cli.parse(given)
        config = cli.load()
        assert (config.run.workdir, config.data.train) == (str(home / "run1"), str(home / "a.tsv"))
        assert cli.sources(["llm=~/llm"]) == {"llm": str(home / "llm")}


def test_a_run_file_below_home(home):
    (home / "mine.py").write_text((ROOT / "configs/shapes_stage1.py").read_text())
    with flagsaver.flagsaver():
        cli.parse(["train", "--config=~/mine.py"])
        assert cli.load().data.format == "shapes"


def test_an_address_of_object_storage_is_refused_where_paths_enter(tmp_path, capsys, monkeypatch):
    """It would be a folder named ``gs:`` here."""
    address, run_file = "gs://bucket/run", f"--config={ROOT / 'configs/shapes_stage1.py'}"
    refused = "gs://bucket/run is an address, and only folders are read and written here: mount the bucket"
    with pytest.raises(ConfigError, match=f"^{refused}"):
        cli.sources([f"llm={address}"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit):
        cli.parse(["train", run_file, f"--workdir={address}"])
    assert refused in capsys.readouterr().err
    given = ["train", run_file, f"--config.data.train={address}"]
    monkeypatch.setattr("sys.argv", given)
    with flagsaver.flagsaver(), pytest.raises(ConfigError, match=f"^data.train: {refused}"):
        cli.parse(given)
        cli.load()
    mounted = ["train", run_file, f"--workdir={tmp_path}/bucket/run"]
    monkeypatch.setattr("sys.argv", mounted)
    with flagsaver.flagsaver():
        cli.parse(mounted)
        assert cli.load().run.workdir == f"{tmp_path}/bucket/run", "the remedy"


def test_an_output_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    assert cli.check_writable(str(tmp_path / "a/b/c")) == str(tmp_path / "a/b/c")
    assert not list(tmp_path.iterdir()), "trying leaves nothing"
    (tmp_path / "file").touch()
    for below in ("file/page", "file/a/b"):
        with pytest.raises(
            NotADirectoryError, match=r"--output=.*file: Not a directory; choose another --output"
        ):
            cli.check_writable(str(tmp_path / below))
    assert cli.check_writable(str(tmp_path / "file")), "a file there is another matter, which commands refuse"


@pytest.mark.skipif(not os.access("/proc", os.R_OK), reason="needs a folder that nobody can write to")
def test_a_folder_that_nobody_can_write_to():
    with pytest.raises(OSError, match=r"--workdir=/proc/self/run cannot be written: /proc/self: "):
        cli.check_writable("/proc/self/run", "workdir")


def test_an_error_of_the_file_system_is_one_line(capsys):
    def command() -> None:
        raise PermissionError(13, "Permission denied", "secret.tsv")

    with pytest.raises(SystemExit) as ended:
        cli.guarded(command)
    assert ended.value.code == 1 and "Traceback" not in (said := capsys.readouterr().err)
    assert said.splitlines() == ["error: secret.tsv: Permission denied"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's disk that is always full")
def test_a_full_disk_is_told_before_the_work_and_with_its_place_afterwards(capsys, monkeypatch):
    monkeypatch.setattr(cli.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
    with pytest.raises(OSError, match="--output=page cannot be written: .*No space left on device; choose"):
        cli.check_writable("page")

    def command() -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"x")

    others = {name: None for name in ("output", "out") if name in cli.flags.FLAGS}  # imported before
    with flagsaver.flagsaver(workdir="runs/a", **others), pytest.raises(SystemExit):
        cli.guarded(command)
    told = "error: No space left on device, while writing below --workdir=runs/a; make room and give"
    assert capsys.readouterr().err.startswith(told)


def test_a_terminal_does_not_obey_what_a_message_quotes(capsys):
    hostile = "caption \x1b[2J\x9b31m\u202e\ttab caf\u00e9 \u4e00\nline\r\ud800"
    cli.tell(hostile)
    said = capsys.readouterr().err
    assert said == "caption \\x1b[2J\\x9b31m\\u202e\ttab caf\u00e9 \u4e00\nline\\r\\ud800\n"
    record = logging.LogRecord("absl", logging.WARNING, __file__, 1, "skipped: %s", ("\x1b]0;x\x07",), None)
    assert cli._Printable().format(record).endswith("skipped: \\x1b]0;x\\x07")
