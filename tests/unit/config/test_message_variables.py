import pytest

from vlm_dist.config.message_variables import fill_variables, variables_in


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{question_column}", ["question_column"]),
        ("a {b} c {d}{b}", ["b", "d", "b"]),
        ("{질문}", ["질문"]),
        ("{{question}}", []),
        ('Answer as {"a": {"b": 1}}, {} or {1}.', []),
        ("{ question }", []),
    ],
)
def test_variables(text: str, names: list[str]) -> None:
    assert variables_in(text) == names


def test_values_are_put_in_once() -> None:
    assert fill_variables("{a} {{a}} {b}", {"a": "{b}", "b": "x"}) == "{b} {a} x"


def test_a_variable_without_value_is_no_silent_hole() -> None:
    with pytest.raises(KeyError):
        fill_variables("{a}", {})
