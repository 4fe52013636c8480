"""Builds the text and chat corpus of the tiny demo model from freely redistributable documentation."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

SYSTEM_MESSAGE = "You are a helpful assistant."
LANGS = ("en", "zh", "ja", "code")
LO_DIRS = {"en": "en-US", "zh": "zh-CN", "ja": "ja"}
GNOME_DIRS = {"en": "C", "zh": "zh_CN", "ja": "ja"}
LANG_NAMES = {
    "en": {"en": "English", "zh": "Chinese", "ja": "Japanese"},
    "zh": {"en": "英语", "zh": "中文", "ja": "日语"},
    "ja": {"en": "英語", "zh": "中国語", "ja": "日本語"},
}
EMOJI = re.compile(r"[\U0001f000-\U0001faff\u2600-\u27bf]")
SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
PRODUCT_WORDS = {
    "Writer",
    "Calc",
    "Impress",
    "Draw",
    "Math",
    "Base",
    "Python",
    "Java",
    "Navigator",
    "Gallery",
    "I",
}
STDLIB_FILE_LIMIT = 40_000
STDLIB_SKIP = {"test", "tests", "idlelib", "site-packages", "dist-packages", "pydoc_data", "turtledemo",
               "__pycache__", "lib2to3", "encodings", "ensurepip"}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One visual block of a page; kind is 'h1'..'h6', 'p', 'li' or 'code'."""

    kind: str
    text: str


@dataclass
class Page:
    """One document in one language; translations of a document share doc_id."""

    doc_id: str
    lang: str
    blocks: list[Block]
    guide: bool = False
    redistribute: bool = True

    def text(self) -> str:
        return "\n".join(("- " + b.text if b.kind == "li" else b.text) for b in self.blocks)


@dataclass
class Corpus:
    """Records of the form {"lang", "kind", "text"}, by split."""

    train: list[dict[str, str]] = field(default_factory=list)
    val: list[dict[str, str]] = field(default_factory=list)
    test: list[dict[str, str]] = field(default_factory=list)
    calibration: list[dict[str, str]] = field(default_factory=list)


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(doc_id: str) -> str:
    bucket = stable_hash(doc_id) % 100
    return "val" if bucket < 2 else "test" if bucket < 4 else "train"


def squeeze(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("\u00a0", " ")).strip()
    return re.sub(r" ([.,;:!?)。、，；：！？）])", r"\1", text)


def is_untranslated(lang: str, block: Block) -> bool:
    prose = block.kind != "code" and len(block.text) > 12
    return lang in ("zh", "ja") and prose and not CJK.search(block.text)


class HelpPageParser(HTMLParser):
    """Collects the blocks of one LibreOffice help page, without navigation and hidden text."""

    VOID = frozenset({"br", "img", "meta", "link", "input", "hr", "base", "col", "area"})
    BLOCKS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "p", "pre"})
    SKIP_TAGS = frozenset({"script", "style", "header", "aside", "footer", "nav"})
    SKIP_CLASSES = frozenset({"howtoget", "relatedtopics", "noteicon", "iconcell", "related", "bug"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.stack: list[tuple[str, bool]] = []
        self.buffer: list[str] | None = None
        self.row: list[str] | None = None
        self.kind = "p"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.VOID:
            if tag == "br" and self.buffer is not None:
                self.buffer.append("\n" if self.kind == "code" else " ")
            return
        values = {key: value or "" for key, value in attrs}
        hidden = "hidden" in values and not values.get("id", "").startswith("default")
        classes = set(values.get("class", "").split())
        skipped = hidden or tag in self.SKIP_TAGS or bool(self.SKIP_CLASSES & classes)
        self.stack.append((tag, skipped or (bool(self.stack) and self.stack[-1][1])))
        if tag == "tr":
            self.row = []
        if tag in self.BLOCKS:
            self.kind = "code" if tag == "pre" else tag
            if tag == "p" and any(name == "li" for name, _ in self.stack):
                self.kind = "li"
            if "code" in values.get("class", ""):
                self.kind = "code"
            self.buffer = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if tag in self.BLOCKS and self.buffer is not None:
            self.end_block("".join(self.buffer))
            self.buffer = None
        if tag == "tr" and self.row is not None:
            if self.row:
                self.blocks.append(Block("row", " | ".join(self.row)))
            self.row = None
        while self.stack:
            if self.stack.pop()[0] == tag:
                break

    def end_block(self, raw: str) -> None:
        text = raw.rstrip() if self.kind == "code" else squeeze(raw)
        if not text.strip():
            return
        if self.row is not None and self.kind != "code":
            self.row.append(text)
        else:
            self.blocks.append(Block(self.kind, text))

    def handle_data(self, data: str) -> None:
        if self.buffer is not None and not (self.stack and self.stack[-1][1]):
            self.buffer.append(data)


def read_help_pages(root: Path, lang: str) -> Iterator[Page]:
    """LibreOffice help: a root is the unpacked libreoffice-help-* package."""
    base = root / "usr/share/libreoffice/help" / LO_DIRS[lang] / "text"
    for path in sorted(base.rglob("*.html")):
        parser = HelpPageParser()
        parser.feed(path.read_text(encoding="utf-8"))
        relative = path.relative_to(base).as_posix()
        yield Page("lo/" + relative, lang, parser.blocks, guide="/guide/" in relative)


def mallard_blocks(node: ET.Element, in_item: bool = False, depth: int = 1) -> Iterator[Block]:
    for child in node:
        tag = child.tag.rsplit("}", 1)[-1]
        if tag == "title":
            yield Block(f"h{depth}", squeeze("".join(child.itertext())))
        elif tag in ("p", "screen", "code"):
            raw = "".join(child.itertext())
            if tag == "p":
                yield Block("li" if in_item else "p", squeeze(raw))
            else:
                yield Block("code", raw.strip())
        elif tag == "section":
            yield from mallard_blocks(child, False, depth + 1)
        elif tag not in ("info", "links", "media", "comment"):
            yield from mallard_blocks(child, in_item or tag == "item", depth)


def read_gnome_pages(root: Path, lang: str) -> Iterator[Page]:
    """GNOME help (training only, so that no share-alike text is shipped as evaluation data)."""
    base = root / "usr/share/help" / GNOME_DIRS[lang] / "gnome-help"
    for path in sorted(base.glob("*.page")):
        blocks = [b for b in mallard_blocks(ET.parse(path).getroot()) if b.text]
        yield Page("gnome/" + path.stem, lang, blocks, guide=True, redistribute=False)


def drop_repeats(pages: Iterable[Page]) -> list[Page]:
    """Keeps the first copy of each paragraph: help pages embed the same sections over and over.

    Training pages come first, so a held-out page never keeps a paragraph that training has seen.
    """
    order = {"train": 0, "val": 1, "test": 2}
    seen: dict[str, set[str]] = defaultdict(set)
    kept = []
    for page in sorted(pages, key=lambda p: (order[page_split(p)], p.doc_id, p.lang)):
        blocks = []
        for block in page.blocks:
            if is_untranslated(page.lang, block):
                continue
            if len(block.text) >= 12 and block.kind[0] != "h":
                if block.text in seen[page.lang]:
                    continue
                seen[page.lang].add(block.text)
            blocks.append(block)
        page.blocks = drop_empty_headings(blocks)
        if sum(len(b.text) for b in page.blocks if b.kind[0] != "h") >= 60:
            kept.append(page)
    return kept


def drop_empty_headings(blocks: list[Block]) -> list[Block]:
    kept: list[Block] = []
    for block in blocks:
        while kept and block.kind[0] == "h" and kept[-1].kind[0] == "h" and kept[-1].kind >= block.kind:
            kept.pop()
        kept.append(block)
    while kept and kept[-1].kind[0] == "h":
        kept.pop()
    return kept


def page_split(page: Page) -> str:
    return split_of(page.doc_id) if page.redistribute else "train"


# --- conversations ----------------------------------------------------------------------------------------


def render_chat(user: str, assistant: str) -> str:
    """The chat template's rendering of one exchange with the default system message."""
    turns = (("system", SYSTEM_MESSAGE), ("user", user), ("assistant", assistant))
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


class QuestionWriter:
    """Turns headings into questions in the heading's own language."""

    def __init__(self, words: Counter[str]) -> None:
        self.words = words

    def lower_title(self, heading: str) -> str:
        words = heading.split(" ")
        plain = [w for w in words if w.isalpha() and w not in PRODUCT_WORDS]
        is_title = len(plain) > 1 and sum(w[0].isupper() for w in plain) * 2 > len(plain)
        result = []
        for index, word in enumerate(words):
            is_name = any(c.isupper() or c.isdigit() for c in word[1:]) or not word.isascii()
            keep = word in PRODUCT_WORDS or is_name
            result.append(word if keep or (index and not is_title) else word[:1].lower() + word[1:])
        return " ".join(result)

    def imperative(self, gerund: str) -> str | None:
        """'Inserting' -> 'insert', by which candidate stem the corpus uses most."""
        stem = gerund.lower()[:-3]
        candidates = [stem, stem + "e"]
        if len(stem) > 2 and stem[-1] == stem[-2]:
            candidates.append(stem[:-1])
        best = max(candidates, key=lambda w: self.words[w])
        return best if self.words[best] >= 3 else None

    def english(self, heading: str, guide: bool) -> list[str]:
        first, _, rest = heading.partition(" ")
        phrase = self.lower_title(heading)
        if first.endswith("ing") and rest and (verb := self.imperative(first)):
            action = f"{verb} {phrase.partition(' ')[2]}"
            return [f"How do I {action}?", f"How can I {action}?", f"Please explain how to {action}."]
        lowered = first.lower()
        if guide and rest and lowered + "ing" not in heading.lower() and self.words[lowered + "ing"] >= 3:
            action = phrase.replace("your ", "my ").replace(" you ", " I ")
            return [f"How do I {action}?", f"How can I {action}?"]
        return [f"What is {phrase}?", f"Tell me about {phrase}.", f"Explain {phrase}."]

    def questions(self, lang: str, heading: str, guide: bool) -> list[str]:
        heading = heading.rstrip(":：.。?？ ")
        if lang == "en":
            return self.english(heading, guide)
        if lang == "zh":
            forms = ("如何{}？", "怎样{}？") if guide else ("{}是什么？", "什么是{}？")
            return [form.format(heading) for form in (*forms, "请介绍一下{}。")]
        how_ja = [f"{heading}の方法を教えてください。"] if guide else [f"{heading}とは何ですか？"]
        return [*how_ja, f"{heading}について教えてください。", f"{heading}を説明してください。"]

    def nested(self, lang: str, heading: str, title: str) -> str:
        heading = heading.rstrip(":：.。 ")
        if lang == "en":
            return f'What does "{heading}" mean in "{title}"?'
        if lang == "zh":
            return f"“{title}”中的“{heading}”是什么？"
        return f"「{title}」の「{heading}」とは何ですか？"


def cut_sentences(text: str, limit: int) -> str:
    """The longest run of whole sentences within limit characters ('' if the first is longer)."""
    if len(text) <= limit:
        return text
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s)|[。！？]", text[:limit])]
    return text[: ends[-1]] if ends else ""


def section_answer(blocks: list[Block], lang: str) -> str:
    limit = 260 if lang == "en" else 105
    lines: list[str] = []
    steps = 0
    for block in blocks:
        if block.kind not in ("p", "li") or not re.search(r"[.!?:。！？：]$", block.text):
            break
        room = limit - sum(map(len, lines))
        text = cut_sentences(block.text, room) if not lines else block.text if len(block.text) <= room else ""
        if not text or (lines and block.kind == "p" and len(lines) >= 2):
            break
        steps = steps + 1 if block.kind == "li" else 0
        lines.append(f"{steps}. {text}" if steps else text)
    while lines and lines[-1].rstrip().endswith((":", "：", ",")):
        lines.pop()
    answer = "\n".join(lines)
    return answer if len(answer) >= (25 if lang == "en" else 8) else ""


def section_chats(pages: list[Page], writer: QuestionWriter) -> Iterator[tuple[str, str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for page in pages:
        counts.update({(page.lang, b.text.lower()) for b in page.blocks if b.kind[0] == "h"})
    for page in pages:
        title = next((b.text for b in page.blocks if b.kind[0] == "h"), "")
        for index, block in enumerate(page.blocks):
            meaningful = 2 < len(block.text) <= 90 or (len(block.text) <= 2 and CJK.search(block.text))
            if block.kind[0] != "h" or not meaningful:
                continue
            answer = section_answer(page.blocks[index + 1 :], page.lang)
            if not answer:
                continue
            if counts[page.lang, block.text.lower()] == 1:
                options = writer.questions(page.lang, block.text, page.guide)
                start = stable_hash(page.doc_id + block.text)
                for shift in range(1 + start % 2):
                    yield page.lang, options[(start // 2 + shift) % len(options)], answer
            elif block.text != title:
                yield page.lang, writer.nested(page.lang, block.text, title), answer


def heading_translations(pages: list[Page]) -> Iterator[dict[str, str]]:
    titles: dict[str, dict[str, str]] = defaultdict(dict)
    for page in pages:
        if page.blocks and page.blocks[0].kind == "h1" and len(page.blocks[0].text) <= 60:
            titles[page.doc_id][page.lang] = page.blocks[0].text
    yield from (t for t in titles.values() if len(set(t.values())) == 3)


def territory_names(cldr: Path) -> Iterator[dict[str, str]]:
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for lang in LANG_NAMES:
        root = ET.parse(cldr / f"usr/share/unicode/cldr/common/main/{lang}.xml").getroot()
        for kind in ("territories/territory", "languages/language"):
            for node in root.iterfind(f"localeDisplayNames/{kind}"):
                code = node.get("type", "")
                if node.get("alt") is None and node.text and len(code) <= 3:
                    names[f"{kind}/{code}"][lang] = node.text
    yield from (t for t in names.values() if len(t) == 3)


def translation_chats(table: Iterable[dict[str, str]]) -> Iterator[tuple[str, str, str]]:
    forms = {
        "en": 'How do you say "{word}" in {target}?',
        "zh": "“{word}”用{target}怎么说？",
        "ja": "「{word}」は{target}で何と言いますか？",
    }
    for row in table:
        for asked_in in row:
            for target in row:
                if target != asked_in and stable_hash(row[asked_in] + target) % 2:
                    question = forms[asked_in].format(word=row[asked_in], target=LANG_NAMES[asked_in][target])
                    yield asked_in, question, row[target]


def emoji_names(cldr: Path, lang: str) -> dict[str, tuple[str, str]]:
    """Emoji -> (name, keywords); only skin-tone-free sequences, which are the ones people type."""
    names: dict[str, str] = {}
    keywords: dict[str, str] = {}
    for folder in ("annotations", "annotationsDerived"):
        root = ET.parse(cldr / f"usr/share/unicode/cldr/common/{folder}/{lang}.xml").getroot()
        for node in root.iterfind("annotations/annotation"):
            cp, text = node.get("cp", ""), node.text or ""
            if not EMOJI.search(cp) or SKIN_TONE.search(cp):
                continue
            (names if node.get("type") == "tts" else keywords)[cp] = text
    return {cp: (name, keywords.get(cp, "")) for cp, name in names.items() if "↑" not in name}


def emoji_chats(cldr: Path) -> Iterator[tuple[str, str, str]]:
    meaning = {
        "en": ["What does {e} mean?", "What is {e}?"],
        "zh": ["{e}是什么意思？", "{e} 是什么？"],
        "ja": ["{e}はどういう意味ですか？", "{e}とは何ですか？"],
    }
    which = {
        "en": 'Which emoji is "{n}"?',
        "zh": "哪个表情符号是“{n}”？",
        "ja": "「{n}」の絵文字はどれですか？",
    }
    words = {
        "en": "Give me keywords for {e}.",
        "zh": "{e}的关键词有哪些？",
        "ja": "{e}のキーワードは何ですか？",
    }
    joiner = {"en": ", ", "zh": "、", "ja": "、"}
    for lang in LANG_NAMES:
        for emoji, (name, keywords) in emoji_names(cldr, lang).items():
            form = meaning[lang][stable_hash(emoji + lang) % 2]
            yield lang, form.format(e=emoji), name
            yield lang, which[lang].format(n=name), emoji
            if keywords and stable_hash(emoji) % 2:
                yield lang, words[lang].format(e=emoji), joiner[lang].join(keywords.split(" | ")[:6])


SMALL_TALK: dict[str, list[tuple[list[str], str]]] = {
    "en": [
        (["Hello!", "Hi", "Hi there!", "Hello", "Good morning!"], "Hello! How can I help you?"),
        (
            ["Who are you?", "What are you?", "What is your name?", "Introduce yourself."],
            "I am a tiny demonstration model that ships with trtqwen. I know a little about office software, "
            "emoji and Python.",
        ),
        (
            ["What can you do?", "How can you help me?", "What can I ask you?"],
            "I can answer short questions about LibreOffice and GNOME, name emoji in three languages "
            "and write small Python functions.",
        ),
        (["Thank you!", "Thanks.", "Thanks a lot!"], "You are welcome!"),
        (["Goodbye!", "Bye", "See you later."], "Goodbye! Have a nice day."),
        (
            ["Are you a large model?", "How big are you?"],
            "No, I am very small: I have about five million weights.",
        ),
        (["Which languages do you speak?"], "I know a little English, Chinese, Japanese and Python."),
    ],
    "zh": [
        (["你好", "你好！", "您好！", "早上好！"], "你好！请问有什么可以帮您？"),
        (
            ["你是谁？", "你叫什么名字？", "请介绍一下你自己。"],
            "我是 trtqwen 附带的小型演示模型，懂一点办公软件、表情符号和 Python。",
        ),
        (
            ["你能做什么？", "你会什么？", "我可以问你什么？"],
            "我可以回答关于 LibreOffice 和 GNOME 的简短问题，说出表情符号的名称，还能写简单的 Python 函数。",
        ),
        (["谢谢！", "谢谢你。", "多谢"], "不客气！"),
        (["再见！", "拜拜"], "再见！祝您愉快。"),
        (["你有多大？", "你是大模型吗？"], "不是，我很小，只有大约五百万个参数。"),
        (["你会说哪些语言？"], "我会一点英语、中文、日语和 Python。"),
    ],
    "ja": [
        (
            ["こんにちは", "こんにちは！", "おはようございます。", "はじめまして。"],
            "こんにちは！何かお手伝いしましょうか？",
        ),
        (
            ["あなたは誰ですか？", "お名前は何ですか？", "自己紹介をしてください。"],
            "私は trtqwen に付属する小さなデモ用モデルです。"
            "オフィスソフト、絵文字、Python のことを少し知っています。",
        ),
        (
            ["何ができますか？", "何を質問できますか？", "あなたは何ができますか？"],
            "LibreOffice や GNOME についての短い質問に答えたり、絵文字の名前を言ったり、"
            "簡単な Python の関数を書いたりできます。",
        ),
        (["ありがとう！", "ありがとうございます。"], "どういたしまして！"),
        (["さようなら。", "またね。"], "さようなら。良い一日を！"),
        (
            ["あなたは大きなモデルですか？"],
            "いいえ、とても小さなモデルです。重みは約五百万個しかありません。",
        ),
        (["どの言語を話せますか？"], "英語、中国語、日本語、そして Python が少しわかります。"),
    ],
}


def small_talk_chats() -> Iterator[tuple[str, str, str]]:
    for lang, entries in SMALL_TALK.items():
        for questions, answer in entries:
            yield from ((lang, question, answer) for question in questions)


# --- code -------------------------------------------------------------------------------------------------


def read_stdlib(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if STDLIB_SKIP & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(source) >= 200:
            yield relative.as_posix(), source


def without_docstring(source: str, node: ast.FunctionDef) -> str:
    lines = source.splitlines()
    doc = node.body[0]
    kept = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
    return "\n".join(line[node.col_offset :].rstrip() for line in kept if line.strip())


def function_chats(source: str) -> Iterator[tuple[str, str, str]]:
    """Short documented functions, without methods: the docstring's first sentence is the request."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or node.decorator_list:
            continue
        if node.args.args and node.args.args[0].arg in ("self", "cls"):
            continue
        doc = ast.get_docstring(node)
        if not doc or node.name.startswith("__"):
            continue
        purpose = squeeze(doc.split("\n\n")[0])
        code = without_docstring(source, node)
        if not (15 <= len(purpose) <= 140) or len(code) > 320 or purpose.startswith(">>>"):
            continue
        purpose = cut_sentences(purpose, 100) or purpose
        signature = f"{node.name}({', '.join(a.arg for a in node.args.args)})"
        answer = f"```python\n{code}\n```"
        yield "en", f"Write a Python function `{signature}`: {purpose}", answer
        other = ("zh", f"写一个 Python 函数 `{signature}`。")
        if stable_hash(signature) % 2:
            other = ("ja", f"Python の関数 `{signature}` を書いてください。")
        yield other[0], other[1], answer


# --- assembly ---------------------------------------------------------------------------------------------


def take_bytes(records: list[dict[str, str]], per_lang: int, longest: int = 6000) -> list[dict[str, str]]:
    """Documents in hash order until each language has about per_lang bytes."""
    used: Counter[str] = Counter()
    taken = []
    for record in sorted(records, key=lambda r: stable_hash(r["text"])):
        text = record["text"]
        if len(text.encode()) > longest:
            text = text[: text.rfind("\n", 0, longest // (1 if text.isascii() else 3))]
        size = len(text.encode())
        if size >= 200 and used[record["lang"]] + size <= per_lang:
            used[record["lang"]] += size
            taken.append({"lang": record["lang"], "text": text})
    return sorted(taken, key=lambda r: LANGS.index(r["lang"]))


def add_documents(corpus: Corpus, pages: list[Page], stdlib: list[tuple[str, str]]) -> None:
    splits = {"train": corpus.train, "val": corpus.val, "test": corpus.test}
    shippable = []
    for page in pages:
        record = {"lang": page.lang, "kind": "text", "text": page.text()}
        splits[page_split(page)].append(record)
        if page.redistribute and page_split(page) == "train":
            shippable.append(record)
    for name, source in stdlib:
        # The longest modules would otherwise make up most of the code.
        end = source.rfind("\n", 0, STDLIB_FILE_LIMIT) + 1 if len(source) > STDLIB_FILE_LIMIT else None
        text = source[:end]
        record = {"lang": "code", "kind": "text", "text": text}
        splits[split_of("py/" + name)].append(record)
        if split_of("py/" + name) == "train":
            shippable.append(record)
    corpus.calibration = take_bytes(shippable, 15_000)


def build_corpus(help_roots: dict[str, Path], gnome: Path | None, cldr: Path, stdlib_root: Path) -> Corpus:
    raw = [page for lang, root in help_roots.items() for page in read_help_pages(root, lang)]
    if gnome is not None:
        raw += [page for lang in GNOME_DIRS for page in read_gnome_pages(gnome, lang)]
    pages = drop_repeats(raw)
    stdlib = list(read_stdlib(stdlib_root))
    corpus = Corpus()
    add_documents(corpus, pages, stdlib)

    train_pages = [page for page in pages if page_split(page) == "train"]
    words: Counter[str] = Counter()
    for page in train_pages:
        if page.lang == "en":
            words.update(re.findall(r"[a-z]+", page.text().lower()))
    chats: list[tuple[str, str, str]] = list(section_chats(train_pages, QuestionWriter(words)))
    chats += translation_chats(heading_translations(train_pages))
    chats += translation_chats(territory_names(cldr))
    chats += emoji_chats(cldr)
    for name, source in stdlib:
        if split_of("py/" + name) == "train":
            chats += function_chats(source)
    chats += list(small_talk_chats()) * 12
    corpus.train += [{"lang": lang, "kind": "chat", "text": render_chat(q, a)} for lang, q, a in chats]
    return corpus


def write_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]
