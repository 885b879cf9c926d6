"""The undisturbed run that the others are compared with, and the cache of its programs."""

import shutil

import pytest

from tests.drills.harness import Run


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, cache):
    """Two processes with two devices each, from the beginning to the end."""
    return Run(tmp_path_factory.mktemp("undisturbed"), cache, processes=2).finish()


@pytest.fixture
def run(tmp_path, cache):
    """Makes runs; what is still alive in the end is killed."""
    made = []

    def make(name="run", **options):
        made.append(Run(tmp_path / name, cache, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()
    shutil.rmtree(tmp_path, ignore_errors=True)
