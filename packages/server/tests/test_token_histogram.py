"""TokenHistogram against prometheus_client's own histogram."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from octavo_server.token_histogram import TokenHistogram

BOUNDS = (0.5, 1, 2.5, 10)
VALUES = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 20))


@given(st.lists(st.tuples(VALUES, st.integers(0, 4))))
def test_counts_are_those_of_the_librarys_histogram(observed):
    registry = CollectorRegistry()
    own, theirs = TokenHistogram("own", "", BOUNDS), Histogram("theirs", "", buckets=BOUNDS, registry=registry)
    registry.register(own)
    for value, times in observed:
        own.observe(value, times)
        for _ in range(times):
            theirs.observe(value)
    for bound in ("0.5", "1.0", "2.5", "10.0", "+Inf"):
        label = {"le": bound}
        assert registry.get_sample_value("own_bucket", label) == registry.get_sample_value("theirs_bucket", label)
    assert registry.get_sample_value("own_count") == registry.get_sample_value("theirs_count")
    assert abs((registry.get_sample_value("own_sum") or 0) - (registry.get_sample_value("theirs_sum") or 0)) < 1e-9
