import logging
import pickle
import socket
import time
from dataclasses import asdict, replace

import pytest

from sartor.discover.propose.endpoint import Endpoint, Exchange, tokens_of
from sartor.errors import UserError
from sartor.types import Message

KEY = "sk-very.secret-123"
MESSAGES = (Message("system", "You invent."), Message("user", "Invent!"))


@pytest.fixture
def endpoint(script) -> Endpoint:
    return Endpoint(script.url, "inventor", timeout=5.0)


def asked(endpoint: Endpoint) -> Exchange:
    return endpoint.ask(MESSAGES, longest=1000, seed=7)


def no_server() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}/v1"


def test_an_exchange_tells_what_was_said_and_what_it_cost(script, endpoint) -> None:
    script.says("an answer", usage=(1000, 500))
    found = asked(replace(endpoint, price_in=2.0, price_out=8.0))
    assert found == Exchange(MESSAGES, "an answer", "inventor-2", 1000, 500, 0.006, found.seconds, attempts=1)
    assert script.asked == [
        {
            "model": "inventor",
            "messages": [{"role": "system", "content": "You invent."}, {"role": "user", "content": "Invent!"}],
            **{"max_tokens": 1000, "temperature": 1.0, "seed": 7},
        }
    ]


@pytest.mark.parametrize("usage", [None, ("many", 3)])
def test_where_usage_is_not_told_it_is_estimated(script, endpoint, usage) -> None:
    script.says("an answer", usage)
    found = asked(endpoint)
    assert found.estimated
    assert found.tokens_in == tokens_of(MESSAGES) > 0
    assert found.tokens_out == tokens_of([Message("assistant", "an answer")])


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_passes_is_tried_anew(script, endpoint, status) -> None:
    script.refuses(status, "busy")
    script.says("an answer")
    found = asked(endpoint)
    assert (found.reply, found.error, found.attempts, found.estimated) == ("an answer", "", 2, False)


def test_a_server_says_how_long_to_wait(script, endpoint) -> None:
    script.refuses(429, "busy", Retry_After="0.3")
    script.says("an answer")
    assert 0.3 < asked(endpoint).seconds < 3


def test_a_wait_that_would_end_too_late_is_not_waited_for(script, endpoint) -> None:
    script.refuses(429, "come back tomorrow", Retry_After="86400")
    found = asked(endpoint)
    assert found.seconds < 3
    assert (found.error, found.attempts) == ("HTTP 429: come back tomorrow", 1)


def test_tries_are_bounded(script, endpoint) -> None:
    found = asked(replace(endpoint, retries=3))
    assert (found.attempts, len(script.asked)) == (4, 4)
    assert found.error == "HTTP 500: the script is over"
    assert (found.reply, found.tokens_in, found.tokens_out, found.estimated) == ("", 0, 0, False)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_does_not_pass_is_not_tried_anew(script, endpoint, status) -> None:
    script.refuses(status, "no")
    assert (asked(endpoint).error, len(script.asked)) == (f"HTTP {status}: no", 1)


@pytest.mark.parametrize("how", ["stalls", "drips"])
def test_an_endpoint_that_stalls_is_left_in_time_and_counted_as_charged(script, endpoint, how) -> None:
    getattr(script, how)()
    getattr(script, how)()
    found = asked(replace(endpoint, timeout=0.3, retries=1, price_out=1.0))
    assert found.seconds < 2
    assert found.attempts >= 1
    assert found.error.startswith("no answer within 0.")
    assert found.tokens_out == found.attempts * 1000
    assert found.cost == pytest.approx(found.tokens_out / 1e6)
    assert found.estimated


def test_an_answer_after_a_time_out_counts_both(script, endpoint) -> None:
    script.stalls()
    script.says("an answer", usage=(30, 20))
    found = asked(replace(endpoint, timeout=0.5))
    assert (found.reply, found.attempts, found.estimated) == ("an answer", 2, True)
    assert (found.tokens_in, found.tokens_out) == (30 + tokens_of(MESSAGES), 20 + 1000)


def test_a_refused_connection_is_told(script) -> None:
    found = asked(Endpoint(no_server(), "inventor", retries=1))
    assert found.error.startswith("no connection: ")
    assert "refused" in found.error
    assert (found.attempts, found.tokens_in, found.tokens_out) == (2, 0, 0)


def test_options_that_a_server_refuses_are_left_out(script, endpoint) -> None:
    script.refuses(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    script.refuses(422, "seed: extra fields are not permitted")
    script.says("an answer")
    found = asked(replace(endpoint, retries=0))
    assert (found.reply, found.attempts) == ("an answer", 3)
    assert set(script.asked[-1]) == {"model", "messages", "temperature", "max_completion_tokens"}


BODIES = [
    b"<html>",
    b"[" * 200_000,
    [],
    {},
    {"choices": []},
    {"choices": [{"message": "hi"}]},
    {"choices": None},
    "text",
    b"",
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body)[:20])
def test_what_is_no_completion_is_told_in_one_line(script, endpoint, body) -> None:
    script.sends(200, body)
    found = asked(endpoint)
    assert found.error
    assert len(found.error) < 400
    assert "\n" not in found.error
    assert len(script.asked) == 1


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_an_empty_answer_is_charged_and_an_error(script, endpoint, content) -> None:
    script.says(content)
    found = asked(endpoint)
    assert (found.error, found.tokens_in, found.tokens_out) == ("the answer is empty", 100, 50)


def test_a_reply_can_be_stored_whatever_it_holds(script, endpoint) -> None:
    script.says("\ud800\x00 good " + "x" * 3_000_000)
    found = asked(endpoint)
    assert found.reply.startswith("? good x")
    assert len(found.reply.encode()) <= 100_000


@pytest.mark.parametrize("reply", ["repeats", "refuses", "away"])
def test_a_key_reaches_the_server_and_nothing_else(script, monkeypatch, caplog, capsys, reply) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    endpoint = Endpoint(script.url, "inventor", key_variable="MY_KEY", retries=0)
    if reply == "repeats":
        script.says(f"your key is {KEY}")
    if reply == "refuses":
        script.key = "another"
        with pytest.raises(UserError) as refused:
            endpoint.check()
        assert "refuses the key in MY_KEY: HTTP 401: wrong key: ***" in str(refused.value)
        assert KEY not in str(refused.getrepr(showlocals=False))
    found = asked(replace(endpoint, base_url=no_server()) if reply == "away" else endpoint)
    assert bool(found.reply) == (reply == "repeats")
    assert reply == "away" or set(script.keys) == {KEY}
    told = [repr(endpoint), repr(asdict(endpoint)), repr(found), caplog.text, *capsys.readouterr()]
    assert not any(KEY in text for text in told)
    assert KEY.encode() not in pickle.dumps([endpoint, found])


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-…", "sk a", 'sk-"'])
def test_a_key_that_is_none_is_refused_without_telling_it(script, monkeypatch, key) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY: wanted a key") as refused:
        asked(Endpoint(script.url, "inventor"))
    assert key not in str(refused.value)


def test_a_server_that_is_ready_passes(script, endpoint) -> None:
    script.models = ["inventor", "llama3:latest"]
    endpoint.check()
    replace(endpoint, model="llama3").check()


def test_a_model_that_is_not_there_is_told_with_those_that_are(script, endpoint) -> None:
    with pytest.raises(UserError) as refused:
        replace(endpoint, model="invented").check()
    assert str(refused.value) == (
        f"unknown model at {script.url} 'invented': did you mean 'inventor'? known: inventor, other"
    )


def test_a_server_without_models_is_told_before_a_run(script, endpoint) -> None:
    script.models = []
    with pytest.raises(UserError, match=r"unknown model at .* 'inventor': known: none"):
        endpoint.check()


def test_a_server_that_asks_for_a_key_is_told_before_a_run(script, endpoint) -> None:
    script.key = KEY
    with pytest.raises(UserError, match="it asks for a key, and OPENAI_API_KEY is not set"):
        endpoint.check()


def test_a_server_that_is_not_there_is_told_before_a_run(script) -> None:
    with pytest.raises(UserError, match=r"no connection: .*refused.*: is the server running"):
        Endpoint(no_server(), "inventor").check()


def test_an_address_without_its_path_is_told_before_a_run(script, endpoint) -> None:
    with pytest.raises(UserError, match="HTTP 404: nothing here: does the address lack /v1"):
        replace(endpoint, base_url=script.url.removesuffix("/v1")).check()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"base_url": "localhost:8000"}, "endpoint: wanted an address"),
        ({"base_url": "http://host:port/v1"}, "endpoint: wanted an address"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "endpoint: wanted an address"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "endpoint: wanted an address"),
        ({"key_variable": KEY}, "endpoint key: wanted the name"),
        ({"max_cost": 5.0}, "max_cost 5 without prices"),
    ],
)
def test_wrong_options_are_refused_without_repeating_a_secret(options, why) -> None:
    with pytest.raises(UserError, match=why) as refused:
        Endpoint(**{"base_url": "http://localhost:8000/v1", "model": "inventor", **options})
    assert KEY not in str(refused.value)


def test_a_run_is_not_held_up_by_a_check(script, endpoint, monkeypatch) -> None:
    monkeypatch.setattr("sartor.discover.propose.endpoint.CHECK_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(UserError, match=r"no answer within 0\.2 s"):
            Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "inventor").check()
    assert time.monotonic() - began < 2
