"""Who has children: the good ones of an island, and the best of every kind of behaviour."""

from collections.abc import Sequence

import numpy as np

from sartor.discover.propose.proposal import Member, Population

ISLANDS = 4
MIGRATES = 0.1  # how often a parent comes from another island than the draw's own
TOURNAMENT = 4  # of so many members drawn at random the best one is a parent
BY_BEHAVIOUR = 0.4  # how often a parent is drawn from the best of each behaviour instead: pressure to be unlike


def pick(population: Population, draw: np.random.Generator) -> Member | None:
    """One parent: by tournament on an island, or the best member of a behaviour drawn at random."""
    if not population.members:
        return None
    if draw.random() < BY_BEHAVIOUR:
        elites = best_by_behaviour(population.members)
        return elites[int(draw.integers(len(elites)))]
    island = int(draw.integers(ISLANDS))
    if draw.random() < MIGRATES:
        island = int(draw.integers(ISLANDS))
    here = [member for member in population.members if member.island == island] or list(population.members)
    some = [here[int(i)] for i in draw.integers(len(here), size=TOURNAMENT)]
    return max(some, key=lambda member: (member.fitness, -member.number))


def best_by_behaviour(members: Sequence[Member]) -> list[Member]:
    """The best member of each behaviour that occurs, best first (MAP-Elites, arXiv 1504.04909)."""
    found: dict[str, Member] = {}
    for member in members:
        best = found.get(member.behaviour)
        if best is None or (member.fitness, -member.number) > (best.fitness, -best.number):
            found[member.behaviour] = member
    return sorted(found.values(), key=lambda member: (-member.fitness, member.number))
