"""Eight virtual CPU devices, fast compilation, and in CI no skipped test but those on the list."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # tests count compilations, and keep caches of their own
os.environ.pop("A3_COMPILATION_CACHE", None)
# Tiny programs run for milliseconds and compile for seconds: without optimisation it is ten times less.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
])  # fmt: skip

import pytest

# In CI torch and libtpu are installed, so nothing needs to be skipped: test id -> reason.
ALLOWED_SKIPS: dict[str, str] = {
    "tests/test_launch_install.py::test_gcloud_knows_these_commands": "needs the Google Cloud SDK",
}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") == "true" and item.nodeid not in ALLOWED_SKIPS:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
