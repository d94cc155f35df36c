"""Common first names for speakers that a corpus identifies by ids."""

from collections.abc import Iterable

from data.clean.stable_hash import stable_hash

_NAMES = (
    "Aaron Abigail Adam Alice Amanda Amy Andrea Andrew Angela Anna Anthony Ashley Barbara Benjamin Betty Brandon Brian "
    "Carol Catherine Charles Charlotte Christina Christopher Cynthia Daniel David Deborah Dennis Diana Donald Donna "
    "Dorothy Edward Elizabeth Emily Emma Eric Evelyn Frank Gary George Grace Gregory Hannah Heather Helen Henry Jack "
    "Jacob James Janet Jason Jeffrey Jennifer Jessica John Jonathan Joseph Joshua Julia Justin Karen Katherine Kelly "
    "Kenneth Kevin Kimberly Larry Laura Linda Lisa Margaret Maria Mark Martha Mary Matthew Megan Melissa Michael "
    "Michelle Nancy Nathan Nicholas Nicole Olivia Pamela Patricia Patrick Paul Peter Rachel Raymond Rebecca Richard "
    "Robert Ronald Ruth Ryan Samuel Sandra Sarah Scott Sharon Sophia Stephanie Stephen Steven Susan Teresa Thomas "
    "Timothy Tyler Victoria Virginia Walter William Zachary"
)
FIRST_NAMES = tuple(_NAMES.split())


def first_names(participants: Iterable[str]) -> dict[str, str]:
    """A name for each participant, by a hash of the id: mostly the same in every dialogue, and unique within one (on a
    collision, the id that sorts later takes the next free name)."""
    given: dict[str, str] = {}
    taken: set[str] = set()
    for participant in sorted(set(participants)):
        place = stable_hash("first name", participant)
        name = FIRST_NAMES[place % len(FIRST_NAMES)]
        while name in taken and len(taken) < len(FIRST_NAMES):
            place += 1
            name = FIRST_NAMES[place % len(FIRST_NAMES)]
        if name in taken:
            name = f"{name} {len(taken)}"
        taken.add(name)
        given[participant] = name
    return given
