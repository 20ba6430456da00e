"""The C tests, built with sanitizers by the same CMake file, without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.support import ROOT


@pytest.mark.process
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_the_c_tests_pass_under_the_sanitizers(tmp_path: Path) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DRAMFERRY_SANITIZE=ON"]
    for command in (
        [*configure, "-DRAMFERRY_WERROR=ON"],
        ["cmake", "--build", str(tmp_path), "--parallel", "2"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
