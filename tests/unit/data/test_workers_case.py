"""Who is to blame for a lost worker: a sample, the storage, or somebody outside."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dist.data.types import Condemned, MicroBatchJob, SampleRef
from vlm_dist.data.workers import case as case_module
from vlm_dist.data.workers.case import Case, Loss
from vlm_dist.data.workers.progress import Note, Phase

JOB = MicroBatchJob(3, 0, tuple(SampleRef(0, index) for index in range(4)))
SEGV, ABRT, KILL, TERM = -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGTERM


def loss(slot, exit_code, phase=Phase.DECODING, seconds=1.0):
    return Loss(Note(slot, phase, 0.0), exit_code, seconds)


def after(*losses, timeout=60.0):
    case = Case(timeout)
    for one in losses:
        case.add(one)
    return case


@pytest.mark.parametrize("exit_code", [SEGV, ABRT, 1, 0, None])
def test_first_a_suspect_then_condemned(exit_code):
    case = after(loss(2, exit_code))
    assert case.next_job(JOB).suspects == (2,)
    assert case.next_job(JOB).condemned == ()
    case.add(loss(2, exit_code))
    again = case.next_job(JOB)
    assert (again.suspects, [one.slot for one in again.condemned]) == ((), [2])
    assert again.condemned[0].null_class == ("timeout" if exit_code is None else "crash")
    assert not case.is_hopeless


def test_the_message_says_what_happened():
    assert after(loss(1, SEGV), loss(1, SEGV)).next_job(JOB).condemned == (
        Condemned(1, "crash", "its decoding ended the worker process twice (died of signal 11)"),
    )
    assert after(loss(1, None), loss(1, None)).next_job(JOB).condemned[0].message == (
        "its decoding took longer than 60 s twice"
    )
    both = after(loss(1, None), loss(1, ABRT)).next_job(JOB).condemned[0]
    assert both == after(loss(1, ABRT), loss(1, None)).next_job(JOB).condemned[0]  # whatever came first
    assert (both.null_class, both.message) == (
        "crash",
        "its decoding took longer than 60 s, and ended the worker process (died of signal 6)",
    )


def test_an_outright_kill_counts_from_the_third_time():
    """It may come from the system, which wants the memory that this very sample takes; or from anybody."""
    case = after(loss(0, KILL), loss(0, KILL))
    assert (case.condemned, case.next_job(JOB).suspects) == ([], (0,))
    case.add(loss(0, KILL))
    assert "as when memory runs out" in case.next_job(JOB).condemned[0].message


@pytest.mark.parametrize(
    "innocent",
    [
        loss(1, TERM),
        loss(1, -signal.SIGINT),
        loss(1, 255),
        loss(None, SEGV),
        loss(None, None),
        loss(1, None, Phase.READING),
    ],
    ids=["SIGTERM", "SIGINT", "fork server gone", "between samples", "hangs between", "storage hangs"],
)
def test_what_no_sample_is_to_blame_for_ends_the_run_at_the_third_time(innocent):
    case = after(innocent, innocent)
    assert case.next_job(JOB) == JOB
    assert not case.is_hopeless
    case.add(innocent)
    assert case.is_hopeless
    assert case.condemned == []


def test_several_samples_of_one_job_are_condemned_one_after_the_other():
    case = after(loss(0, SEGV), loss(3, None), loss(0, SEGV), loss(3, None))
    assert [one.null_class for one in case.next_job(JOB).condemned] == ["crash", "timeout"]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([SEGV, None]), st.floats(0.1, 30)), max_size=60),
    st.floats(1, 180),
)
def test_a_job_gives_up_before_the_other_ranks_do(events, timeout):
    """Whatever the samples do, the job has its answer within the bound, plus one pass over what is sound."""
    case, spent = Case(timeout), 0.0
    for slot, exit_code, seconds in events:
        if case.is_hopeless:
            break
        seconds = timeout if exit_code is None else min(seconds, timeout)
        spent += seconds
        case.add(loss(slot, exit_code, seconds=seconds))
    assert spent <= case_module.MAX_LOST_SECONDS
    two_time_outs = after(loss(0, None, seconds=timeout), loss(0, None, seconds=timeout), timeout=timeout)
    assert not two_time_outs.is_hopeless  # one sample that hangs never ends a run


def test_reading_may_take_longer_than_decoding():
    case = Case(60.0)
    assert case.limit_seconds(Note(0, Phase.DECODING, 0.0)) == 60.0
    assert case.limit_seconds(Note(0, Phase.READING, 0.0)) == case_module.STALL_SECONDS > 60
    assert case.limit_seconds(Note(None, Phase.READING, 0.0)) == case_module.STALL_SECONDS
