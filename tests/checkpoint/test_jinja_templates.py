"""Chat templates of directories in Hugging Face format: the prompts are those of transformers' apply_chat_template."""

import json
import os

import pytest
import torch

from dongpt.checkpoint import load_model
from dongpt.checkpoint.jinja_templates import read_template
from dongpt.text.template import encode
from dongpt.text.tokenizers import END

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
SUPPORTED = {
    "DialoGPT": "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}",
    "speakers": """{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}
{% else %}Bot: {{ m['content'] }}{{ eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Bot: {% endif %}""",
    "start": """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST] ' }}
{%- elif m['role'] == 'system' %}{{ raise_exception('no system messages') }}
{%- else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}""",
    "system": """{% for m in messages %}{% if m.role == 'system' %}{{ 'S: ' + m.content }}
{%- elif m.role == 'user' %}{{ '### Q: ' + m.content + ' ### A: ' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}""",
}
REFUSED = {
    "no end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "counts": "{% for m in messages %}{{ loop.index }} {{ m.content }}{{ eos_token }}{% endfor %}",
    "changes texts": "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}",
    "not jinja": "{% for",
    "leaves the sandbox": "{{ messages.__class__.__base__.__subclasses__() }}",
}


def write_directory(source, folder="hf", **config) -> str:
    """A tiny GPT-2 with GPT-2's vocabulary and a chat template."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_positions=64, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **config)).save_pretrained(folder)
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END}
    with open(f"{folder}/tokenizer_config.json", "w", encoding="utf-8") as file:
        json.dump(settings | ({"chat_template": source} if source else {}), file)
    return folder


def render(source: str, messages: list[dict], is_prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    settings = dict(add_generation_prompt=is_prompt, bos_token=END, eos_token=END)
    return render_jinja_template(conversations=[messages], chat_template=source, **settings)[0][0]


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("is_file", [False, True])
def test_prompts_are_those_of_transformers(gpt2_vocabulary, name, is_file):
    folder = write_directory(None if is_file else SUPPORTED[name])
    if is_file:
        with open(f"{folder}/chat_template.jinja", "w", encoding="utf-8") as file:
            file.write(SUPPORTED[name])
    _, tokenizer = load_model(folder)
    template, texts = tokenizer.template, ["It's me?", "Yes.", "And\nthen?", " ok "]
    assert bool(template.system) == (name == "system")
    for system in ("", "be brief") if template.system else ("",):
        start = [tokenizer.end_id] * template.starts_with_end + encode(tokenizer, template.opening(system))
        ids, messages = start, [{"role": "system", "content": system}] if system else []
        for number, text in enumerate(texts):
            turn = template.answer(text) if number % 2 else template.question(text)
            ids, messages = (
                ids + encode(tokenizer, turn),
                [*messages, dict(role=("user", "assistant")[number % 2], content=text)],
            )
            theirs = render(SUPPORTED[name], messages, is_prompt=number % 2 == 0)
            assert tokenizer.decode(ids) == theirs
            if number == 0:  # later, an answer's ids are those that the model generated after the marker
                assert tokenizer.encode(theirs, special=True) == ids


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_is_more_than_markers_is_not_used(tmp_path, name):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": REFUSED[name]}), encoding="utf-8")
    assert read_template(str(tmp_path), END) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"chat_template": 3}', '{"chat_template": [1, {"name": "default"}]}']
)
def test_a_damaged_tokenizer_config_is_no_template(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    assert read_template(str(tmp_path), END) is None


def test_the_default_of_several_templates_is_read(tmp_path):
    templates = [{"name": "tools", "template": "x"}, {"name": "default", "template": SUPPORTED["DialoGPT"]}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}), encoding="utf-8")
    assert read_template(str(tmp_path), END).assistant == END


def test_older_directories_of_dialogpt_have_its_format(gpt2_vocabulary):
    folder = write_directory(None, task_specific_params={"conversational": {"max_length": 1000}})
    template = load_model(folder)[1].template
    assert template.name == "dialogpt" and not template.starts_with_end
    assert load_model(write_directory(None, "other"))[1].template is None


def test_a_model_on_the_hub_is_loaded_by_name_from_the_cache(gpt2_vocabulary, monkeypatch):
    pytest.importorskip("huggingface_hub")
    import chat

    place = "hub/models--someone--talker"
    write_directory(SUPPORTED["DialoGPT"], f"{place}/snapshots/0123abcd")
    os.makedirs(f"{place}/refs")
    with open(f"{place}/refs/main", "w", encoding="utf-8") as file:
        file.write("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.path.abspath("hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    chat.main(["hf:someone/talker", "--prompt=Hello", "--max_new_tokens=3", "--device=cpu"])
    assert load_model("hf:someone/talker")[1].template.assistant == END
