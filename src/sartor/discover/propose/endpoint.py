"""An OpenAI-compatible endpoint, local (vLLM, llama.cpp, Ollama) or hosted, asked within bounds of time and money."""

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAI, OpenAIError, Timeout

from sartor.discover.propose.answers import LONGEST_REPLY, plain
from sartor.errors import UserError, unknown
from sartor.types import Message

CONNECT_SECONDS, CHECK_SECONDS = 10.0, 20.0
BACKOFF, LONGEST_BACKOFF = 1.0, 60.0  # seconds before the first try anew, doubled for each later one
BUSY = (408, 409, 429)  # HTTP statuses that pass, as do those of 500 and more
BYTES_A_TOKEN = (
    2.5  # where an endpoint does not count: formulas have short tokens (2.7 by smollm2), and caps should hold
)
LONGEST_ERROR = 300  # characters
NO_KEY = "none"  # the client wants one, local servers do not look at it

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """A question to a model and what came of it, all tries together.

    ``tokens_in`` and ``tokens_out`` are what is charged, and ``cost`` is their price. ``estimated`` where the endpoint
    did not count them, or where a try timed out, which it may have answered and charged in full. ``error`` says why
    there is no answer; empty if there is one.
    """

    messages: tuple[Message, ...]
    reply: str
    model: str
    tokens_in: int
    tokens_out: int
    cost: float
    seconds: float
    attempts: int
    error: str = ""
    estimated: bool = False


@dataclass(frozen=True)
class _Reply:
    text: str
    model: str
    usage: tuple[int, int] | None


@dataclass(frozen=True)
class _Trouble:
    """Why a request brought no answer; ``again`` where another try may, after ``wait`` seconds at least."""

    why: str
    status: int = 0
    again: bool = False
    wait: float = 0.0
    charged: bool = False


@dataclass(frozen=True)
class Endpoint:
    """Where a model is, and what may be spent on it.

    Args:
        base_url: of the API, as in ``http://localhost:8000/v1``.
        model: its name there.
        key_variable: the environment variable that holds the key. The key itself is read for each request and kept
            nowhere, so that nothing that prints or stores an endpoint can show it. Local servers need none.
        timeout: seconds for one request. A question with all its tries takes at most ``retries + 1`` times that.
        retries: tries anew where the endpoint is busy, silent or away.
        max_tokens: of a run, questions and answers together; no cap if None.
        max_cost: of a run, in the currency of the prices; no cap if None.
        price_in: of a million tokens of questions.
        price_out: of a million tokens of answers.
        temperature: of sampling.

    Raises:
        UserError: an address or a name of a variable that is none, or a cap on costs without prices.
    """

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 180.0
    retries: int = 2
    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        # Neither text is repeated: a key or a password may have been put in its place by mistake.
        if not _is_address(self.base_url):
            raise UserError(
                "endpoint: wanted an address like http://localhost:8000/v1, without a user, password or query"
            )
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable):
            raise UserError(
                "endpoint key: wanted the name of an environment variable in capitals, such as OPENAI_API_KEY, "
                "and not a key: export it under that name"
            )
        if self.max_cost is not None and not self.price_in + self.price_out > 0:
            raise UserError(f"max_cost {self.max_cost:g} without prices: give price_in and price_out, or max_tokens")

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """The price of so many tokens."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def check(self) -> None:
        """Ask for the list of models, before a run begins.

        Raises:
            UserError: the endpoint is not there, asks for a key, refuses it, or does not know the model.
        """
        found = self._request(CHECK_SECONDS, lambda client: client.models.with_raw_response.list().http_response.json())
        where = f"endpoint {self.base_url}"
        match found:
            case _Trouble(status=401 | 403) if not self._key():
                raise UserError(f"{where}: it asks for a key, and {self.key_variable} is not set: export it")
            case _Trouble(status=401 | 403):
                raise UserError(f"{where}: it refuses the key in {self.key_variable}: {found.why}")
            case _Trouble(status=404):
                raise UserError(
                    f"{where}: wanted a list of models at /models, got {found.why}: does the address lack /v1?"
                )
            case _Trouble():
                raise UserError(f"{where}: {found.why}: is the server running, and the address right?")
            case {"data": [*models]} | [*models]:
                names = [str(model.get("id")) for model in models if isinstance(model, dict)]
            case {"data": None}:  # Ollama's way to say that it has none
                names = []
            case _:
                raise UserError(f"{where}: wanted a list of models at /models, got {_excerpt(str(found))}")
        # Ollama and Gemini take these names without what they list with them.
        short = {name.removesuffix(":latest").removeprefix("models/") for name in names}
        if self.model not in short.union(names):
            raise unknown(f"model at {self.base_url}", self.model, names or ["none"])

    def ask(self, messages: Sequence[Message], longest: int, seed: int) -> Exchange:
        """Put a question, with tries anew where that may help; what the endpoint does wrong is told, not raised.

        Args:
            messages: the conversation so far.
            longest: tokens that the answer may have.
            seed: of sampling, for servers that honour it.
        """
        started = time.monotonic()
        deadline = started + (self.retries + 1) * self.timeout
        options = {"max_tokens": longest, "temperature": self.temperature, "seed": seed}
        attempts = failed = unanswered = 0
        while True:
            attempts += 1
            outcome = self._chat(messages, options, min(self.timeout, deadline - time.monotonic()))
            if isinstance(outcome, _Reply):
                break
            unanswered += outcome.charged
            if time.monotonic() < deadline and _left_out(options, outcome):
                continue
            wait = max(outcome.wait, min(BACKOFF * 2**failed, LONGEST_BACKOFF))
            failed += 1
            if not outcome.again or failed > self.retries or time.monotonic() + wait >= deadline:
                break
            time.sleep(wait)
        return self._exchange(messages, outcome, attempts, time.monotonic() - started, unanswered, longest)

    def _chat(self, messages: Sequence[Message], options: dict[str, Any], seconds: float) -> _Reply | _Trouble:
        """One request."""
        written: Any = [{"role": message.role, "content": message.content} for message in messages]

        def send(client: OpenAI) -> Any:
            create = client.chat.completions.with_raw_response.create
            return create(model=self.model, messages=written, **options).http_response.json()

        found = self._request(seconds, send)
        if isinstance(found, _Trouble):
            return found
        match found:
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                pass
            case {"choices": [{"message": {}}, *_]}:
                text = ""  # a reasoning model that spent all its tokens on thinking: charged, like any answer
            case _:
                return _Trouble(f"wanted a chat completion, got {self._clean(str(found))}")
        usage = None
        match found.get("usage"):
            case {"prompt_tokens": int(tokens_in), "completion_tokens": int(tokens_out)}:
                usage = (tokens_in, tokens_out)
        return _Reply(text, self._clean(str(found.get("model") or self.model)), usage)

    def _request(self, seconds: float, send: Callable[[OpenAI], T]) -> T | _Trouble:
        """What ``send`` brings, or why it brings nothing: all that an endpoint and a network can do wrong."""
        client = OpenAI(
            base_url=self.base_url,
            api_key=self._key() or NO_KEY,
            max_retries=0,
            timeout=Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
        )
        try:
            return _within(seconds, lambda: send(client))
        except (TimeoutError, APITimeoutError):
            return _Trouble(f"no answer within {seconds:.3g} s", again=True, charged=True)
        except APIConnectionError as error:
            return _Trouble(f"no connection: {self._clean(str(error.__cause__ or error))}", again=True)
        except APIStatusError as error:
            status = error.status_code
            said = error.body.get("message") if isinstance(error.body, dict) else error.body
            return _Trouble(
                f"HTTP {status}: {self._clean(str(said or error.message))}",
                status,
                again=status in BUSY or status >= 500,
                wait=_seconds(error.response.headers.get("retry-after")),
            )
        except (OpenAIError, ValueError, RecursionError) as error:
            return _Trouble(f"no JSON of an OpenAI-compatible API: {self._clean(str(error))}")
        finally:
            client.close()

    def _exchange(
        self,
        messages: Sequence[Message],
        outcome: _Reply | _Trouble,
        attempts: int,
        seconds: float,
        unanswered: int,
        longest: int,
    ) -> Exchange:
        """The account of a question, the tries that timed out included."""
        asked = tokens_of(messages)
        text, model, error, usage = "", self.model, "", (0, 0)
        estimated = unanswered > 0
        if isinstance(outcome, _Reply):
            text, model = plain(self._hidden(outcome.text)[:LONGEST_REPLY]), outcome.model
            error = "" if text.strip() else "the answer is empty"
            usage = outcome.usage or (asked, tokens_of([Message("assistant", outcome.text)]))
            estimated |= outcome.usage is None
        else:
            error = outcome.why
        tokens_in, tokens_out = usage[0] + unanswered * asked, usage[1] + unanswered * longest
        cost = self.cost(tokens_in, tokens_out)
        return Exchange(tuple(messages), text, model, tokens_in, tokens_out, cost, seconds, attempts, error, estimated)

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        # What cannot stand in a header would be told by the client's own error, in a spelling that hides from _hidden.
        if not (key.isascii() and key.isprintable()) or set(key) & set(" \"'\\"):
            raise UserError(f"environment variable {self.key_variable}: wanted a key, got characters that no key has")
        return key

    def _hidden(self, text: str) -> str:
        """The text without the key, which servers repeat when they refuse it."""
        key = self._key()
        return text.replace(key, "***") if key else text

    def _clean(self, text: str) -> str:
        return _excerpt(self._hidden(text))


def tokens_of(messages: Sequence[Message]) -> int:
    """About how many tokens a conversation has, rather too many than too few."""
    return sum(math.ceil(len(message.content.encode("utf-8", "replace")) / BYTES_A_TOKEN) + 4 for message in messages)


def _is_address(url: str) -> bool:
    """Whether a client can use it, and anybody may read it."""
    try:
        parts = urlsplit(url)
        has_secret = parts.username is not None or bool(parts.query)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not has_secret
    except ValueError:
        return False


def _left_out(options: dict[str, Any], trouble: _Trouble) -> bool:
    """Whether a refusal names an option, which is then left out: servers differ in what they take."""
    if trouble.status not in (400, 422):
        return False
    for name in options:
        # The cap is renamed and never left out: what a run may cost rests on it.
        if name != "max_completion_tokens" and re.search(rf"\b{name}\b", trouble.why):
            value = options.pop(name)
            if name == "max_tokens":
                options["max_completion_tokens"] = value  # what hosted reasoning models call it
            return True
    return False


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Do it in a thread of its own, which is left behind if it takes longer.

    The client's time-out is one of silence: servers that keep a stalled request alive with blanks never meet it.

    Raises:
        TimeoutError: it takes longer.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # told in the thread that waits
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result(timeout=seconds)


def _seconds(header: str | None) -> float:
    """What a Retry-After says, if it says a number of seconds."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _excerpt(text: str) -> str:
    line = " ".join(plain(text[: 10 * LONGEST_ERROR]).split())
    return line if len(line) <= LONGEST_ERROR else f"{line[: LONGEST_ERROR - 1]}…"
