"""In CI a test that is skipped has failed, unless what it needs is known to be absent there.

A pytest plugin: `tests/conftest.py` takes its hooks in.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from typing import Any, Final, TypeVar

import pytest

#: What the machines of this CI cannot have: how such a skip's reason begins, and why that is so.
#: Huge pages, userfaultfd, PAGEMAP_SCAN, mounts, QEMU and CMake they do have.
CANNOT_BE_HAD: Final[Mapping[str, str]] = {
    "dirty tracker 'soft-dirty' does not work here": "built without CONFIG_MEM_SOFT_DIRTY",
    "this machine has free 1 GiB pages, or knows none": "not every processor has 1 GiB pages",
}
AnyReport = TypeVar("AnyReport", pytest.TestReport, pytest.CollectReport)


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it was skipped, in the test's own words."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def judge(report: AnyReport, in_ci: bool) -> AnyReport:
    """Turn a skip into a failure where nothing excuses it."""
    if not (in_ci and report.skipped) or hasattr(report, "wasxfail"):
        return report
    reason = reason_of(report)
    if not any(reason.startswith(begin) for begin in CANNOT_BE_HAD):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, which tests/skips.py does not allow: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return judge((yield), bool(os.environ.get("CI")))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return judge((yield), bool(os.environ.get("CI")))
