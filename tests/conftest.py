"""What pytest is told of all of tests/: the marker `slow`, which tests share a process, and that what takes longest
begins first.

The tests of a file stay together, for what they share, unless the file cuts itself into groups by `xdist_group`.
"""
import pytest

# groups of tests, the longest first; the others follow in the order of their names
FIRST = ("slurm interrupt-2 hostile-0 hostile-1 interrupt-1 test_papermill pages-reproduce test_training interrupt "
         "test_package test_distributed test_pages test_published test_quantization test_clients").split()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; `make test-slow` runs it, `make test` the faster test of "
                                       "the same mechanism that its docstring names")


def group(item):
    "The name of the tests that this one shares its process with"
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else item.path.stem


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if not item.get_closest_marker("xdist_group"): item.add_marker(pytest.mark.xdist_group(item.path.stem))
    place = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(group(item), len(FIRST)))
