"""A language model as the inventor: shown what was tried and how it fared, asked for objectives unlike those."""

from collections.abc import Callable

import numpy as np

from sartor.discover.language.expression import LanguageError
from sartor.discover.language.parse import LONGEST, parse
from sartor.discover.propose.answers import Answer, read_answers
from sartor.discover.propose.endpoint import Endpoint, Exchange, tokens_of
from sartor.discover.propose.prompt import drawn_parents, question
from sartor.discover.propose.proposal import Population, Proposal

MOST_ASKED = 8  # objectives in one answer: the later ones of a long list repeat the earlier ones
LONGEST_ANSWER, SHORTEST_ANSWER = 8192, 512  # tokens that an answer may have, and below which it is not worth asking
FAILED_IN_A_ROW = 3  # questions without an answer, after which an endpoint is given up
NO_OBJECTIVE = "no objective found in the answer: wanted a JSON list of objects with name, thought and code"
CUT = "the answer ended within this one: wanted shorter thoughts, or fewer objectives"


class ModelProposer:
    """Asks a language model for objectives.

    Its texts are parsed and never executed. What is none becomes a proposal with a ``refusal``, so that the model can
    be shown why. ``exhausted`` says why it asks no more: a cap is reached, or the endpoint does not answer; empty while
    it asks. A cap can be passed only by what was estimated, and by what tries that timed out are charged.

    Args:
        endpoint: where the model is, and what may be spent.
        keep: is handed every exchange, failed ones too, and gives its number.
        spent_tokens: of earlier exchanges of this run, questions and answers.
        spent_cost: of earlier exchanges of this run.
    """

    name = "model"

    def __init__(
        self,
        endpoint: Endpoint,
        keep: Callable[[Exchange], int],
        spent_tokens: int = 0,
        spent_cost: float = 0.0,
    ) -> None:
        self.endpoint = endpoint
        self.keep = keep
        self.spent_tokens = spent_tokens
        self.spent_cost = spent_cost
        self.exhausted = ""
        self._failed = 0
        self._room(0)

    def propose(self, population: Population, count: int, draw: np.random.Generator) -> list[Proposal]:
        """At most ``count`` proposals, and at most 8, from one question; none where there is no answer.

        The same state of ``draw`` puts the same question with the same seed; whether the same answer comes is up to
        the endpoint.
        """
        if self.exhausted:
            return []
        asked = min(count, MOST_ASKED)
        parents = drawn_parents(population, draw)
        messages = question(population, parents, asked)
        seed = int(draw.integers(2**31))
        longest = self._room(tokens_of(messages))
        if self.exhausted:
            return []
        exchange = self.endpoint.ask(messages, longest, seed)
        number = self.keep(exchange)
        self._account(exchange)
        if exchange.error:
            return []
        answers = read_answers(exchange.reply)
        if not answers:
            return [Proposal(None, self.name, text=exchange.reply[:LONGEST], refusal=NO_OBJECTIVE, exchange=number)]
        numbers = tuple(member.number for member in parents)
        return [self._proposal(answer, numbers, number) for answer in answers[:asked]]

    def _proposal(self, answer: Answer, parents: tuple[int, ...], exchange: int) -> Proposal:
        tree, refusal = None, CUT
        if not answer.cut:
            try:
                tree, refusal = parse(answer.code), ""
            except LanguageError as error:
                refusal = str(error)
            except RecursionError:
                refusal = "nested too deeply to be read"
        return Proposal(tree, self.name, parents, answer.code[:LONGEST], answer.name, answer.thought, refusal, exchange)

    def _room(self, tokens_in: int) -> int:
        """Tokens that the answer to a question of so many may have; sets ``exhausted`` where a cap leaves too few."""
        endpoint, room = self.endpoint, LONGEST_ANSWER
        if endpoint.max_tokens is not None:
            room = min(room, endpoint.max_tokens - self.spent_tokens - tokens_in)
            if room < SHORTEST_ANSWER:
                self.exhausted = f"max_tokens {endpoint.max_tokens:,}: {self.spent_tokens:,} are spent"
        if endpoint.max_cost is not None:
            left = endpoint.max_cost - self.spent_cost - endpoint.cost(tokens_in, SHORTEST_ANSWER)
            if left <= 0:
                self.exhausted = f"max_cost {endpoint.max_cost:g}: {self.spent_cost:.4g} is spent"
            elif endpoint.price_out:
                room = min(room, SHORTEST_ANSWER + int(left * 1e6 / endpoint.price_out))
        return room

    def _account(self, exchange: Exchange) -> None:
        self.spent_tokens += exchange.tokens_in + exchange.tokens_out
        self.spent_cost += exchange.cost
        self._failed = self._failed + 1 if exchange.error else 0
        if self._failed >= FAILED_IN_A_ROW:
            self.exhausted = f"{self._failed} questions in a row without an answer; the last one: {exchange.error}"
        self._room(0)
