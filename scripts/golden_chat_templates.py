"""Writes tests/golden/chat_templates.json: what transformers renders from real chat templates, as hashes.

The templates keep their models' terms, so neither they nor their texts are stored.

usage: python scripts/golden_chat_templates.py FOLDER   (see tests/golden/README.md for what it holds)
"""

import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path

import transformers
from transformers.utils import chat_template_utils

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class FixedClock:
    @staticmethod
    def now():
        return datetime(2026, 11, 21, 12, 0, 0)


def digest(text):
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]} {len(text)}"


def attempt(render):
    """The digest of the text, or null where the template refuses or fails."""
    try:
        return digest(render())
    except Exception as error:
        print(f"    {type(error).__name__}: {str(error)[:90]}")
        return None


def main():
    folder = Path(sys.argv[1])
    cases = json.loads((GOLDEN / "chat_cases.json").read_text())
    chat_template_utils.datetime = FixedClock
    packages, templates = {}, {}
    for config in sorted(folder.glob("tokenizer-*/models/tokenizer_config.json")):
        name = config.parent.parent.name
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.parent)
        if tokenizer.chat_template is None:
            continue
        print(name)
        packages[name] = {
            case: attempt(lambda: render(tokenizer.get_chat_template(), tokenizer.special_tokens_map, given))  # noqa: B023
            for case, given in cases.items()
        }
    for path in sorted(folder.glob("*/*.jinja")):
        source = path.read_bytes().decode()
        print(path.name)
        templates[path.name] = {"source": digest(source)} | {
            case: attempt(lambda: render(source, TOKENS, given))  # noqa: B023
            for case, given in cases.items()
        }
    made_with = {"transformers": transformers.__version__, "clock": FixedClock.now().isoformat(), "tokens": TOKENS}
    content = {"made_with": made_with, "packages": packages, "templates": templates}
    (GOLDEN / "chat_templates.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def render(template, tokens, given):
    """Below tokenizer.apply_chat_template, which drops what is null: DeepSeek's asks whether content is."""
    variables = {name: value for name, value in given.items() if name != "messages"}
    return chat_template_utils.render_jinja_template(
        [given["messages"]], chat_template=template, **{"add_generation_prompt": True, **tokens, **variables}
    )[0][0]


if __name__ == "__main__":
    main()
