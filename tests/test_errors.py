"""Every bad call raises the right exception, naming the argument, what it got and what was expected, before any work.

`check_rejected` is the only judge of the rows in `bad_calls`; the last tests show that it can say no.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bad_calls import BAD, GOOD, NAN, Bad, dense, interleaved, packed, zeros

from flashtile import execution


def check_rejected(bad: Bad) -> None:
    error = raised_by(bad.call)
    assert error is not None, f"{bad.name}: nothing was raised"
    assert type(error) is bad.kind, f"{bad.name}: raised {type(error).__name__}: {error}"
    missing = [word for word in bad.words if word not in str(error)]
    assert not missing, f"{bad.name}: {str(error)!r} lacks {missing}"


def raised_by(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_call(bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "load", _no_backend_may_start)
    check_rejected(bad)


def _no_backend_may_start(name: str) -> None:
    raise AssertionError(f"backend {name} was started on a bad call")


def test_the_rows_are_many_and_distinct() -> None:
    assert len(BAD) >= 80
    assert len({bad.name for bad in BAD}) == len(BAD)
    assert all(bad.words for bad in BAD)
    for bad in BAD:
        if bad.kind is not NotImplementedError and bad.name != "mask-and":
            with pytest.raises(bad.kind, match=r"(?s)got .*, expected "):
                bad.call()


# Without this a row could be rejected for another reason than its own. interleaved(8): out between the rows of q.
@pytest.mark.parametrize("call", [*GOOD, dense(out=zeros(2, 5, 4, 8)), interleaved(8)])
def test_the_calls_that_rows_spoil_are_good(call: Callable[[], object]) -> None:
    call()


@pytest.mark.parametrize(
    "bad",
    [
        Bad("nothing-raised", dense(), ValueError, ("q",)),
        Bad("another-exception", dense(scale=NAN), TypeError, ("scale",)),
        Bad("a-subclass", lambda: "a".encode("ascii", "nonsense"), Exception, ()),
        Bad("argument-missing", dense(scale=NAN), ValueError, ("softcap",)),
        Bad("got-missing", dense(scale=NAN), ValueError, ("scale", "inf")),
        Bad("expected-missing", dense(scale=NAN), ValueError, ("scale", "nan", "positive")),
    ],
    ids=lambda bad: bad.name,
)
def test_the_judge_rejects(bad: Bad) -> None:
    with pytest.raises(AssertionError, match=bad.name):
        check_rejected(bad)


def test_equal_numbers_of_another_type_are_still_rejected() -> None:
    # What is known of a good call is kept; True, 1 and 1.0 are equal and must not be taken for one another.
    dense(dropout_p=1.0, softcap=1.0, deterministic=True)()
    packed(max_seqlen_q=4)()
    check_rejected(Bad("dropout", dense(dropout_p=True, softcap=1.0), TypeError, ("dropout_p: got bool",)))
    check_rejected(Bad("softcap", dense(dropout_p=1.0, softcap=True), TypeError, ("softcap: got bool",)))
    check_rejected(Bad("max", packed(max_seqlen_q=4.0), TypeError, ("max_seqlen_q: got float",)))
