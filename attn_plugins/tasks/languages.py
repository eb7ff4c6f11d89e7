"""Languages of texts, where a model knows many: what its tokenizer and its generate() have to be told."""

import textwrap
from typing import Any

from attn_plugins.core.options import did_you_mean


def set_languages(tokenizer: Any, model: Any, prompt: str, *, source_lang: str | None, target_lang: str | None) -> str:
    """Tell a tokenizer of many languages (mBART's, M2M100's, NLLB's) which these are, and the model's generation config
    which one to write.

    Returns:
        the prompt with the languages where {source_lang} and {target_lang} stand in it.

    Raises:
        ValueError: one is needed and not given, nothing would come of one that is given, or the tokenizer does not
            know it.
    """
    many = hasattr(tokenizer, "set_src_lang_special_tokens")
    for option, language in (("source_lang", source_lang), ("target_lang", target_lang)):
        place = f"{{{option}}}"
        if language is None and (many or place in prompt):
            why = "the tokenizer is one of many languages" if many else f"the prompt has {place}"
            raise ValueError(f"{option} is null, and {why}; name one")
        if language is not None and not many and place not in prompt:
            raise ValueError(
                f"{option}={language!r} is for tokenizers of many languages, or for a prompt with {place} in it"
            )
        if language is not None and many:
            _number(tokenizer, option, language)
        prompt = prompt.replace(place, language or "")
    if many:
        tokenizer.src_lang, tokenizer.tgt_lang = source_lang, target_lang
        number = _number(tokenizer, "target_lang", target_lang)
        config = model.generation_config
        if tokenizer(text_target="")["input_ids"][0] == number:
            config.forced_bos_token_id = number
        else:  # targets end with their language, and what is written starts from it
            config.decoder_start_token_id = number
    return prompt


def _number(tokenizer: Any, option: str, language: Any) -> int:
    """The language's token."""
    codes = getattr(tokenizer, "lang_code_to_id", {})
    known = list(codes) or tokenizer.all_special_tokens
    if language not in known:
        allowed = textwrap.shorten(", ".join(known), 300, placeholder=" ...")
        raise ValueError(f"{option}={language!r}{did_you_mean(language, known)}; allowed by the tokenizer: {allowed}")
    return codes.get(language, tokenizer.convert_tokens_to_ids(language))
