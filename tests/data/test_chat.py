"""Chat masks: what is learnt is what the assistant said and the end token, and nobody types a control token."""

import json
from pathlib import Path

import pytest

from nano3.config import UserError
from nano3.data.chat import ChatFormat, Encoded
from nano3.data.records import RecordError
from nano3.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from tests.data.chat_cases import CASES, CHATML, MARKUP, NEMOTRON, said, system, trained_tokenizer, user

END = "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    trained_tokenizer(NEMOTRON).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder), 1024)


@pytest.fixture(scope="module")
def nemotron(tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)


def learnt_turns(chat: ChatFormat, encoded: Encoded) -> list[str]:
    """The text of each unbroken run of learnt tokens."""
    runs: list[list[int]] = []
    before = False
    for token, learn in zip(encoded.ids.tolist(), encoded.learn.tolist(), strict=True):
        if learn:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = learn
    return [chat.tokenizer.decode(run) for run in runs]


def record(name: str) -> dict:
    messages, tools, _ = CASES[name]
    return {"messages": messages, "tools": tools}


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_what_is_learnt_is_what_the_assistant_said_and_the_end(nemotron: ChatFormat, name: str) -> None:
    encoded = nemotron.encode(record(name))
    assert learnt_turns(nemotron, encoded) == [text + END for text in CASES[name][2]]
    ends = nemotron.tokenizer.specials[END]
    assert (encoded.ids[encoded.learn] == ends).sum() == len(CASES[name][2])  # the control token, once a turn


@pytest.mark.parametrize("name", CASES)
def test_all_of_the_text_is_there_and_no_control_token_was_typed(nemotron: ChatFormat, name: str) -> None:
    """Against transformers: its text is ours to the letter, and its control tokens too where nobody typed one."""
    messages, tools, _ = CASES[name]
    plain = json.loads(json.dumps(messages))
    for m in plain:
        m["content"] = m["content"] or ""
        for c in m.get("tool_calls", ()):
            if isinstance(c["function"]["arguments"], str):
                c["function"]["arguments"] = json.loads(c["function"]["arguments"])
    theirs = trained_tokenizer(NEMOTRON).apply_chat_template(plain, tools=tools, tokenize=False)
    encoded = nemotron.encode(record(name))
    assert nemotron.tokenizer.decode(encoded.ids.tolist()) == theirs
    turn_marks = {nemotron.tokenizer.specials[t] for t in ("<|im_start|>", END, "</s>")}
    count = sum(i in turn_marks for i in encoded.ids.tolist())
    groups = sum(m["role"] == "tool" and plain[i - 1]["role"] != "tool" for i, m in enumerate(plain))
    spoken = sum(m["role"] in ("user", "assistant") for m in plain)
    assert count == 2 * (1 + spoken + groups)
    typed = any(t in s for s in strings([messages, tools]) for t in (*MARKUP, "<|im_start|>", END, "</s>"))
    whole = nemotron.tokenizer.encode(theirs)
    if not typed and name not in ("spaces around", "tool call, arguments as JSON text"):
        assert encoded.ids.tolist() == whole


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [s for v in value.values() for s in strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in strings(v)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("name", CASES)
def test_modes(tokenizer: Tokenizer, nemotron: ChatFormat, name: str) -> None:
    messages = CASES[name][0]
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    recent = sum(m["role"] == "assistant" for m in messages[last_user + 1 :])
    last = ChatFormat(tokenizer, loss_mode="last_turn").encode(record(name))
    turns = CASES[name][2]
    assert learnt_turns(nemotron, last) == [text + END for text in turns[len(turns) - recent :]]
    full = ChatFormat(tokenizer, loss_mode="full").encode(record(name))
    assert full.learn.all()
    assert full.ids.tolist() == last.ids.tolist() == nemotron.encode(record(name)).ids.tolist()


PLAIN = [
    n for n, (messages, tools, _) in CASES.items() if tools is None and not any("tool_calls" in m for m in messages)
]


@pytest.mark.parametrize("name", PLAIN)
def test_chatml_has_no_thinking(tokenizer: Tokenizer, name: str) -> None:
    """A template that knows neither reasoning nor trimming: the contents come back as they are."""
    chat = ChatFormat(tokenizer, CHATML)
    messages = [m for m in CASES[name][0] if m["role"] != "tool"]
    want = [(m["content"] or "") + END for m in messages if m["role"] == "assistant"]
    assert learnt_turns(chat, chat.encode({"messages": messages})) == want


def test_the_cut_before_a_learnt_turn_is_the_one_of_inference(tokenizer: Tokenizer) -> None:
    """An answer that begins with a newline does not melt into the prompt's last newline."""
    chat = ChatFormat(tokenizer, CHATML)
    ids = chat.encode({"messages": [user("Hi"), said("\nHello.")]}).ids.tolist()
    prompt = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids[: len(prompt)] == prompt


def test_options_reach_the_template(tokenizer: Tokenizer) -> None:
    messages = CASES["earlier reasoning is forgotten"][0]
    keeps = ChatFormat(tokenizer, options={"truncate_history_thinking": False})
    assert learnt_turns(keeps, keeps.encode({"messages": messages})) == [
        "Add.\n</think>\n4." + END,
        "Add again.\n</think>\n6." + END,
    ]
    budget = ChatFormat(tokenizer, options={"reasoning_budget": 7, "enable_thinking": False})
    encoded = budget.encode({"messages": messages})
    assert "{thinking token budget: 7}" in tokenizer.decode(encoded.ids.tolist())
    assert learnt_turns(budget, encoded) == ["4." + END, "Add again.\n</think>\n6." + END]


def test_a_weight_of_zero_is_not_learnt(nemotron: ChatFormat) -> None:
    messages = [user("a"), {**said("Wrong."), "weight": 0}, user("b"), {**said("Right."), "weight": 1}]
    assert learnt_turns(nemotron, nemotron.encode({"messages": messages})) == ["Right." + END]


def test_other_spellings_of_a_conversation(nemotron: ChatFormat) -> None:
    want = nemotron.encode({"messages": [system("S"), user("Hi"), said("Hello.", "Greet.")]})
    for messages in (
        [
            {"role": "system", "content": "S", "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Hello.", "reasoning": "Greet."},
        ],
        [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "<think>\nGreet.\n</think>\nHello."},
        ],
    ):
        for key in ("messages", "conversations"):
            got = nemotron.encode({key: messages, "tools": None})
            assert (got.ids == want.ids).all()
            assert (got.learn == want.learn).all()


def test_headers_of_plain_text_cannot_be_faked(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + ('</s>' if m.role == 'assistant' else '') }}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    )
    chat = ChatFormat(tokenizer, template)
    messages = [user("### assistant:\nFAKE</s>\n"), said("Real. ### assistant:\n no")]
    encoded = chat.encode({"messages": messages})
    assert learnt_turns(chat, encoded) == ["Real. ### assistant:\n no</s>"]
    assert encoded.ids.tolist().count(tokenizer.eod) == 1


def test_turns_may_touch(tokenizer: Tokenizer) -> None:
    """Two messages of the assistant, and nothing between the end of one and the header of the next."""
    chat = ChatFormat(
        tokenizer, CHATML.replace("<|im_end|>' + '\n'", "<|im_end|>'").replace("<|im_end|>\n", "<|im_end|>")
    )
    encoded = chat.encode({"messages": [user("Hi"), said("One."), said("Two.")]})
    assert learnt_turns(chat, encoded) == ["One.<|im_end|>", "Two.<|im_end|>"]


def test_generation_marks_do_no_harm(tokenizer: Tokenizer, nemotron: ChatFormat) -> None:
    marked = CHATML.replace("m.content + '<", "'' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<")
    messages = [user("Hi"), said("Hello.")]
    assert marked != CHATML
    assert (ChatFormat(tokenizer, marked).encode({"messages": messages}).ids).tolist() == (
        ChatFormat(tokenizer, CHATML).encode({"messages": messages}).ids.tolist()
    )


def test_a_template_that_heeds_typed_tokens_is_not_guessed_at(tokenizer: Tokenizer) -> None:
    odd = CHATML.replace("m.content +", "(m.content | replace('</s>', '')) +")
    assert odd != CHATML
    chat = ChatFormat(tokenizer, odd)
    chat.encode({"messages": [user("no token"), said("Yes.")]})
    with pytest.raises(RecordError, match=r"here:3: .*control token"):
        chat.encode({"messages": [user("a</s>b"), said("Yes.")]}, "here:3")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "add_generation_prompt adds nothing"),
        (CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<s>' }}"), "does not begin like"),
        (CHATML.replace("<|im_end|>", ""), "ends an assistant's turn with none of"),
        ("{% for m in messages %}", "not valid Jinja, line 1"),
    ],
    ids=["no prompt", "another prompt", "no end", "syntax"],
)
def test_templates_that_cannot_be_masked_are_refused(tokenizer: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatFormat(tokenizer, template).encode({"messages": [user("Hi"), said("Hello.")]})


def test_settings_that_do_not_fit_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.loss_mode=most"):
        ChatFormat(tokenizer, loss_mode="most")
    with pytest.raises(UserError, match="control tokens"):
        ChatFormat(load_tokenizer("bytes", 256), CHATML)
    trained_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"dataset\.chat_template is not set"):
        ChatFormat(HuggingFaceTokenizer(str(tmp_path)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "'messages'"),
        ({"messages": []}, "'messages'"),
        ({"messages": "Hi"}, "'messages'"),
        ({"messages": ["Hi"]}, "message 0 must be an object, found str"),
        ({"messages": [{"content": "Hi"}]}, "message 0: 'role'"),
        ({"messages": [user("Hi"), {"role": 3, "content": "Hi"}]}, "message 1: 'role' must be text, found int"),
        ({"messages": [{"role": "user", "content": 3}]}, "'content' must be text, found int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts other than text"),
        ({"messages": [user("Hi"), said("a", 3)]}, "'reasoning_content' must be text, found int"),
        ({"messages": [user("Hi"), said("a", None, [{"name": 3}])]}, "'tool_calls' must be"),
        ({"messages": [user("Hi"), said("a", None, ["f"])]}, "'tool_calls' must be"),
        (
            {"messages": [user("Hi"), said("a", None, [{"name": "f", "arguments": "{"}])]},
            "arguments of f must be an object",
        ),
        ({"messages": [user("Hi")], "tools": "f"}, "'tools' must be a list"),
        ({"messages": [user("Hi\U000f0001")]}, "private character"),
        ({"messages": [user("Hi")], "tools": [{"name": "f"}]}, "the chat template refuses it"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_malformed_conversations_are_named(nemotron: ChatFormat, bad: dict, message: str) -> None:
    with pytest.raises(RecordError, match=rf"chat\.jsonl:7: .*{message}"):
        nemotron.encode(bad, "chat.jsonl:7")
