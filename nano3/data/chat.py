"""Conversations to token ids and a mask of what to learn, through the tokenizer's own chat template.

A template turns messages into one text; it does not say which characters the assistant wrote, nor which are control
tokens and which were typed.  Templates may mark the assistant's words ({% generation %}), but Nemotron's does not.  The
usual way out, rendering longer and longer prefixes of the conversation and comparing, fails on it: what an earlier turn
looks like depends on the turns that follow (reasoning is removed from all but the last ones), so prefixes are not
prefixes.  Here the whole conversation is rendered once, and two questions are answered about that text.

1. *Which control tokens are the template's?*  Before rendering, every control token that is written out in a message
   is replaced by a private character.  What is still written as a control token afterwards comes from the template and
   becomes an id; the private characters turn back into what was typed, encoded as ordinary text.  Nothing else in the
   messages changes, so a template that trims, splits or looks for words does as before.  To be sure, the text with the
   private characters turned back must equal the true rendering; if a template treats typed tokens as its own, this
   conversation is refused rather than guessed at.  An assistant may write <think> and <tool_call> itself, since in many
   data sets that is how they arrive; with `reasoning_content` or `tool_calls` beside it, those too are only text.

2. *What did the assistant generate?*  At inference a turn begins after the generation prompt, so the template is asked
   for that prompt once, with thinking on and off.  In the rendered text each place where the part common to all turns
   (`<|im_start|>assistant\\n`) stands begins a turn.  It contains a control token, or its text is guarded like one, so
   no message can fake it, and there must be as many as assistant messages.  The turn's longest matching prompt is
   context; from there to the end token, which the model must learn to say, it is learnt.  So `<think></think>`, which a
   template puts before an answer without reasoning, is not learnt, and `\\n</think>\\n` after a reasoning is.

Text is encoded in the pieces between control tokens, as any tokenizer does, with one cut more: where a learnt turn
begins.  Inference has that cut too, since the prompt is encoded without knowing what will follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nano3.config import UserError
from nano3.data.records import Record, RecordError
from nano3.data.tokenizer import Tokenizer, pattern_of

LOSS_MODES = ("assistant", "last_turn", "full")
THINK, TOOL_CALL = {"<think>", "</think>"}, {"<tool_call>", "</tool_call>"}
FIRST_PRIVATE, PRIVATE = 0xF0000, re.compile("[\U000f0000-\U000ffffd]")  # a plane of characters without a meaning
ROLES = {"human": "user", "gpt": "assistant"}  # names in older data sets


class Encoded(NamedTuple):
    """A conversation of T tokens."""

    ids: np.ndarray  # (T,) int64
    learn: np.ndarray  # (T,) bool: tokens that the model is to say


class Turn(NamedTuple):
    start: int  # the first character that the assistant generated
    end: int  # behind its end token


class ChatFormat:
    """A tokenizer's template, made ready.

    template: Jinja text; None: the tokenizer's own.  loss_mode: learn what the `assistant` said, only its `last_turn`
    (all that follows the last user message), or everything (`full`).  options: variables for the template, such as
    enable_thinking or truncate_history_thinking.  The date is not offered to templates: data must not change overnight.
    Raises UserError if there is no template, or one whose turns cannot be told apart.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        loss_mode: str = "assistant",
        options: dict[str, Any] | None = None,
    ) -> None:
        if loss_mode not in LOSS_MODES:
            raise UserError(f"dataset.loss_mode={loss_mode} is unknown; use one of {', '.join(LOSS_MODES)}")
        if (template := template or tokenizer.chat_template) is None:
            raise UserError(
                "dataset.chat_template is not set and the tokenizer brings none; set it to the path of a Jinja file, "
                "or choose the tokenizer of a chat model with tokenizer.tokenizer_model"
            )
        if not tokenizer.specials:
            raise UserError("tokenizer.tokenizer_model: chat needs control tokens, and this tokenizer has none")
        self.tokenizer, self.loss_mode, self.options = tokenizer, loss_mode, options or {}
        self._template = compile_template(template)
        self._control = re.compile(pattern_of(tokenizer.specials))
        self._header, self._prompts = self._learn_prompts()
        guarded = set(tokenizer.specials)
        if not self._control.search(self._header):
            guarded.add(self._header.strip())
        self._guarded = sorted(guarded)
        self._private = {text: chr(FIRST_PRIVATE + i) for i, text in enumerate(self._guarded)}
        self._restore = {ord(char): text for text, char in self._private.items()}
        self._check_pieces()

    def encode(self, record: Record, place: str = "conversation") -> Encoded:
        """The ids of {"messages": [...], "tools": [...]} and what to learn of them.

        A message has a role and content (text, null or text parts); an assistant's may have reasoning_content,
        tool_calls and weight (0: not to be learnt).  Raises RecordError, naming `place`, if it cannot be used.
        """
        messages, tools = conversation(record, place)
        text, typed = self._guarded_text(messages, tools, place)
        if typed and text.translate(self._restore) != self._render(messages, tools, place):
            raise RecordError(
                f"{place}: a message has the text of a control token in it, and the chat template does something else "
                "because of it; remove that text from the messages"
            )
        turns = self._turns(text, place)
        said = [m for m in messages if m["role"] == "assistant"]
        if len(turns) != len(said):
            raise RecordError(
                f"{place}: {len(said)} assistant messages, but the chat template made {len(turns)} turns of them"
            )
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        recent = sum(m["role"] == "assistant" for m in messages[last_user + 1 :])
        first = len(turns) - recent if self.loss_mode == "last_turn" else 0
        learnt = [t for t, m in zip(turns[first:], said[first:], strict=True) if m.get("weight", 1) != 0]
        return self._ids(text, turns, learnt)

    def _render(self, messages: list[Record], tools: Any, place: str, **extra: Any) -> str:
        values = {"add_generation_prompt": False, **self.tokenizer.named, **self.options, **extra}
        try:
            return self._template.render(messages=messages, tools=tools, **values)
        except Exception as error:  # a template is a program of others: any error in it is about this conversation
            raise RecordError(f"{place}: the chat template refuses it ({type(error).__name__}: {error})") from None

    def _learn_prompts(self) -> tuple[str, list[str]]:
        """What begins every assistant turn, and the generation prompts, longest first."""
        user, place = {"role": "user", "content": "Hi"}, "dataset.chat_template"
        before = self._render([user], None, place)
        prompts, starts = set(), []
        for extra in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            plain = self._render([user], None, place, **extra)
            asked = self._render([user], None, place, **{**extra, "add_generation_prompt": True})
            if not asked.startswith(plain) or asked == plain:
                raise UserError(
                    "dataset.chat_template: add_generation_prompt adds nothing at the end of a conversation, so where "
                    "the assistant's turns begin is unknown; give a template that has a generation prompt"
                )
            prompts.add(asked[len(plain) :])
        call = {"type": "function", "function": {"name": "f", "arguments": {"k": "v"}}}
        for said in (
            {"content": "Yes."},
            {"content": "1</think>2"},
            {"content": "3", "reasoning_content": "4"},
            {"content": "", "tool_calls": [call]},
        ):
            for after in ([], [user, {"role": "assistant", "content": "Well."}]):
                try:
                    text = self._render([user, {"role": "assistant", **said}, *after], None, place)
                except RecordError:
                    continue  # a template need not know tools or reasoning
                if text.startswith(before):
                    starts.append(text[len(before) :])
        places = zip(*(self._atoms(text) for text in (*prompts, *starts)), strict=False)
        header = "".join(atoms[0] for atoms in takewhile(lambda atoms: len(set(atoms)) == 1, places))
        if not starts or not header.strip():
            raise UserError(
                "dataset.chat_template: an assistant's turn does not begin like the generation prompt "
                f"({min(prompts, key=len)!r}), so turns cannot be found; correct the template"
            )
        return header, sorted({*prompts, header}, key=len, reverse=True)

    def _atoms(self, text: str) -> list[str]:
        """Control tokens whole, everything else by character, so that no common prefix ends inside a token."""
        return re.findall(f"{self._control.pattern}|.", text, flags=re.DOTALL)

    def _guarded_text(self, messages: list[Record], tools: Any, place: str) -> tuple[str, bool]:
        """The rendered text, private characters in place of typed control tokens, and whether there are any."""
        typed = False

        def guard(value: Any, allowed: set[str]) -> Any:
            nonlocal typed
            if isinstance(value, dict):
                return {guard(k, allowed): guard(v, allowed) for k, v in value.items()}
            if isinstance(value, list):
                return [guard(v, allowed) for v in value]
            if not isinstance(value, str):
                return value
            if PRIVATE.search(value):
                raise RecordError(
                    f"{place}: has a private character of Unicode's plane 15, which stands for tokens here"
                )
            out = self._control_or_header.sub(lambda m: m[0] if m[0] in allowed else self._private[m[0]], value)
            typed |= out != value
            return out

        def allowed(message: Record) -> set[str]:
            if message["role"] != "assistant":
                return set()
            return (set() if message.get("reasoning_content") else THINK) | (
                set() if message.get("tool_calls") else TOOL_CALL
            )

        safe = [guard(m, allowed(m)) for m in messages]
        return self._render(safe, guard(tools, set()), place), typed

    @property
    def _control_or_header(self) -> re.Pattern[str]:
        return re.compile(pattern_of(self._guarded))  # re keeps compiled patterns

    def _turns(self, text: str, place: str) -> list[Turn]:
        ends = [m.end() for m in self._control.finditer(text) if self._is_end(m[0])]
        starts = [m.start() for m in re.finditer(re.escape(self._header), text)]
        turns = []
        for start, next_start in pairwise([*starts, len(text) + 1]):
            prompt = next(p for p in self._prompts if text.startswith(p, start))
            begin = start + len(prompt)
            end = next((e for e in ends if begin < e <= next_start), None)
            if end is None:
                names = [s for s, i in self.tokenizer.specials.items() if i in self.tokenizer.stop_ids]
                raise RecordError(
                    f"{place}: the chat template ends an assistant's turn with none of {names}, so the model would "
                    "never learn to stop; correct the template or the tokenizer's eos_token"
                )
            turns.append(Turn(begin, end))
        return turns

    def _is_end(self, token: str) -> bool:
        return self.tokenizer.specials[token] in self.tokenizer.stop_ids

    def _ids(self, text: str, turns: list[Turn], learnt: list[Turn]) -> Encoded:
        """Encode piece by piece; a piece lies wholly inside or outside of what is learnt."""
        cuts = [(t.start, t.start, None) for t in turns]
        controls = [(m.start(), m.end(), self.tokenizer.specials[m[0]]) for m in self._control.finditer(text)]
        ids: list[int] = []
        learn: list[bool] = []

        def add(new: list[int], at: int) -> None:
            ids.extend(new)
            learn.extend([self.loss_mode == "full" or any(t.start <= at < t.end for t in learnt)] * len(new))

        position = 0
        for start, end, token in sorted([*cuts, *controls, (len(text), len(text), None)], key=lambda c: c[:2]):
            if start > position:
                piece = text[position:start].translate(self._restore)
                add(self.tokenizer.encode(piece, special=False), position)
            if token is not None:
                add([token], start)
            position = end
        return Encoded(np.array(ids, dtype=np.int64), np.array(learn, dtype=bool))

    def _check_pieces(self) -> None:
        """Encoding piece by piece must give what the tokenizer makes of a whole text that nobody tampered with."""
        user, place = {"role": "user", "content": "What is 2 + 2?\n\n Tell me."}, "dataset.chat_template"
        text = self._render([user, {"role": "assistant", "content": "It is 4."}, user], None, place)
        pieces, whole = self._ids(text, [], []).ids.tolist(), self.tokenizer.encode(text)
        if pieces != whole:
            at = next((i for i, (a, b) in enumerate(zip(pieces, whole, strict=False)) if a != b), 0)
            raise UserError(
                f"tokenizer.tokenizer_model: its control tokens swallow text around them (at token {at} of a rendered "
                "chat), which chat data cannot be built with; use a tokenizer without lstrip and rstrip tokens"
            )


def conversation(record: Record, place: str) -> tuple[list[Record], Any]:
    """Messages and tools of a record, checked, in the form that templates expect."""
    messages = record.get("messages", record.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"{place}: expected 'messages', a list of at least one message, among its fields")
    tools = _parsed(record.get("tools")) or None
    if tools is not None and not isinstance(tools, list):
        raise RecordError(f"{place}: 'tools' must be a list, found {type(tools).__name__}")
    return [_message(m, f"{place}: message {i}") for i, m in enumerate(messages)], tools


def _message(message: Any, place: str) -> Record:
    if not isinstance(message, dict):
        raise RecordError(f"{place} must be an object, found {type(message).__name__}")
    if "from" in message and "role" not in message:
        sender = message["from"]
        role = ROLES.get(sender, sender) if isinstance(sender, str) else sender
        message = {"role": role, "content": message.get("value")}
    # Tables have a column for every field that any message has, so null means: not there.
    message = {"content": None, **{k: v for k, v in message.items() if v is not None}}
    if not isinstance(message.get("role"), str):
        raise RecordError(f"{place}: 'role' must be text, found {type(message.get('role')).__name__}")
    content = message["content"]
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise RecordError(f"{place}: 'content' has parts other than text, which this model cannot read")
        message["content"] = "".join(p["text"] for p in content)
    elif content is None:
        message["content"] = ""
    elif not isinstance(content, str):
        raise RecordError(f"{place}: 'content' must be text, found {type(content).__name__}")
    reasoning = message.setdefault("reasoning_content", message.pop("reasoning", None))
    if reasoning is None:
        del message["reasoning_content"]
    elif not isinstance(reasoning, str):
        raise RecordError(f"{place}: 'reasoning_content' must be text, found {type(reasoning).__name__}")
    if not isinstance(weight := message.get("weight", 1), int | float):
        raise RecordError(f"{place}: 'weight' must be a number, found {type(weight).__name__}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], place)
    return message


def _tool_calls(calls: Any, place: str) -> list[Record]:
    """Calls with their arguments as an object: OpenAI's format has them as JSON in text, templates want the object."""
    out = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(f"{place}: 'tool_calls' must be a list of objects with a function's name and arguments")
        arguments = _parsed(function.get("arguments"))
        if not isinstance(arguments, dict | None):
            raise RecordError(f"{place}: the arguments of {function['name']} must be an object, or one as JSON text")
        out.append({**call, "function": {**function, "arguments": arguments or {}}})
    return out


def _parsed(value: Any) -> Any:
    """JSON text as what it says; anything else, and text that is none, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        return value


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks that some templates have; here their content and nothing more."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(text: str) -> jinja2.Template:
    """A chat template, in a sandbox, with the functions and whitespace rules that such templates are written for."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    filters: dict[str, Callable[..., Any]] = {"tojson": tojson}
    environment.filters.update(filters)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"dataset.chat_template is not valid Jinja, line {error.lineno}: {error.message}") from None
