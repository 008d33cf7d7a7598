from octavo_engine.types import Request, SamplingParams, TokenSpan


def test_an_unset_seed_is_drawn_once_and_kept():
    request = Request(request_id="r", inputs=(TokenSpan((1, 2)), TokenSpan((3,))))
    assert request.seed == request.seed >= 0
    assert request.prompt_token_ids == [1, 2, 3]
    assert Request(request_id="r", inputs=(), sampling=SamplingParams(seed=7)).seed == 7
