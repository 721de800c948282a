"""A test that cannot reach its oracle fails: nothing here is skipped, and nothing runs without what it compares with."""

import importlib.util
import os

import pytest

ORACLES = ["torch", "numpy", "transformers", "compressed_tensors", "tokenizers", "safetensors", "highspy", "gguf"]
VARIABLES = ["PRISMAQUANT_BINARY", "PRISMAQUANT_OPS", "PRISMAQUANT_SOURCE_DIR"]


def pytest_configure(config):
    missing = [name for name in ORACLES if importlib.util.find_spec(name) is None]
    missing += [name for name in VARIABLES if not os.path.exists(os.environ.get(name, ""))]
    if missing:
        pytest.exit(f"missing for the tests: {', '.join(missing)}", returncode=3)


def _fail_instead_of_skip(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skipped, which counts as a failure here: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _fail_instead_of_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _fail_instead_of_skip(report)
    return report
