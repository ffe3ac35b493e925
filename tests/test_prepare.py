"""The command as a user gives it: output, status, errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import commands
from minigpt5_jax.data.prepare.report import length_facts
from minigpt5_jax.data.sources import PreparedSource

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "minigpt5_jax/shapes/assets/llama"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    yield from commands.serve(tmp_path_factory.mktemp("command"), "minigpt5_jax.prepare")


@pytest.fixture
def run(command):
    """``run(*arguments, status=0)``: the command, which has to end with this status."""

    def checked(*arguments: object, status: int = 0) -> subprocess.CompletedProcess:
        done = command(*arguments)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return checked


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    for row in range(5):
        noise = np.random.default_rng(row).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"raw/{row}.jpg")
    path = tmp_path / "raw/cc3m_val.tsv"
    rows = [f"A <b>red</b> circle {row} .\t{row}.jpg" for row in range(6)]  # image 5 is missing
    path.write_text("\n".join(["caption\timage_path", *rows]))
    return path


def test_prepare_writes_data_and_a_report(tmp_path, table, run):
    out = tmp_path / "out"
    arguments = ("--input", table, "--output", out, "--split", "validation")
    failed = run("cc3m", *arguments, "--tokenizer", TOKENIZER, status=1)
    assert failed.stderr.splitlines()[-3:-1] == [
        "error: 1 of 6 units are unusable, the error budget allows 0; the first:",
        f"  {table}:7, {tmp_path}/raw/5.jpg: image cannot be read (No such file or directory)",
    ]
    done = run("cc3m", *arguments, "--tokenizer", TOKENIZER, "--error_budget", "1", "--letterbox", "16")
    folder = out / "cc3m/validation/1.0.0"
    assert "6 samples of 5 records" in done.stdout and "1 of 6 units left out" in done.stdout
    assert f"report: {folder / 'report.html'}" in done.stdout
    assert "6/6" in done.stderr  # the bar went to its end
    report = json.loads((folder / "report.json").read_text())
    assert (report["units"], report["kept"], report["skipped"]) == (6, 5, 1)
    assert report["skipped_by_reason"] == {"image cannot be read (No such file or directory)": 1}
    assert report["images_by_size"] == {"16x16": 5}
    assert sum(report["lengths"]["histogram"].values()) == report["lengths"]["samples"] == 6
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 6  # fewer than ten samples, all are shown
    assert "&lt;b&gt;red&lt;/b&gt;" in page and "<b>red" not in page
    assert len(PreparedSource(out, "validation")) == 6
    again = run("cc3m", *arguments, "--letterbox", "16")  # nothing to do
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


def test_lengths_of_the_report():
    facts = length_facts(np.array([0, 3, 5, 40, 40, 64], np.int32))  # 0: a sample that cannot be read
    assert facts["histogram"] == {
        "0-3": 1,
        "4-7": 1,
        "8-11": 0,
        "12-15": 0,
        "16-19": 0,
        "20-23": 0,
        "24-27": 0,
        "28-31": 0,
        "32-35": 0,
        "36-39": 0,
        "40-43": 2,
        "44-47": 0,
        "48-51": 0,
        "52-55": 0,
        "56-59": 0,
        "60-63": 0,
        "64-67": 1,
    }
    assert (facts["samples"], facts["mean"], facts["p50"], facts["max"]) == (5, 30.4, 40, 64)
    assert length_facts(np.zeros(2, np.int32)) == {"samples": 0}


def test_check_lists_and_fails(tmp_path, table, run):
    found = run("check", table, status=1)
    lines = found.stdout.splitlines()
    assert lines[0].startswith(f"{table}:7: {tmp_path}/raw/5.jpg: image cannot be read")
    assert lines[1].startswith("format: cc3m (guessed from its name")
    assert lines[-1] == "1 problem in 1 of 6 rows"
    table.write_text(table.read_text() + "\nmore\nand more")
    found = run("check", table, "--limit", "1", "--tokenizer", TOKENIZER, "--max_length", "20", status=1)
    assert "... and 2 more (--limit=1)" in found.stdout and "over --max_length 20" in found.stdout
    table.write_text("\n".join(table.read_text().splitlines()[:6]))
    assert run("check", table).stdout.splitlines()[-1] == "nothing is wrong"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "usage: python -m minigpt5_jax.prepare {cc3m|"),
        (("coco",), "usage: "),
        (("check",), "usage: "),
        (("cc3m",), "--input (the raw data) and --output (a folder) are needed"),
        (("cc3m", "--input", "none.tsv", "--output", "out"), "data file not found: none.tsv"),
        (
            ("cc3m", "--input", "a", "--output", "b", "--tokenizer", "none"),
            "sentencepiece model not found: none",
        ),
        (("cc3m", "--input", "a", "--output", "b", "--error_budget", "few"), "--error_budget"),
        (("check", "none.tsv"), "nothing to check: data not found: none.tsv"),
    ],
)
def test_arguments_that_are_wrong(arguments, message, run):
    error = run(*arguments, status=1).stderr
    assert error.startswith("error: ") and message in error
