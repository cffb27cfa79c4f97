"""The limit of a key: counted by the minute, told with every answer."""

import pytest

from app.api.limits import RateLimit
from app.errors import RateLimited
from tests.app.conftest import Serve

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_is_counted_from_the_first_request() -> None:
    clock = Clock()
    limit = RateLimit(2, clock)
    first = limit.take("a")
    assert first == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "1m0s",
        "RateLimit-Policy": '"images";q=2;w=60',
        "RateLimit": '"images";r=1;t=60',
    }
    clock.now += 18
    assert limit.take("a")["RateLimit"] == '"images";r=0;t=42'
    with pytest.raises(RateLimited) as caught:
        limit.take("a")
    assert (caught.value.headers["Retry-After"], caught.value.status) == ("42", 429)
    assert caught.value.headers["x-ratelimit-reset-requests"] == "42s"
    assert limit.take("b")["x-ratelimit-remaining-requests"] == "1"
    clock.now += 42
    assert limit.take("a")["x-ratelimit-remaining-requests"] == "1"


def test_no_wait_is_longer_than_clients_obey() -> None:
    limit = RateLimit(1, Clock())
    limit.take("a")
    with pytest.raises(RateLimited) as caught:
        limit.take("a")
    assert caught.value.headers["Retry-After"] == "59"


def test_without_a_limit_nothing_is_said() -> None:
    assert RateLimit(None).take("a") == {}


@pytest.mark.parametrize("path", ["/v1/images/generations", "/api/v1/images"])
async def test_the_answer_tells_and_one_too_many_is_refused(serve: Serve, path: str) -> None:
    async with serve(rate_limit=2, api_keys="a=one,b=two") as client:
        key = {"x-api-key": "one"}
        answers = [await client.post(path, json={"prompt": prompt}, headers=key) for prompt in ("x", "", "x")]
        assert [answer.status_code for answer in answers] == [200, 400, 429]
        remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert remaining == ["1", "0", "0"]
        code = (answers[2].json().get("error") or answers[2].json())["code"]
        assert code == "rate_limit_exceeded"
        assert 1 <= int(answers[2].headers["retry-after"]) <= 59
        assert (await client.get("/v1/models", headers=key)).status_code == 200
        other = await client.post(path, json={"prompt": "x"}, headers={"x-api-key": "two"})
        assert other.status_code == 200
