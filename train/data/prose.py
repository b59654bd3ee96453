"""Turns documentation markup (docstrings, reStructuredText, Markdown) into plain English prose.

Rules, applied line by line and then to whole paragraphs: what is code, table, mathematics or
markup goes, what reads as sentences stays. It errs on the side of dropping.
"""

import re
from collections.abc import Iterator

MIN_WORDS, MIN_CHARS = 6, 40

_KEPT_DIRECTIVES = frozenset(
    [
        "note",
        "warning",
        "tip",
        "important",
        "caution",
        "attention",
        "hint",
        "danger",
        "error",
        "admonition",
        "seealso",
        "versionadded",
        "versionchanged",
        "deprecated",
        "topic",
        "sidebar",
    ]
)
_DIRECTIVE = re.compile(r"^\.\.\s*([\w:+-]+)\s*::\s*(.*)$")
_FENCE = re.compile(r"^(```|~~~)")
_PROMPT = re.compile(r"^(>>>|\.\.\. |\.\.\.$|In \[\d*\]:|Out\[\d*\]:|\$ |% |[A-Z]:\\)")
_RULE = re.compile(r"^([=\-~^\"'#*+_.`:<>])\1{2,}$")
_TABLE = re.compile(r"^(\||\+[-=+]+|[=-]{2,}\s+[=-]{2,})")
_BULLET = re.compile(r"^([-*+•o]|\(?\d{1,3}[.)]|\(?[a-z]\)|#\.)\s+")
_FIELD = re.compile(r"^[:@](\w+)(?:\s+[^:`]*)?:(?:\s+(.*)|$)")
_DROPPED_FIELDS = frozenset(
    ["type", "rtype", "vartype", "meta", "author", "license", "copyright", "date"]
)
_SECTION = re.compile(
    r"^(args|arguments|parameters|returns?|yields?|raises|attributes|keyword args|keyword arguments"
    r"|other parameters|params|warns|throws|kwargs|see also|references|examples?|usage|notes?)"
    r"\s*:?$",
    re.IGNORECASE,
)
_ITEM = re.compile(r"^\*{0,2}`{0,2}[A-Za-z_][\w.*]*`{0,2}\s*(?:\([^)]*\))?\s*:\s+(?=\S)")
_TYPED_ITEM = re.compile(r"^`{0,2}[A-Za-z_]\w*`{0,2} \(.*?\)\s*:(?:\s+|$)")
_HEADER = re.compile(r"^[*`'\"\w.,\[\]{}()|/ =-]{1,60}(?:\s*:.*)?$")
_INLINE = [
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),
    (re.compile(r"\[([^\]\[]*)\]\([^)\s]*\)"), r"\1"),
    (re.compile(r":[a-zA-Z][\w:+-]*:`[!~]?([^`<]+?)\s*(?:<[^`>]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),
    (re.compile(r"`{1,2}([^`]+)`{1,2}_{0,2}"), r"\1"),
    (re.compile(r"\[~?([A-Za-z][\w.]*)\](?![\w_])"), r"\1"),
    (re.compile(r"\s*\[[\w#*-]{1,12}\]_(?=\W|$)"), ""),
    (re.compile(r"</?[a-zA-Z][^<>]{0,200}>"), ""),
    (re.compile(r"\*\*([^*\s][^*]*)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"\|(\w[\w ]*)\|"), r"\1"),
    (re.compile(r"\\([\\*_`|<> ])"), r"\1"),
    (re.compile(r"&(?:nbsp|amp|lt|gt|quot);"), " "),
    (re.compile(r"\s+"), " "),
]
_COMMON = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "to",
        "in",
        "is",
        "are",
        "was",
        "be",
        "it",
        "that",
        "this",
        "and",
        "or",
        "for",
        "with",
        "as",
        "by",
        "on",
        "at",
        "from",
        "if",
        "not",
        "can",
        "will",
        "which",
        "when",
        "you",
        "your",
        "we",
        "its",
        "has",
        "have",
        "should",
        "must",
        "may",
        "than",
        "then",
        "into",
        "used",
        "all",
        "any",
        "no",
        "but",
    ]
)
_PLAIN = re.compile(r"[a-z]+[,;]?")
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_CODE = re.compile(r"[=<>{}\[\]\\|@#$^~_]|\w\(|\)\.|\w\.\w|::|->")
_LATEX = re.compile(r"\\[a-zA-Z]{2,}|:math:")
_NOTICE = re.compile(
    r"copyright|all rights reserved|licensed under|without warrant|permission is hereby|SPDX|"
    r"redistribution and use|express or implied|\blicen[sc]e\b.*\bconditions\b",
    re.IGNORECASE,
)


def prose(text: str) -> list[str]:
    """Paragraphs of a docstring or a README that read as English sentences, each on one line."""
    return [clean for block in _blocks(text) if (clean := _inline(block)) and reads_well(clean)]


def reads_well(text: str) -> bool:
    """Whether a paragraph is English sentences rather than a fragment, code, data or a notice."""
    words = _WORD.findall(text)
    if len(words) < MIN_WORDS or len(text) < MIN_CHARS or not text[0].isalnum():
        return False
    letters = sum(map(len, words))
    common = sum(word.lower() in _COMMON for word in words)
    ends = text[-1] in ".!?" or text[-2:] in ('."', ".)", "?)", ".'", '!"')
    cut_off = words[-1].lower() in _COMMON  # "... is given by", and then a formula that went.
    return (
        letters + text.count(" ") >= 0.86 * len(text)
        and common >= 0.15 * len(words)
        and 3 <= letters / len(words) <= 8
        and len(_CODE.findall(text)) <= 0.12 * len(words)
        and (ends or (text[-1] not in ":," and len(words) >= 2 * MIN_WORDS and not cut_off))
        and not _LATEX.search(text)
        and not _NOTICE.search(text)
        and "http" not in text
    )


def _inline(block: str) -> str:
    for pattern, replacement in _INLINE:
        block = pattern.sub(replacement, block)
    block = block.strip()
    if block and block[-1] == ":" and ". " in block:
        # "Does this. For example:" announces what was dropped: keep the part before.
        block = block[: block.rindex(". ") + 1]
    first = block.partition(" ")[0]
    return first.capitalize() + block[len(first) :] if _PLAIN.fullmatch(first) else block


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs with their markup still inline; code, tables and headings are gone."""
    lines = [line.rstrip() for line in text.expandtabs(4).splitlines()]
    lines = list(_without_literals(lines))
    block: list[str] = []
    item_indent: int | None = None
    last_indent = 0
    for index, line in enumerate(lines):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        starts = (
            not stripped
            or indent < last_indent
            or (_ends_sentence(block) and (indent != last_indent and len(block) > 1))
        )
        if _SECTION.match(stripped):
            item_indent, stripped, starts = -1, "", True
        elif stripped and item_indent is not None:
            item_indent = indent if item_indent < 0 else item_indent
            if indent < item_indent:
                item_indent = None
            elif indent == item_indent and (match := _ITEM.match(stripped)):
                stripped, starts = stripped[match.end() :], True
        if match := _BULLET.match(stripped):
            stripped, starts = stripped[match.end() :], True
            if match := _ITEM.match(stripped):
                stripped = stripped[match.end() :]
        elif match := _TYPED_ITEM.match(stripped):
            stripped, starts = stripped[match.end() :], True
        elif match := _FIELD.match(stripped):
            dropped = match[1].lower() in _DROPPED_FIELDS
            stripped, starts = ("" if dropped else match[2] or ""), True
        elif _is_header(lines, index, indent, stripped):
            stripped, starts = "", True
        if starts and block:
            yield " ".join(block)
            block = []
        if stripped:
            block.append(stripped)
            last_indent = indent
    if block:
        yield " ".join(block)


def _ends_sentence(block: list[str]) -> bool:
    return bool(block) and block[-1][-1] in ".!?:"


def _is_header(lines: list[str], index: int, indent: int, stripped: str) -> bool:
    """A numpy parameter ("x : array_like") or term, whose description is indented below it."""
    if not stripped or stripped[-1] in ".,;" or not _HEADER.match(stripped):
        return False
    following = lines[index + 1] if index + 1 < len(lines) else ""
    before = lines[index - 1].strip() if index else ""
    deeper = len(following) - len(following.lstrip()) > indent and bool(following.strip())
    return deeper and (not before or " : " in stripped or len(stripped.split()) <= 3)


def _without_literals(lines: list[str]) -> Iterator[str]:
    """Drops code blocks, doctests, tables, directives and headings; "" marks each gap."""
    skip_deeper: int | None = None  # Everything indented deeper than this goes.
    fenced = until_blank = False
    literal_after: int | None = None
    for index, line in enumerate(lines):
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if _FENCE.match(stripped):
            fenced = not fenced
            yield ""
            continue
        if not stripped:
            until_blank = False
            yield ""
            continue
        if skip_deeper is not None and indent > skip_deeper:
            continue
        skip_deeper = None
        if literal_after is not None:
            deeper, skip_deeper = indent > literal_after, literal_after
            literal_after = None
            if deeper:
                continue
            skip_deeper = None
        if fenced or until_blank:
            continue
        if _PROMPT.match(stripped) or _TABLE.match(stripped):
            until_blank = True
            yield ""
        elif match := _DIRECTIVE.match(stripped):
            yield ""
            if match[1].lower() in _KEPT_DIRECTIVES:
                if match[1].lower() in ("note", "warning", "tip", "important", "hint"):
                    yield " " * indent + match[2]
            else:
                skip_deeper = indent
        elif stripped.startswith(".. ") or stripped == "..":
            skip_deeper = indent
            yield ""
        elif _RULE.match(stripped) or stripped.startswith("#") or _is_title(lines, index):
            yield ""
        elif stripped.endswith("::"):
            literal_after = indent
            yield line[: line.rindex("::")] + (":" if stripped != "::" else "")
        elif indent >= 4 and index and not lines[index - 1].strip() and _looks_like_code(stripped):
            until_blank = True
            yield ""
        else:
            yield line


def _is_title(lines: list[str], index: int) -> bool:
    following = lines[index + 1].strip() if index + 1 < len(lines) else ""
    return bool(_RULE.match(following)) and len(lines[index].strip()) <= len(following) + 4


def _looks_like_code(line: str) -> bool:
    return bool(
        re.search(r"\w\(.*\)\s*$|^\w[\w.\[\], ]* = |^(import|from|def|class|for|if) .*", line)
    )
