"""The search for the cut whose prefix gives a wanted accuracy, against the places that have it."""

from collections.abc import Callable

import pytest

from minpro_megatron.prompt_sets.cut_search import Band, Places, found_places, next_places, search_cut


def searched(places: Places, truth: Callable[[int], float], bands: list[Band]) -> tuple[list[int], dict[int, float]]:
    """(the places found, all that were measured)."""
    accuracy: dict[int, float] = {}
    while wanted := next_places(places, accuracy.get, bands):
        assert not accuracy.keys() & set(wanted)
        accuracy |= {place: truth(place) for place in wanted}
    return found_places(places, accuracy.get, bands), accuracy


@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_places", [1, 2, 7, 300])
def test_a_place_in_the_band_is_found_if_there_is_one(num_places: int, slope: float) -> None:
    places = [10 + 3 * number for number in range(num_places)]

    def truth(place: int) -> float:
        return min(1.0, ((place - 9) / (3 * num_places)) ** slope)

    for band in (Band(0.0, 0.1), Band(0.3, 0.5), Band(0.45, 0.55), Band(1.0, 1.0)):
        inside = [place for place in places if band.low <= truth(place) <= band.high]
        found, accuracy = searched(Places(places), truth, [band])
        assert set(found) <= set(inside)
        assert bool(found) == bool(inside)
        assert len(accuracy) <= num_places.bit_length()  # bisection


def test_bands_share_their_measurements_and_a_place_is_used_once() -> None:
    places = Places(range(1, 101))
    bands = [Band(0.1, 0.2), Band(0.4, 0.6), Band(0.5, 0.7), Band(0.9, 0.95)]
    found, accuracy = searched(places, lambda place: place / 100, bands)
    assert len(found) == 3  # 0.5 is in two of the bands
    assert all(any(band.low <= accuracy[place] <= band.high for band in bands) for place in found)
    assert len(accuracy) < sum(len(searched(places, lambda place: place / 100, [band])[1]) for band in bands)


def test_a_search_continues_from_any_of_its_states() -> None:
    places = Places(range(64))
    band = Band(0.25, 0.26)
    _, accuracy = searched(places, lambda place: place / 64, [band])
    order = list(accuracy)
    for done in range(len(order)):
        known = {place: accuracy[place] for place in order[:done]}
        assert search_cut(places, known.get, band).next == order[done]
    assert search_cut(places, accuracy.get, band).found == 16


def test_what_no_length_gives_is_not_found() -> None:
    always, never = (lambda place: 1.0), (lambda place: 0.0)
    assert searched(Places([3, 4, 5]), always, [Band(0.2, 0.8)]) == ([], {4: 1.0, 3: 1.0})
    assert searched(Places([3, 4, 5]), never, [Band(0.2, 0.8)]) == ([], {4: 0.0, 5: 0.0})
    assert searched(Places([]), always, [Band(0.2, 0.8)]) == ([], {})


def test_only_places_that_can_be_cut_at_are_measured_or_found() -> None:
    asked: list[int] = []

    def is_place(place: int) -> bool:
        asked.append(place)
        return place % 5 == 1

    for band in (Band(0.0, 0.02), Band(0.3, 0.31), Band(0.41, 0.41), Band(0.42, 0.44), Band(0.955, 1.0)):
        asked.clear()
        found, accuracy = searched(Places(range(100), is_place), lambda place: place / 100, [band])
        inside = [place for place in range(1, 100, 5) if band.low <= place / 100 <= band.high]
        assert found == inside
        assert all(place % 5 == 1 for place in accuracy)
        assert len(set(asked)) < 40  # the others were not tokenized
