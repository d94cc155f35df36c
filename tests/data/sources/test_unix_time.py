"""Times of every form become unix seconds, and what is no time is refused with words."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sources.unix_time import EARLIEST, LATEST, TimeError, unix_seconds

MOMENTS = st.datetimes(datetime(1000, 1, 1), datetime(2199, 1, 1), timezones=st.timezones())


@given(seconds=st.floats(EARLIEST, LATEST, exclude_max=True) | st.integers(EARLIEST, LATEST - 1))
def test_numbers_are_unix_seconds(seconds: float) -> None:
    assert unix_seconds(seconds) == seconds


@given(moment=MOMENTS)
def test_iso_8601_is_the_moment_that_it_names(moment: datetime) -> None:
    text = moment.isoformat()
    assert unix_seconds(text) == unix_seconds(text.replace("T", " ")) == datetime.fromisoformat(text).timestamp()


@pytest.fixture
def machine_east_of_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("machine_east_of_utc")
def test_a_time_without_a_zone_is_utc() -> None:
    assert unix_seconds("2024-05-01") == unix_seconds("2024-05-01T00:00") == 1714521600
    assert unix_seconds("2024-05-01T00:00:00z") == unix_seconds("2024-05-01T02:00:00+02:00") == 1714521600


@given(moment=st.datetimes(datetime(1975, 1, 1), datetime(2190, 1, 1), timezones=st.just(UTC)))
@pytest.mark.parametrize(("unit", "factor"), [("milli", 10**3), ("micro", 10**6), ("nano", 10**9)])
def test_finer_units_are_named(moment: datetime, unit: str, factor: int) -> None:
    seconds = int(moment.timestamp())
    with pytest.raises(TimeError, match="expected unix seconds") as caught:
        unix_seconds(seconds * factor)
    assert f"in {unit}seconds it is in {moment.year}, so divide by {factor:,}" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        True, None, [], {}, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), -1e12, "", "noon", "1",
        "1700000000", "1712121212000", "20240501", "2024-13-01", "2024-05-01T25:00", "2024-05-01 nonsense",
        "0001-01-01T00:00:00+05:00x",
    ],
)  # fmt: skip
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(TimeError, match="expected"):
        unix_seconds(value)


def test_a_zone_east_of_the_first_year_is_no_crash() -> None:
    moment = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))
    assert unix_seconds(moment.isoformat()) == moment.timestamp()
