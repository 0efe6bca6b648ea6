"""Texts of encoder-decoder models: prompt and completion each with its own end, and nothing lost in silence."""

import logging

import pytest

from prefpipe import models
from prefpipe.prompts import EncoderDecoderTemplate, TemplateError
from prefpipe.settings import ModelConfig

ASK = [{"role": "user", "content": "Tom has 3 apples?"}]


@pytest.fixture
def template(t5_folder):
    return models.load_template(ModelConfig(name="t5", path=str(t5_folder)), t5_folder)


def pieces(template: EncoderDecoderTemplate, ids: list[int]) -> list[str]:
    return template.tokenizer.convert_ids_to_tokens(ids)


def test_prompt_and_completion_are_texts_of_their_own(template):
    """What T5's authors and `tokenizer(text, text_target=...)` do; the word boundary in front of both included."""
    encoded = template.encode(ASK, "3 # 4")
    assert pieces(template, encoded.prompt) == [*"▁Tom▁has▁3", "▁apples", "?", "</s>"]
    assert pieces(template, encoded.completion) == [*"▁3▁#▁4", "</s>"]
    assert encoded.prompt == template.prompt(ASK)
    together = template.tokenizer("Tom has 3 apples?", text_target="3 # 4")
    assert (encoded.prompt, encoded.completion) == (together["input_ids"], together["labels"])
    assert template.decode(encoded.completion) == "3 # 4"
    assert template.decoder_start == 0
    assert template.bos is None


def test_a_named_template_renders_the_conversation(t5_folder):
    model = ModelConfig(name="t5", path=str(t5_folder), chat_template="builtin:plain")
    template = models.load_template(model, t5_folder)
    turns = [{"role": "system", "content": "Be brief."}, *ASK]
    assert template.tokenizer.decode(template.prompt(turns)[:-1]) == "Be brief. Question: Tom has 3 apples? Answer:"
    assert template.encode(turns, "3").completion == template.encode(ASK, "3").completion
    answered = [*ASK, {"role": "assistant", "content": "3"}, *ASK]
    parts = template.encode_turns(answered, "4")
    assert [template.decode(part.completion) for part in parts] == ["3", "4"]
    assert [part.prompt for part in parts] == [template.prompt(answered[:1]), template.prompt(answered)]


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "system", "content": "Be brief."}, *ASK],
        [*ASK, {"role": "assistant", "content": "3"}, *ASK],
        [{"role": "assistant", "content": "3"}],
    ],
)
def test_turns_that_only_a_template_could_hold_are_refused(template, turns):
    with pytest.raises(TemplateError, match=r"reads one user turn .*model\.chat_template=builtin:plain") as caught:
        template.prompt(turns)
    assert caught.value.code == "several_turns"


def test_a_completion_with_an_unknown_character_is_refused(template):
    """T5 has no `<`: `<<1+1=2>>` would be learnt as <unk>, which decoding drops, so that 1+1=2 became another text."""
    with pytest.raises(TemplateError, match=r"the completion holds '<', which the tokenizer does not know") as caught:
        template.encode(ASK, "<<1+1=2>>")
    assert caught.value.code == "unknown_token"


def test_special_tokens_in_a_text_are_refused(template):
    for text in ("a </s> b", "<extra_id_0>", "<pad>"):
        with pytest.raises(TemplateError, match="special token"):
            template.encode(ASK, text)
        with pytest.raises(TemplateError, match="special token"):
            template.prompt([{"role": "user", "content": text}])


def test_texts_that_the_tokenizer_changes_are_said_once(template, caplog):
    caplog.set_level(logging.WARNING)
    template.encode(ASK, "3 # 4")
    assert not caplog.messages
    for _ in range(2):
        template.prompt([{"role": "user", "content": "3\n<4"}])
        template.encode(ASK, "3\n# 4")
    assert [message for message in caplog.messages if "tokenizer changes" in message] == [
        "the tokenizer changes some texts; the first is a prompt, '3\\n<4', read as '3 4'",
        "the tokenizer changes some texts; the first is a completion, '3\\n# 4', read as '3 # 4'",
    ]
