"""Admission: how many requests are taken in, what the others are told, and that no place is lost."""

import gc

import pytest

from octavo_server.admission import Admission
from octavo_server.errors import ApiError

BODIES = {
    "/v1/completions": {"prompt": ["a", "b"]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5},
    "/v1/embeddings": {"input": "a"},
}


def refusal(admission: Admission, count: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught:
        admission.enter(count)
    return caught.value


def test_no_more_than_the_limit_are_taken_in():
    admission = Admission(3)
    tickets = [admission.enter(2), admission.enter(1)]
    assert refusal(admission).status == 503
    tickets[0].leave()
    assert refusal(admission, 3).status == 503
    admission.enter(2)


def test_a_request_beyond_the_limit_is_taken_in_alone():
    admission = Admission(3)
    with admission.enter(10):
        assert refusal(admission).code == "overloaded"
    assert admission.num_requests == 0


def test_a_place_is_given_back_once_however_it_ends():
    admission = Admission(2)
    ticket = admission.enter(1)
    ticket.leave()
    ticket.leave()
    assert admission.num_requests == 0
    admission.enter(1)  # and forgotten at once
    gc.collect()
    assert admission.num_requests == 0


def test_the_wait_is_estimated_by_the_pace_of_the_last_requests():
    now = 100.0
    admission = Admission(1, clock=lambda: now)
    for _ in range(4):
        with admission.enter(1):
            now += 3.0
    _held = admission.enter(1)
    now += 3.0
    assert refusal(admission).headers == {"retry-after": "3"}
    assert refusal(admission, 3).headers == {"retry-after": "9"}
    now += 1000
    assert refusal(admission).headers == {"retry-after": "60"}


@pytest.mark.parametrize("path", BODIES)
def test_a_request_too_many_is_told_when_to_come_back(make_client, engine, path):
    client = make_client(engine, max_num_requests=2)
    held = client.app.state.server.admission.enter(2)
    response = client.post(path, json=BODIES[path])
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "takes 2 at most" in response.json()["error"]["message"]
    assert engine.requests == []
    assert 'octavo_admission_rejections_total{reason="overloaded"} 1.0' in client.get("/metrics").text
    held.leave()
    assert client.post(path, json=BODIES[path]).status_code == 200
    assert client.app.state.server.admission.num_requests == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_a_stream_gives_its_place_back(make_client, engine, path):
    client = make_client(engine, max_num_requests=2)
    assert client.post(path, json={**BODIES[path], "stream": True}).status_code == 200
    engine.fail_after = 1
    client.post(path, json={**BODIES[path], "stream": True})
    gc.collect()
    assert client.app.state.server.admission.num_requests == 0
