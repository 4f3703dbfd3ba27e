"""The command line as a whole: help, exit codes, JSON, and what happens without its packages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from process import fresh_process
from typer.testing import CliRunner

from flashtile.cli import console
from flashtile.cli.app import main
from flashtile.cli.commands import app

COMMANDS = ("demo", "doctor", "verify", "bench", "explain")


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_json(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--json" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", "--grid", "huge"], "--grid: got 'huge'"),
        (["bench", "--peers", "nobody"], "--peers: got 'nobody'"),
        (["bench", "--mode", "sideways"], "--mode: got 'sideways'"),
        (["bench", "--features", "plain+magic"], "--features: got 'magic'"),
        (["bench", "--lengths", "64,x"], "--lengths: got '64,x'"),
        (["bench", "--dims", "0"], "--dims: got '0'"),
        (["bench", "--backend", "abacus"], "--backend: got 'abacus'"),
        (["bench", "--dtype", "int8"], "--dtype: got 'int8'"),
        (["bench", "--device", "abacus"], "--device: got 'abacus'"),
        (["bench", "--grid", "models", "--only", "gpt-9"], "--only: got 'gpt-9'"),
        (["bench", "--grid", "models", "--only", "flux", "--mode", "backward"], "--mode: got 'backward'"),
        (["bench", "--grid", "models", "--lengths", "64"], "--grid models: got --lengths too"),
        (["bench", "--grid", "models", "--features", "alibi"], "--grid models: got --features too"),
        (["bench", "--grid", "paper", "--only", "flux"], "--only: got 'flux'"),
        (["bench", "--seconds", "0"], "--seconds: got 0"),
        (["bench", "--plot", "absent.jsonl"], "absent.jsonl"),
        (["verify", "--case", "no-such-case"], "--case: got 'no-such-case'"),
        (["verify", "--dtype", "int8"], "--dtype: got 'int8'"),
        (["verify", "--backend", "abacus"], "--backend: got 'abacus'"),
        (["verify", "--random", "-1"], "--random: got -1"),
        (["doctor", "--device", "abacus"], "--device: got 'abacus'"),
        (["explain"], "Missing argument"),
        (["explain", "k=1,2,3,4"], "SHAPES: got no q"),
        (["explain", "q=1,2,3"], "q: got '1,2,3'"),
        (["explain", "x=1,2,3,4"], "SHAPES: got 'x=1,2,3,4'"),
        (["explain", "q=1,64,3,8", "k=1,64,2,8"], "k: got 2 heads, expected a divisor of 3"),
        (["explain", "q=1,64,1,300"], "head_dim 300"),
        (["explain", "q=1,64,1,8", "--window", "5"], "--window: got '5'"),
        (["explain", "q=1,64,1,8", "--window", "-7,0"], "window: got (-7, 0)"),
        (["explain", "q=1,64,1,8", "--dtype", "int8"], "--dtype: got 'int8'"),
        (["explain", "q=1,64,1,8", "--backend", "abacus"], "backend: got 'abacus'"),
        (["explain", "q=1,64,1,8", "--device", "cuda", "--capability", "nine"], "--capability: got 'nine'"),
        (["explain", "q=1,64,1,8", "--device", "cpu", "--capability", "9.0"], "--capability: got '9.0' with"),
        (
            ["explain", "q=1,64,1,8", "--device", "cpu", "--compile", "sm_90"],
            "--compile: got a call that the backend blocked",
        ),
        (["explain", "q=1,64,1,8", "--device", "cuda", "--compile", "z80"], "--compile: got 'z80'"),
        (
            ["explain", "q=1,128,1,8", "--device", "cuda", "--capability", "9.0", "--compile", "gfx942"],
            "--compile: got 'gfx942', expected sm_90 for the backend hopper",
        ),
        (["explain", "q=1,64,1,8", "--fast-memory", "0"], "--fast-memory: got 0"),
        (["explain", "q=1,64,1,8", "--device", "cuda", "--copy-gbps", "-1"], "--copy-gbps"),
        (["explain", "q=1,64,1,8", "--dropout", "2"], "dropout_p: got 2.0"),
        (["explain", "q=1,64,1,8", "--fa2-tile", "0,64"], "--fa2-tile: got '0,64'"),
        (["explain", "q=1,64,1,8", "--chunk", "1,2,3"], "--chunk: got '1,2,3'"),
        (["demo", "--text", "no/such/file.txt"], "no/such/file.txt"),
        (["bench", "--no-such-option"], "No such option"),
        (["no-such-command"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_exit_with_2_and_say_what_was_got(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 2, result.output
    assert text in " ".join(result.output.split())


@pytest.mark.parametrize("missing", ["typer", "rich.console"])
def test_without_its_packages_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith("flashtile.cli.") and name != "flashtile.cli.app"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    package = missing.partition(".")[0]
    assert capsys.readouterr().err == f"flashtile: the command line needs {package}: pip install flashtile[cli]\n"


def test_another_missing_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashtile.cli.commands", None)
    with pytest.raises(ModuleNotFoundError, match=r"flashtile\.cli\.commands"):
        main()


def test_python_m_flashtile_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashtile", "explain", "q=1,64,1,8", "--device", "cuda", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_importing_the_entry_point_imports_nothing_heavy() -> None:
    code = "import sys, flashtile.cli.app; print(sorted({'typer', 'rich', 'matplotlib', 'triton'} & set(sys.modules)))"
    assert fresh_process(code) == "[]"


def test_json_is_strict() -> None:
    value = {"a": float("inf"), "b": [float("nan"), 1.5], 3: (True, None)}
    assert json.loads(json.dumps(console.strict(value), allow_nan=False)) == {
        "a": "inf",
        "b": ["nan", 1.5],
        "3": [True, None],
    }


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (console.size(1536), "1.5 KiB"),
        (console.size(3 * 2**40), "3 TiB"),
        (console.size(1023 * 2**20), "1023 MiB"),
        (console.number(999_900), "1 M"),
        (console.number(137438953472), "137 G"),
        (console.milliseconds(0.0213), "21.3 us"),
        (console.milliseconds(12.3), "12.3 ms"),
        (console.milliseconds(4200), "4.2 s"),
    ],
)
def test_numbers_in_words(got: str, wanted: str) -> None:
    assert got == wanted
