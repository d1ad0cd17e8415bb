"""The error budget: how many damaged samples end a run, and that all ranks find it at the same step."""

from hypothesis import given
from hypothesis import strategies as st

from vlm_dist.data.error_budget import BAD_CLASSES, WINDOW_SAMPLES, ErrorBudget
from vlm_dist.data.types import NULL_CLASSES


def step(num_samples, **nulls):
    return {"num_samples": num_samples} | {f"null_{name}": nulls.get(name, 0) for name in NULL_CLASSES}


def test_which_classes_are_damage():
    assert set(NULL_CLASSES) - set(BAD_CLASSES) == {"tail", "too_long", "over_budget"}
    sound = step(0, tail=900, too_long=900, over_budget=900)
    assert ErrorBudget(0.0).add(sound) is None
    for name in BAD_CLASSES:
        assert ErrorBudget(0.0).add(step(7, **{name: 1})).by_class[name] == 1


def test_the_first_bad_samples_of_a_run_do_not_end_it():
    budget = ErrorBudget(0.05)
    assert budget.add(step(8, decode=8)) is None
    for _ in range(4):
        assert budget.add(step(8, crash=8)) is None
    assert budget.add(step(0, timeout=10)) is None  # 50 in all: as many as may be in a full window
    assert budget.add(step(15, bad_sample=1)).by_class == {"decode": 8, "bad_sample": 1, "timeout": 10, "crash": 32}


def test_what_is_long_ago_is_forgotten():
    budget = ErrorBudget(0.05)
    assert budget.add(step(50, decode=50)) is None
    for _ in range(9):
        assert budget.add(step(100)) is None
    assert budget.add(step(100)) is None
    assert budget.add(step(50, decode=50)) is None  # the first 50 have left the window
    assert budget.add(step(99, decode=1)) is not None


def test_0_is_the_first_and_1_is_never():
    assert ErrorBudget(0.0).add(step(1000)) is None
    assert ErrorBudget(0.0).add(step(999, decode=1)) is not None
    assert ErrorBudget(1.0).add(step(0, decode=10_000)) is None


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
)
def test_it_is_the_share_of_the_last_thousand_samples(steps, share):
    budget = ErrorBudget(share)
    for index, (good, bad) in enumerate(steps):
        overdrawn = budget.add(step(good, decode=bad))
        total = num_bad = 0
        for earlier_good, earlier_bad in reversed(steps[: index + 1]):
            if total >= WINDOW_SAMPLES:
                break
            total, num_bad = total + earlier_good + earlier_bad, num_bad + earlier_bad
        assert (overdrawn is not None) == (num_bad > share * max(total, WINDOW_SAMPLES))
        if overdrawn is not None:
            assert (overdrawn.num_samples, overdrawn.by_class["decode"]) == (total, num_bad)


def test_the_message_says_how_many_which_where_and_what_to_do():
    message = ErrorBudget(0.05).add(step(900, decode=70, crash=2)).message(["vqa/0.tar:7 (decode): cut"])
    assert "72 of the last 972 samples of all ranks cannot be used (70 decode, 2 crash)" in message
    assert "data.max_bad_share 0.05" in message and "\n  vqa/0.tar:7 (decode): cut\n" in message
    assert "shards verify --decode" in message


def test_what_only_tars_have_is_not_advised_for_lines_of_a_file():
    message = ErrorBudget(0.05).add(step(900, decode=70)).message(["talks/talks.jsonl:7 (decode): a.jpg: cut"])
    assert "shards verify" not in message
    assert "vlm-dist quarantine OUTPUT_DIR" in message
