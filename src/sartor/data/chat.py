"""Text to token trees. The only code that knows about chat templates.

A conversation is rendered by the tokenizer's own template, the whole of it, and only then tokenized; what belongs to
the completion is read off as everything after the tokens that it shares with the rendered prompt. Plain strings are
tokenized as they stand. Either way each completion ends with one end-of-turn token and no sequence has two BOS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError

from sartor.data.trees import TokenIds, TokenTree
from sartor.errors import UserError
from sartor.types import Comparison, Conversation, Demonstration, Judged, Message, Ranking, Text

# For a tokenizer without a chat template: the transcript form of Anthropic's HH data. The prompt ends on the colon,
# since the space after it belongs to the answer's first word in most vocabularies.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '\n\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(m['role'], m['role'].title())"
    " + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

END_SEARCH = 4  # a template's end-of-turn token stands among a completion's last few, maybe followed by a newline


@dataclass(frozen=True)
class Encoded:
    """Token trees of a data set, and what had to be done to them.

    ``index[i]`` is the place in the input of ``trees[i]``, ``cut[i]`` how many tokens its prompt lost at the start.
    ``boundary``: rows whose prompt tokens are no prefix of prompt plus completion, split at the longest common prefix.
    ``too_long``: rows left out because a completion alone exceeds the limit.
    """

    trees: list[TokenTree]
    index: list[int]
    cut: list[int] = field(default_factory=list)
    boundary: int = 0
    too_long: int = 0

    @property
    def prompt_cut(self) -> int:
        """Rows that lost the start of their prompt."""
        return sum(lost > 0 for lost in self.cut)

    def notes(self, max_length: int) -> list[str]:
        """One line for each thing that a reader of the results should know."""
        what_happened = {
            f"start of the prompt cut to fit max_length {max_length}": self.prompt_cut,
            f"left out, since a completion alone exceeds max_length {max_length}": self.too_long,
            "prompt and completion merge at their boundary, split at the longest common prefix": self.boundary,
        }
        total = len(self.trees) + self.too_long
        return [f"{count} of {total} rows: {what}" for what, count in what_happened.items() if count]


@dataclass(frozen=True, slots=True)
class _Case:
    """A prompt, its answers, and what its tree is to carry."""

    prompt: Text
    answers: tuple[Text, ...]
    carries: Mapping[str, Any]


def encode_preferences(
    tokenizer: Any,
    examples: Sequence[Comparison | Ranking | Judged],
    max_length: int,
    as_chat: bool = False,
    where: Sequence[object] | None = None,
    mismatched: Sequence[Text] | None = None,
) -> Encoded:
    """Comparisons, rankings and judged completions as token trees, one tree an example.

    ``as_chat`` treats plain strings as one user turn and one assistant turn. A prompt too long for ``max_length`` loses
    its start (a leading BOS stays); a completion is never cut. ``where`` names rows in errors. ``mismatched`` is one
    answer to some other prompt for each example; what of it does not fit is cut, since it is there for an average only.
    """
    cases = [_case(example) for example in examples]
    if mismatched is not None:
        cases = [
            replace(case, answers=(*case.answers, other), carries={**case.carries, "mismatched": 1})
            for case, other in zip(cases, mismatched, strict=True)
        ]
    return _encode(tokenizer, cases, max_length, as_chat, where)


def encode_demonstrations(
    tokenizer: Any,
    examples: Sequence[Demonstration],
    max_length: int,
    as_chat: bool = False,
    where: Sequence[object] | None = None,
    train_on: str = "completion",
) -> Encoded:
    """Demonstrations as trees of one branch, which holds what is to be learned.

    ``train_on`` names the tokens to learn: ``completion``, the last answer; ``assistant``, every answer of the
    conversation, with the other turns between them as context; ``all``, the prompt too.
    """
    cases = [_Case(example.prompt, (example.completion,), {}) for example in examples]
    found = _encode(tokenizer, cases, max_length, as_chat, where)
    if train_on == "all":
        return replace(found, trees=[TokenTree((), (tree.prompt + tree.branches[0],)) for tree in found.trees])
    if train_on == "assistant":
        answers = _answers_in(tokenizer, [examples[i].prompt for i in found.index])
        parts = zip(found.trees, answers, found.cut, strict=True)
        return replace(found, trees=[_from_first_answer(tree, spans, cut) for tree, spans, cut in parts])
    return found


def _answers_in(tokenizer: Any, prompts: Sequence[Text]) -> list[list[tuple[int, int]]]:
    """Where in each prompt's tokens its earlier answers stand: [start, end) of every assistant turn but an opened one.

    A turn is what a rendering of the conversation up to it has beyond one that stops before it.
    """
    ends: list[_Rendered] = []
    owners: list[int] = []
    for i, prompt in enumerate(prompts):
        turns = () if isinstance(prompt, str) else prompt
        for j, turn in enumerate(turns[:-1]):
            if turn.role == "assistant" and j:
                ends += [_render(tokenizer, turns[:j], True), _render(tokenizer, turns[: j + 1], False)]
                owners.append(i)
    bounds = iter(_tokenize(tokenizer, ends))
    wholes = _tokenize(tokenizer, [_prompt(tokenizer, prompt, False) for prompt in prompts])
    found: list[list[tuple[int, int]]] = [[] for _ in prompts]
    for owner in owners:
        start, end = (_common_prefix(next(bounds), wholes[owner]) for _ in range(2))
        found[owner].append((start, end))
    return found


def _from_first_answer(tree: TokenTree, spans: Sequence[tuple[int, int]], cut: int) -> TokenTree:
    """The tree with everything from its first answer on as its branch, other turns unscored.

    ``spans`` are those of the earlier answers in the whole prompt, of which the tree lost ``cut`` tokens at the start.
    """
    answered = [
        place - cut for start, end in spans for place in range(start, end) if 0 < place - cut < len(tree.prompt)
    ]
    if not answered:
        return tree
    first = answered[0]
    context = set(range(len(tree.prompt))) - set(answered)
    unscored = frozenset(place - first for place in context if place > first)
    return TokenTree(tree.prompt[:first], (tree.prompt[first:] + tree.branches[0],), unscored=unscored)


def encode_documents(tokenizer: Any, texts: Sequence[str], max_length: int) -> Encoded:
    """Plain texts as trees without a prompt, each ending with EOS; long ones in pieces of ``max_length`` tokens."""
    special = _special_tokens(tokenizer)
    trees, index = [], []
    for i, ids in enumerate(_tokenize(tokenizer, [_Rendered(text, templated=False) for text in texts])):
        ended = _end_once(tokenizer, ids, special)
        pieces = [ended[start : start + max_length] for start in range(0, len(ended), max_length)]
        trees += [TokenTree((), (piece,)) for piece in pieces if len(piece) > 1]
        index += [i for piece in pieces if len(piece) > 1]
    return Encoded(trees, index)


def _case(example: Comparison | Ranking | Judged) -> _Case:
    match example:
        case Ranking():
            return _Case(example.prompt, example.completions, {"ranks": example.ranks})
        case Judged():
            return _Case(example.prompt, (example.completion,), {"good": (example.good,)})
    ranks = (1.0, 1.0) if example.tie else (1.0, 2.0)
    return _Case(example.prompt, (example.chosen, example.rejected), {"ranks": ranks, "strength": example.strength})


def _encode(
    tokenizer: Any, cases: Sequence[_Case], max_length: int, as_chat: bool, where: Sequence[object] | None
) -> Encoded:
    rendered_prompts: list[_Rendered] = []
    rendered_wholes: list[list[_Rendered]] = []
    for i, case in enumerate(cases):
        try:
            rendered_prompts.append(_prompt(tokenizer, case.prompt, as_chat))
            rendered_wholes.append([_whole(tokenizer, case.prompt, answer, as_chat) for answer in case.answers])
        except UserError as error:
            raise UserError(f"{where[i] if where else f'row {i + 1}'}: {error}") from error
    prompt_ids = _tokenize(tokenizer, rendered_prompts)
    whole_ids = iter(_tokenize(tokenizer, [whole for row in rendered_wholes for whole in row]))
    special = _special_tokens(tokenizer)
    trees, index, cut, boundary, too_long = [], [], [], 0, 0
    for i, rendered in enumerate(rendered_wholes):
        wholes = [next(whole_ids) for _ in rendered]
        own = len(wholes) - cases[i].carries.get("mismatched", 0)
        shared = min((_common_prefix(prompt_ids[i], whole) for whole in wholes[:own]), default=len(prompt_ids[i]))
        ended = [_end_once(tokenizer, whole[shared:], special) for whole in wholes]
        room = max_length - max(map(len, ended[:own]), default=0)
        if room < min(1, shared):
            too_long += 1
            continue
        kept = _keep_end(tokenizer, prompt_ids[i][:shared], room)
        boundary += shared < len(prompt_ids[i])
        cut.append(shared - len(kept))
        branches = (*ended[:own], *(branch[: max_length - len(kept)] for branch in ended[own:]))
        trees.append(TokenTree(kept, branches, **cases[i].carries))
        index.append(i)
    return Encoded(trees, index, cut, boundary, too_long)


def encode_prompts(tokenizer: Any, prompts: Sequence[Text], max_length: int, as_chat: bool = False) -> list[TokenIds]:
    """Prompts as a model reads them before it answers; too long ones lose their start."""
    rendered = _tokenize(tokenizer, [_prompt(tokenizer, prompt, as_chat) for prompt in prompts])
    return [_keep_end(tokenizer, ids, max_length) for ids in rendered]


def plain_template(tokenizer: Any) -> str:
    """The template for a tokenizer that has none, with a BOS where the tokenizer starts plain text with one."""
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if starts_with_bos else "") + PLAIN_TEMPLATE


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends an answer as the tokenizer's template writes it; EOS where it writes none."""
    turns = (Message("user", "a"), Message("assistant", "b"))
    (ids,) = _tokenize(tokenizer, [_render(tokenizer, turns, opens_answer=False)])
    special = _special_tokens(tokenizer)
    return next((token for token in reversed(ids[-END_SEARCH:]) if token in special), tokenizer.eos_token_id)


def as_conversation(text: Text, role: str) -> Conversation:
    """A string as one turn of ``role``; a conversation as it is."""
    return (Message(role, text),) if isinstance(text, str) else text


@dataclass(frozen=True)
class _Rendered:
    text: str
    templated: bool


def last_turn(text: Text) -> str:
    """What is said last, which is what people read of a prompt."""
    return text if isinstance(text, str) else text[-1].content


def _prompt(tokenizer: Any, prompt: Text, as_chat: bool) -> _Rendered:
    if isinstance(prompt, str) and not as_chat:
        return _Rendered(prompt, templated=False)
    return _render(tokenizer, as_conversation(prompt, "user"), opens_answer=True)


def _whole(tokenizer: Any, prompt: Text, answer: Text, as_chat: bool) -> _Rendered:
    if isinstance(prompt, str) and isinstance(answer, str) and not as_chat:
        return _Rendered(prompt + answer.removesuffix(tokenizer.eos_token), templated=False)
    turns = as_conversation(answer, "assistant")
    last = Message(turns[-1].role, turns[-1].content.removesuffix(tokenizer.eos_token))
    return _render(tokenizer, (*as_conversation(prompt, "user"), *turns[:-1], last), opens_answer=False)


def _render(tokenizer: Any, conversation: Conversation, opens_answer: bool) -> _Rendered:
    messages = [{"role": message.role, "content": message.content} for message in conversation]
    continues = opens_answer and bool(messages) and messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=opens_answer and not continues,
            continue_final_message=continues,
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message.role for message in conversation)
        raise UserError(f"the model's chat template refuses a conversation with the turns {roles}: {error}") from error
    return _Rendered(text, templated=True)


def _tokenize(tokenizer: Any, texts: Sequence[_Rendered]) -> list[TokenIds]:
    """Token ids of each text: a template writes its own special tokens, a plain string gets the tokenizer's."""
    ids: list[TokenIds] = [()] * len(texts)
    for templated in (True, False):
        chosen = [i for i, text in enumerate(texts) if text.templated == templated]
        if chosen:
            batch = tokenizer([texts[i].text for i in chosen], add_special_tokens=not templated)["input_ids"]
            for i, row in zip(chosen, batch, strict=True):
                # Some tokenizers close every text with EOS, prompts too; completions get theirs in _end_once.
                closed = not templated and row[-1:] == [tokenizer.eos_token_id] and len(row) > 1
                doubled = len(row) > 1 and row[0] == row[1] == tokenizer.bos_token_id
                ids[i] = tuple(row[int(doubled) : len(row) - int(closed)])
    return ids


def _end_once(tokenizer: Any, completion: TokenIds, special: set[int]) -> TokenIds:
    """The completion with an end-of-turn token: the template's own where it writes one, else EOS."""
    ended = special.intersection(completion[-END_SEARCH:])
    return completion if ended else (*completion, tokenizer.eos_token_id)


def _special_tokens(tokenizer: Any) -> set[int]:
    """EOS and all tokens that are no text: a base model's end of turn often is one without a role of its own."""
    return {tokenizer.eos_token_id, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def _keep_end(tokenizer: Any, prompt: TokenIds, room: int) -> TokenIds:
    if len(prompt) <= room:
        return prompt
    if room > 1 and prompt[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in prompt[1:]:
        return (prompt[0], *prompt[len(prompt) - room + 1 :])
    return prompt[len(prompt) - room :]


def _common_prefix(first: TokenIds, second: TokenIds) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
