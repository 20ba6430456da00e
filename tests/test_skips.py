"""The rule about skipped tests, on tests of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import CANNOT_BE_HAD

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

def test_that_gives_up(): pytest.skip("no such thing here")

@pytest.mark.skipif(True, reason="not today")
def test_that_is_never_run(): pass

@pytest.mark.xfail
def test_that_fails_as_is_known(): assert False
"""


def outcome(directory: Path, tests: str, **variables: str) -> tuple[int, str]:
    """Run these tests with the plugin; exit code and output."""
    (directory / "test_it.py").write_text(tests)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:cacheprovider", "-rA",
         "-c", os.devnull, "--rootdir", str(directory), str(directory / "test_it.py")],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
        env=environment | variables,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_outside_ci_a_skip_is_a_skip(tmp_path: Path) -> None:
    code, output = outcome(tmp_path, TESTS)

    assert code == 0, output
    assert "2 skipped, 1 xfailed" in output


def test_in_ci_a_skip_is_a_failure_that_names_its_reason(tmp_path: Path) -> None:
    code, output = outcome(tmp_path, TESTS, CI="true")

    assert code == 1, output
    assert "1 failed, 1 xfailed, 1 error" in output  # the second never got beyond its set-up
    assert "does not allow: no such thing here" in output
    assert "does not allow: not today" in output


def test_in_ci_a_module_that_skips_itself_is_an_error(tmp_path: Path) -> None:
    tests = 'import pytest\npytest.skip("none of this", allow_module_level=True)\n'
    code, output = outcome(tmp_path, tests, CI="true")

    assert code != 0, output
    assert "does not allow: none of this" in output


@pytest.mark.parametrize("begin", CANNOT_BE_HAD)
def test_in_ci_what_cannot_be_had_there_may_be_skipped(tmp_path: Path, begin: str) -> None:
    tests = f"import pytest\ndef test_it(): pytest.skip({begin + ' and more'!r})\n"
    code, output = outcome(tmp_path, tests, CI="true")

    assert code == 0, output
    assert "1 skipped" in output
