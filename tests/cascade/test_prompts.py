"""Weights in prompts: what counts as one, what is text, and what each token gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import InvalidSetting
from cascade.prompts import MAX_CHUNKS, read_weights, split_chunks


def pieces(prompt: str) -> list[tuple[str, float]]:
    """Runs of characters of one weight."""
    read = read_weights(prompt)
    runs: list[tuple[str, float]] = []
    for character, weight in zip(read.text, read.weights, strict=True):
        if runs and runs[-1][1] == pytest.approx(weight):
            runs[-1] = (runs[-1][0] + character, weight)
        else:
            runs.append((character, weight))
    return [(text, round(weight, 4)) for text, weight in runs]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a red circle", [("a red circle", 1)]),
        ("a (red) circle", [("a ", 1), ("red", 1.1), (" circle", 1)]),
        ("a (red:1.3) circle", [("a ", 1), ("red", 1.3), (" circle", 1)]),
        ("(red:0)", [("red", 0)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red : 2 )", [("red ", 2)]),
        ("a [red] circle", [("a ", 1), ("red", 0.9091), (" circle", 1)]),
        ("[red:0.5]", [("red:0.5", 0.9091)]),  # a number belongs to parentheses only
        ("((red))", [("red", 1.21)]),
        ("(a (red:2) circle:1.5)", [("a ", 1.5), ("red", 3), (" circle", 1.5)]),
        ("([red])", [("red", 1)]),
        ("((red:1.3))", [("red", 1.43)]),
        ("(3:4:1.3)", [("3:4", 1.3)]),
        ("(red:bright)", [("red:bright", 1.1)]),
        ("()", []),
        ("(:1.3)", []),
        (r"\(red\) (blue)", [("(red) ", 1), ("blue", 1.1)]),
        (r"(a \) b:2)", [("a ) b", 2)]),
        (r"C:\dir \\ \[", [("C:\\dir \\ [", 1)]),
        ("a ( red", [("a ( red", 1)]),
        ("a ) red (", [("a ) red (", 1)]),
        ("(a [b) c]", [("a [b", 1.1), (" c]", 1)]),
        ("((a)", [("(", 1), ("a", 1.1)]),
        (":) (smile", [(":) (smile", 1)]),
        ("\\", [("\\", 1)]),
    ],
)
def test_brackets(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(prompt) == expected


@pytest.mark.parametrize("prompt", ["(a:11)", "(a:-1)", "((a:5):5)", "(" * 30 + "a" + ")" * 30])
def test_weights_out_of_range_are_refused_with_the_way_out(prompt: str) -> None:
    with pytest.raises(InvalidSetting, match=r"weighted_prompt: weights must be from 0 to 10.*\\\("):
        read_weights(prompt)


@given(st.text(alphabet="ab ()[]:1.\\", max_size=40))
def test_any_text_is_read_and_nothing_but_brackets_weights_and_backslashes_gets_lost(prompt: str) -> None:
    try:
        read = read_weights(prompt)
    except InvalidSetting:
        return
    assert len(read.text) == len(read.weights)
    assert [character for character in read.text if character in "ab"] == [
        character for character in prompt if character in "ab"
    ]
    assert set(read.text) <= set(prompt)


def test_many_brackets_take_no_time() -> None:
    half = 16_000
    assert read_weights("(" * half + "[" * half).text == "(" * half + "[" * half
    assert read_weights("[" * half + "]" * half).text == ""
    assert len(read_weights("(a) " * 8000).text) == 16_000


def test_a_token_gets_the_mean_of_its_characters() -> None:
    read = read_weights("a (re:3)d")
    assert read.text == "a red"
    assert read.weight(0, 1) == 1
    assert read.weight(2, 5) == pytest.approx(7 / 3)
    assert read.weight(3, 3) == 1  # begin, end and padding stand for nothing
    assert read_weights("(red:1.3)").weight(0, 3) == 1.3  # exactly


def test_chunks_hold_every_token_in_order() -> None:
    assert split_chunks([], 3) == [[]]
    assert split_chunks([1, 2, 3], 3) == [[1, 2, 3]]
    assert split_chunks([1, 2, 3, 4], 3) == [[1, 2, 3], [4]]
    assert len(split_chunks(range(3 * MAX_CHUNKS), 3)) == MAX_CHUNKS
    with pytest.raises(InvalidSetting, match=r"long_prompt: .* 24 tokens in 8 chunks, but one has 25"):
        split_chunks(range(3 * MAX_CHUNKS + 1), 3)
