"""Makes tests/golden/tokenizer_*.json: token ids by llama.cpp for text that tells tokenizers apart.

Needs `pip install xllamacpp==2026.10.11549` (llama.cpp prebuilt), best in an environment of its own:

    python scripts/golden_tokenizer.py MODEL.gguf tests/golden/tokenizer_smollm2.json
"""

# ruff: noqa: RUF001, SIM905  (characters that look like others are the point; words read better in a row)

import argparse
import importlib.metadata
import itertools
import json
import random
import unicodedata
import urllib.request
from pathlib import Path

WORDS = (
    "the quick brown fox jumps over lazy dog I'm you're they'll he'd we've it's don't DON'T I'M rock'n'roll 'tis "
    "naïve café Ångström Straße İstanbul ſtop Ελλάδα Привет мир שלום مرحبا नमस्ते สวัสดี გამარჯობა"
).split()
PROSE = [
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure you're right; they'll say he'd gone, we've seen it's fine. Don't! DON'T! It'S 'Ve 'LL",
    "Mr. O'Neill's re-entry cost $1,234,567.89 (approx. 3.5%) on 2024-02-29 at 12:34:56Z.",
    "“Curly quotes” — em dash – en dash… ellipsis; ‘single’ «guillemets» „German“",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. El pingüino Wenceslao. Ça va? Œuvre. Fußgängerübergänge",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Θέλει αρετή και τόλμη η ελευθερία. Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "איש עובר את הכביש. نص حكيم له سر قاطع وذو شأن عظيم. ‏RTL‏ mark",
    "नमस्ते दुनिया। ক্ষমা করুন। வணக்கம் உலகம். สวัสดีชาวโลก ខ្ញុំ ສະບາຍດີ မင်္ဂလာပါ",
    "你好,世界!这是一个测试。繁體中文測試,標點符號:「引號」、頓號。",
    "こんにちは世界。カタカナとひらがな、漢字。ﾊﾝｶｸ ｶﾀｶﾅ 全角ＡＢＣ１２３",
    "안녕하세요 세계. 한국어 문장입니다. ㄱㄴㄷ ㅏㅑ 조합형 각",
    "😀😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ❤️‍🔥 1️⃣ #️⃣ 🧑🏿‍🚀☺☻♥♦",
    "e\u0301 vs é, n\u0303 vs ñ, A\u030a vs Å, \u1100\u1161\u11a8 vs 각, Z̷a̶l̵g̴o̸ t̴̢̛e̷x̵t",
    "½ ⅓ ² ³ ₄ Ⅷ ⅷ ① ⑳ ㊿ ٣٤٥ ४५६ ๗๘ 〇一二三 𝟘𝟙𝟚 𝕳𝖊𝖑𝖑𝖔 ﬁ ﬂ ㎏ ™ © ®",
    "∑_{i=0}^{n} x_i² ≤ ∫₀^∞ e^{-x}dx ≈ π·r² ∀ε>0 ∃δ: |x−y|<δ ⇒ ‖f(x)−f(y)‖ < ε",
    "https://example.com/a/b?x=1&y=%20#frag user.name+tag@mail.example.org C:\\dir\\file.txt ~/.bashrc",
    "ALLCAPS CamelCase snake_case kebab-case SCREAMING_SNAKE x86_64 utf-8 v1.2.3-rc.4+build.5 0xDEADBEEF 1e-10",
]
CODE = [
    'def f(x: int) -> int:\n    """Doc."""\n    return x**2 if x > 0 else -x  # why\n',
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n\t\tif (!ok) break;\n}\r\n",
    '#include <stdio.h>\nint main(void){printf("%d\\n", 0x7f&~1);return 0;}\n',
    "SELECT * FROM t WHERE a='it''s' AND b<>\"x\" -- note\n  ORDER BY 1 DESC;\n",
    '<div class="a b">\n  <p>&lt;&amp;&gt;</p>\n</div>\n<!-- comment -->',
    '{"a": [1, 2.5, -3e8, null, true], "b": {"c": "\\u00e9\\n"}}',
    "let s = `template ${x + 1}`; const f = async () => { await g?.h ?? 'd'; };\n",
    'fn main() { let v: Vec<&\'static str> = vec!["a"]; println!("{:?}", v); }\n',
    "\\begin{equation}\n  \\frac{a}{b} = \\sqrt{c} \\label{eq:1}\n\\end{equation}\n",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n\n- [x] done\n  1. nested\n```py\nx=1\n```\n",
    'if [[ -z "$VAR" && ! -f ~/x ]]; then echo "${VAR:-none}" | sed \'s/a/b/g\' >> out 2>&1; fi\n',
    "\n\n\n    x = 1\n\n        y = 2\n\t\n   \n",
]
SPECIAL_MIDDLES = ["user\nHi there", " ", "", "\n", "x", "  two  ", "12", "'s", "日本", "\t"]


def special_texts(names: list[str]) -> list[str]:
    texts = [f"<|im_start|>{middle}<|im_end|>\n<|im_start|>assistant\n" for middle in SPECIAL_MIDDLES]
    texts += [f"{name}" for name in names]
    texts += [f"a{name}b" for name in names] + [f" {name} {name}  {name}\n{name}" for name in names[:6]]
    texts += ["<|im_end", "|im_end|>", "<|im_end|", "<<|im_end|>>", "<|IM_END|>", "< |im_end|>", "<|im_end|><|im_end|>"]
    return texts


def broken_utf8() -> list[str]:
    """What a reader of damaged bytes sees: each broken sequence replaced by U+FFFD."""
    samples = [
        b"abc\xff\xfe def",
        b"\xc3",
        b"\xe4\xbd",
        b"\xf0\x9f\x98 ok",
        b"\x80\x80",
        b"a\xc0\xafb",
        b"\xed\xa0\x80",
    ]
    samples += [
        "héllo wörld".encode("latin-1"),
        "日本".encode("shift-jis"),
        "мир".encode("cp1251"),
        b"\xf5\x80x\xe2\x82z",
    ]
    return [sample.decode("utf-8", "replace") for sample in samples]


def random_text(rng: random.Random) -> str:
    """Pieces of every kind glued together, so that word boundaries meet in unusual ways."""
    pieces = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice(
            [" ", " ", " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n ", "\u00a0", "\u3000", "\u2009"]
        ),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 9))),
        lambda: rng.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") * rng.randrange(1, 4),
        lambda: chr(
            rng.choice([rng.randrange(0x20, 0x250), rng.randrange(0x370, 0x600), rng.randrange(0x4E00, 0x9FFF)])
        ),
        lambda: chr(
            rng.choice([rng.randrange(0x1F300, 0x1FAFF), rng.randrange(0xAC00, 0xD7A3), rng.randrange(1, 0x20)])
        ),
        lambda: rng.choice(
            ["\u200b", "\u200d", "\ufeff", "\u0301", "\ufe0f", "\u202e", "\x7f", "\x85", "\u2028", "\ufffd"]
        ),
    ]
    text = "".join(rng.choice(pieces)() for _ in range(rng.randrange(2, 14)))
    # A code point without a category yet in one library may have one in the other.
    return "".join(c for c in text if unicodedata.category(c) != "Cn")


def corpus(special_names: list[str]) -> list[str]:
    rng = random.Random(20240229)
    texts = [*PROSE, *CODE, *special_texts(special_names), *broken_utf8()]
    texts += [" " * n for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33)] + ["\n" * n for n in (1, 2, 3, 5)]
    texts += (
        [f"a{' ' * n}b" for n in (1, 2, 3, 4, 8)]
        + ["\t" * n for n in (1, 2, 4)]
        + ["x \n\n  y", "\r", "\r\n\r\n", " \t \n"]
    )
    texts += ["".join(chr(c) for c in range(start, start + 16)) for start in range(0, 0x100, 16)]
    texts += [f"a{chr(c)}b {chr(c)}{chr(c)}" for c in range(0x20)]
    texts += [f".{chr(c)}. {chr(c)}=\x03{chr(c)}=" for c in (4, 6, 19, 20, 22, 29)]  # bytes SmolLM2 has no token for
    texts += ["\U00080000", "\U000bffffx", "\U0010ffff", "\ue000", "\ufdd0", "\ufeffBOM"]
    texts += [
        "".join(digits) for n in (1, 2, 3, 4, 5) for digits in itertools.islice(itertools.permutations("91420", n), 3)
    ]
    texts += ["a" * 50, "ab" * 40, "=" * 70, "-" * 33, "!?" * 20, "哈" * 30, "😀" * 12, "0" * 25, "\u0301" * 9]
    while len(texts) < 480:
        texts.append(random_text(rng))
    return list(dict.fromkeys(text for text in texts if text))


class Oracle:
    """llama.cpp's own tokenizer behind the server's /tokenize."""

    def __init__(self, model: Path) -> None:
        import xllamacpp  # type: ignore[import-not-found]

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 256, 1, False, False
        params.port = 0
        self._server = xllamacpp.Server(params)

    def encode(self, text: str, allow_special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": allow_special}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            ids: list[int] = json.load(reply)["tokens"]
        return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--special", nargs="*", default=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"])
    arguments = parser.parse_args()
    oracle = Oracle(arguments.model)
    texts = corpus(arguments.special)
    cases = [[text, oracle.encode(text, True)] for text in texts]
    plain = [[text, oracle.encode(text, False)] for text in special_texts(arguments.special)]
    golden = {
        "oracle": f"llama.cpp by xllamacpp {importlib.metadata.version('xllamacpp')}",
        "model": arguments.model.name,
        "cases": cases,
        "cases_without_special": plain,
    }
    lines = ",\n".join(
        f"{json.dumps(key)}: " + (json.dumps(value) if isinstance(value, str) else _rows(value))
        for key, value in golden.items()
    )
    arguments.output.write_text(f"{{\n{lines}\n}}\n")
    print(f"{arguments.output}: {len(cases)} + {len(plain)} texts, {arguments.output.stat().st_size} bytes")


def _rows(rows: list[list[object]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"


if __name__ == "__main__":
    main()
