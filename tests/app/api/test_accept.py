"""Which form of the answer an `Accept` header means."""

import pytest

from app.api.accept import raw_format
from app.errors import NotAcceptable


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", None),
        ("*/*", None),
        ("application/json", None),
        ("image/png", "png"),
        ("IMAGE/JPEG", "jpeg"),
        ("image/*", "webp"),
        ("image/avif, image/webp;q=0.8, */*;q=0.5", "webp"),
        ("image/png;q=0.2, application/json", None),
        ("application/json;q=0.2, image/png;q=0.3", "png"),
        ("image/png;q=0, */*", None),
        ("image/png;q=rubbish", "png"),
        ("image/png; q=0.5, image/jpeg; q=0.7", "jpeg"),
        (",,;;,", None),
    ],
)
def test_the_first_in_preference_decides(accept: str, expected: str | None) -> None:
    assert raw_format(accept, "webp") == expected


def test_kinds_of_pictures_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(NotAcceptable, match="image/png"):
        raw_format("image/gif, image/avif", "png")
