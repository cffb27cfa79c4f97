import pytest

from cascade.recent import Recent


def test_a_value_is_made_once_and_counted() -> None:
    recent: Recent[str, str] = Recent(2)
    asked: list[str] = []

    def make(key: str) -> str:
        asked.append(key)
        return key.upper()

    assert [recent.get(key, make) for key in "aabab"] == ["A", "A", "B", "A", "B"]
    assert asked == ["a", "b"]
    assert (recent.hits, recent.misses) == (3, 2)


def test_the_one_not_asked_for_longest_is_forgotten() -> None:
    recent: Recent[str, str] = Recent(2)
    for key in "abac":
        recent.get(key, str.upper)
    assert recent.get("a", lambda _: "made anew") == "A"
    assert recent.get("b", lambda _: "made anew") == "made anew"


def test_what_cannot_be_made_leaves_no_trace() -> None:
    recent: Recent[str, str] = Recent(2)

    def fail(_: str) -> str:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        recent.get("a", fail)
    assert recent.get("a", str.upper) == "A"
    assert (recent.hits, recent.misses) == (0, 1)


def test_everything_can_be_forgotten() -> None:
    recent: Recent[str, str] = Recent(2)
    recent.get("a", str.upper)
    recent.clear()
    assert recent.get("a", lambda _: "made anew") == "made anew"
