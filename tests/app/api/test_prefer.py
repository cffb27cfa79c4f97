"""`Prefer` and `Idempotency-Key`, as they come."""

import time

import pytest
from fastapi import Request

from app.api.idempotency import idempotency_of, read_key
from app.api.prefer import Preference, parse_prefer
from app.errors import InvalidRequest
from app.schemas import GenerationRequest


@pytest.mark.parametrize(
    ("lines", "preference"),
    [
        ([], Preference()),
        (["respond-async"], Preference(is_async=True)),
        (["Respond-Async, wait=10"], Preference(is_async=True, wait_seconds=10)),
        (["respond-async", "WAIT = 5"], Preference(is_async=True, wait_seconds=5)),
        (['wait="7"; x=y, handling=lenient'], Preference(wait_seconds=7)),
        (["wait=0"], Preference(wait_seconds=0)),
        (["wait=3, wait=9"], Preference(wait_seconds=3)),
        (['respond-async=""'], Preference(is_async=True)),
        (["return=minimal"], Preference()),
        (["wait"], Preference()),
        (["wait=soon"], Preference()),
        (["wait=-1"], Preference()),
        (["wait=1.5"], Preference()),
        (["wait=" + "9" * 5000], Preference()),
        (["wait=٣"], Preference()),
        (["respond async"], Preference()),
        (["=;,,\x00, respond-async"], Preference(is_async=True)),
        (["respond-async=no"], Preference()),
        (['respond-async="'], Preference()),
        (['wait="7'], Preference()),
        (['wait="7"8", wait=5'], Preference(wait_seconds=5)),
        (["wait=5 6, wait=7"], Preference(wait_seconds=7)),
        (["wait = 5 ; x = y z"], Preference(wait_seconds=5)),
    ],
)
def test_preferences(lines: list[str], preference: Preference) -> None:
    assert parse_prefer(lines) == preference


@pytest.mark.parametrize("blanks", [" " * 60_000, "\t" * 60_000, " ;" * 30_000])
def test_a_long_line_takes_no_longer_to_refuse_than_to_read(blanks: str) -> None:
    began = time.perf_counter()
    assert parse_prefer([f"a={blanks}b c", "wait=5"]) == Preference(wait_seconds=5)
    assert time.perf_counter() - began < 5, "more than a look at each character"


def test_what_was_applied_is_said() -> None:
    assert Preference(is_async=True).applied == "respond-async"
    assert Preference(is_async=True, wait_seconds=4).applied == "wait=4"
    assert not Preference().may_outlive_the_call
    assert Preference(wait_seconds=0).may_outlive_the_call


def request(*keys: str, path: str = "/v1/x", method: str = "POST") -> Request:
    headers = [(b"idempotency-key", key.encode("latin-1")) for key in keys]
    return Request({"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers})


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        ("abc", "abc"),
        ('"abc"', "abc"),
        (r'"a\"b\\c"', 'a"b\\c'),
        ('"', '"'),
        ("a b", "a b"),
        ("k" * 255, "k" * 255),
    ],
)
def test_keys_are_bare_or_quoted(sent: str, key: str) -> None:
    assert read_key(request(sent)) == key


@pytest.mark.parametrize("sent", ["", '""', "k" * 256, "é", "a\x00", '" "', "a\tb"])
def test_other_keys_are_refused(sent: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_key(request(sent))
    assert caught.value.param == "Idempotency-Key"


def test_two_keys_are_none() -> None:
    with pytest.raises(InvalidRequest):
        read_key(request("a", "b"))
    assert read_key(request()) is None


def generation(output_format: str) -> GenerationRequest:
    return GenerationRequest.model_validate(
        {"prompt": "x", "width": 64, "height": 64, "seeds": (1,), "output_format": output_format}
    )


def test_the_fingerprint_is_of_method_path_body_and_format() -> None:
    def fingerprint(given: Request, members: dict[str, object], output_format: str = "png") -> str:
        idempotency = idempotency_of(given, members, generation(output_format), 10)
        assert idempotency is not None
        assert (idempotency.key, idempotency.ttl_seconds) == ("k", 10)
        return idempotency.fingerprint

    first = fingerprint(request("k"), {"prompt": "x", "n": 1})
    assert first == fingerprint(request('"k"'), {"n": 1, "prompt": "x", "seed": None})
    others = [
        fingerprint(request("k"), {"prompt": "y", "n": 1}),
        fingerprint(request("k"), {"prompt": "x", "n": 1}, "webp"),
        fingerprint(request("k", path="/api/v1/x"), {"prompt": "x", "n": 1}),
        fingerprint(request("k"), {"prompt": "x", "n": True}),
    ]
    assert len({first, *others}) == 5
    assert idempotency_of(request(), {}, generation("png"), 10) is None
