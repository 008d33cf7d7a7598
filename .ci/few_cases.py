"""A pytest plugin: of each parametrised test the first and the last case run, which visits all that the tests import.

Examples of a README all run. For an environment in which only packaging can go wrong, after all cases have run
elsewhere: `pytest -p few_cases`.
"""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first and the last case of each test function."""
    examples = [item for item in items if item.path.name == "test_readme.py"]
    first: dict[str, pytest.Item] = {}
    last: dict[str, pytest.Item] = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        first.setdefault(name, item)
        last[name] = item
    kept = {id(item) for item in (*examples, *first.values(), *last.values())}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
