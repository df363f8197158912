"""Read the chat template of a directory in Hugging Face format, which is a program in the language Jinja.

    template = read_template("DialoGPT-small", END)      # Template(user="", assistant="<|endoftext|>", ...)

The program runs in jinja2's sandbox. It is rendered for short conversations, and the text around their messages gives
the markers. A template that does more than put markers around messages is not supported.
"""

import json
import os
from typing import Any

from dongpt.text.template import Template

MAX_TEMPLATE_CHARS = 2**16
# messages that occur in no template; the digits tell them apart
SYSTEM, QUESTION, ANSWER, NEXT_QUESTION = (f"Zq{i}x{i}qZ" for i in range(1, 5))


def read_template(directory: str, end: str) -> Template | None:
    """Return the chat template in directory, or None if there is none or it is not supported.

    end is the name of the end token. An answer must end with it, because the model stops there.
    """
    source, settings = _find_source(directory)
    if not source or len(source) > MAX_TEMPLATE_CHARS:
        return None
    try:
        return _to_template(source, settings, end)
    except Exception:  # jinja2 and the template raise errors of many types
        return None


def _find_source(directory: str) -> tuple[str, dict]:
    """Return (source of the template or "", contents of tokenizer_config.json)."""
    settings: dict[str, Any] = {}
    path = os.path.join(directory, "tokenizer_config.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            settings = content if isinstance(content, dict) else {}
        except (ValueError, OSError, RecursionError):
            return "", {}
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(), settings
    source = settings.get("chat_template")
    if isinstance(source, list):  # of named templates
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else "", settings


def _to_template(source: str, settings: dict, end: str) -> Template | None:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    program = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    names = {key: _token_text(settings.get(key)) or end for key in ("bos_token", "eos_token")}

    def render(*contents: str, is_prompt: bool, system: str = "") -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        return program.render(messages=messages, add_generation_prompt=is_prompt, **names)

    start, assistant = render(QUESTION, is_prompt=True).split(QUESTION)
    ending = render(QUESTION, ANSWER, is_prompt=False).split(ANSWER)[1]
    between = render(QUESTION, ANSWER, NEXT_QUESTION, is_prompt=True).split(ANSWER)[1].split(NEXT_QUESTION)[0]
    user = between.removeprefix(ending)
    opening = start.removesuffix(user)
    if end not in ending or not between.startswith(ending) or opening not in ("", end):
        return None
    try:
        before, after = render(QUESTION, is_prompt=True, system=SYSTEM).split(QUESTION)[0].split(SYSTEM)
        mark = before.removeprefix(opening) if after == user else ""
    except (TemplateError, ValueError):  # the template refuses system messages, or leaves them out
        mark = ""
    return Template("jinja", user, assistant, ending, system=mark, starts_with_end=opening == end, token_in_text=end)


def _token_text(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""
