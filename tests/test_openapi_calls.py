"""Schemathesis against the server's own OpenAPI document: no server error, and no answer that it does not describe."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from byte_engine import byte_engine
from fastapi import FastAPI
from hypothesis import HealthCheck, given, seed, settings

from octavo_server import create_app

schemathesis = pytest.importorskip("schemathesis", reason="calls are made by schemathesis")

# By name, and once a schema was loaded: only then all checks are registered.
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
NUM_CALLS = 20_000
SHARE = 0.004


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    engine = byte_engine(num_blocks=4000, max_num_seqs=32, budget=4096)
    try:
        yield create_app(engine)
    finally:
        engine.close()


def _call_all(app: FastAPI, num_calls: int) -> int:
    """Call every operation equally often with generated parameters and bodies; return the number of calls."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]
    operations = [result.ok() for result in schema.get_all_operations()]
    chosen = int(os.environ.get("OCTAVO_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"seed {chosen}: {len(operations)} operations")
    made = 0
    for operation in operations:
        has_input = operation.body or operation.query or operation.path_parameters

        @seed(chosen)
        @settings(
            max_examples=num_calls // len(operations) if has_input else 1,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            nonlocal made
            made += 1
            if isinstance(case.body, dict):
                case.body.pop("timeout", None)  # whoever gives the server no time is told so by a 504
            case.call_and_validate(checks=checks)

        check()
    return made


def test_generated_calls_are_answered_as_the_document_says(app):
    assert _call_all(app, int(NUM_CALLS * SHARE)) > 0


@pytest.mark.slow
def test_twenty_thousand_calls_are_answered_as_the_document_says(app, record_property):
    made = _call_all(app, NUM_CALLS * 3 // 2)  # routes without input are called once
    record_property("calls", made)
    assert made >= NUM_CALLS
