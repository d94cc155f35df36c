"""How much wider an interval over dialogues becomes because people take part in several dialogues.

Dialogues with a person in common are dependent. Clustering all linked dialogues would often give one giant cluster, so
dialogues are resampled, and the interval is widened by the covariance of pairs of dialogues with a person in common
(Fafchamps & Gubert 2007; Aronow, Samii & Assenova 2015, "Cluster-robust variance estimation for dyadic data"; with one
person a dialogue it is the ordinary cluster-robust variance). A person in all dialogues does not link them: the figure
is conditional on that person.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_PAIRS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Dependence:
    """A statistic's variance relative to that with independent dialogues (at least 1), and its effective number of
    people (Kish; infinity if nobody is in two dialogues)."""

    variance_factor: float = 1.0
    n_people: float = math.inf

    def width_factor(self, confidence_level: float) -> float:
        """The factor of the interval's width, with Student's t for a small number of people."""
        if math.isinf(self.n_people):
            return 1.0
        from scipy.stats import norm, t

        tail = (1 - confidence_level) / 2
        quantiles = t.isf(tail, max(1.0, self.n_people - 1)) / norm.isf(tail)
        return float(math.sqrt(self.variance_factor) * quantiles)


class SharedParticipants:
    """The participants of each dialogue: `participants[dialogue]` holds indices of people."""

    def __init__(self, participants: Sequence[Sequence[int]]) -> None:
        counts = np.array([len(people) for people in participants], dtype=np.int64)
        people = np.array([person for of_one in participants for person in of_one], dtype=np.int64)
        rows = np.repeat(np.arange(len(participants)), counts)
        shape = (len(participants), int(people.max(initial=-1)) + 1)
        self._incidence_DP = csr_array((np.ones(len(people)), (rows, people)), shape=shape)
        self._incidence_DP.data[:] = 1  # a person listed twice counts once

    def dependence(self, influence_C: FloatArray, dialogue_C: IntArray) -> Dependence:
        """Dependence of a statistic of these dialogues, from the influence of each dialogue on it."""
        incidence_CP = self._incidence_DP[dialogue_C]
        of_person_P = np.asarray(incidence_CP.sum(axis=0)).reshape(-1)
        linking_P = (of_person_P > 1) & (of_person_P < len(dialogue_C))
        if not linking_P.any():
            return Dependence()
        shared_CP = incidence_CP[:, np.flatnonzero(linking_P)]
        alone = len(dialogue_C) - np.count_nonzero(np.diff(shared_CP.indptr))
        sizes = np.concatenate([of_person_P[linking_P], np.ones(alone)])
        n_people = float(sizes.sum() ** 2 / (sizes**2).sum())  # more than 1, since nobody here is in all dialogues
        own = float((influence_C**2).sum())
        if own == 0:
            return Dependence(1.0, n_people)
        shared = self._shared_variance(influence_C, shared_CP) * n_people / (n_people - 1)
        return Dependence(max(1.0, shared / own), n_people)

    def _shared_variance(self, influence_C: FloatArray, shared_CP: csr_array) -> float:
        """Sum of products of influences over all ordered pairs with a person in common, pairs (i, i) included."""
        largest = int(np.asarray(shared_CP.sum(axis=0)).max())
        step = max(1, _PAIRS_AT_ONCE // max(1, largest))
        total = float((influence_C**2).sum())
        for start in range(0, len(influence_C), step):
            links = shared_CP[start : start + step] @ shared_CP.T
            links.data[:] = 1
            products = influence_C[start : start + step] @ (links @ influence_C)
            own = influence_C[start : start + step] ** 2 * (np.diff(shared_CP[start : start + step].indptr) > 0)
            total += float(products - own.sum())
        return total
