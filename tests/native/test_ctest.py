"""The C tests, built with sanitizers by the same CMake file, without Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.support import ROOT


@pytest.mark.process
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_c_tests_pass_under_the_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DRAMFERRY_WERROR=ON"]
    outputs = []
    for command in (
        [*configure, f"-DRAMFERRY_SANITIZE={sanitizer}"],
        ["cmake", "--build", str(tmp_path), "--parallel", "2"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error",
         "--parallel", "2"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    skipped = re.findall(r"(test_\w+) .*Skipped", outputs[-1])
    if skipped:
        pytest.skip(f"a part of {', '.join(skipped)} cannot be tested here")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_sanitizer_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DRAMFERRY_SANITIZE=adress"]

    done = subprocess.run(configure, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode != 0
    assert "'adress'" in done.stderr
