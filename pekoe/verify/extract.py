r"""Finding the final answer: the last complete `\boxed{...}` (or `\fbox{...}`) of a response, or what it says it is."""

from __future__ import annotations

import re

from pekoe.verify.normalize import rewriter

# One match takes a whole run of backslashes, so that no character is looked at twice, and `\{` is not taken for `\\{`:
# after an odd run a brace is escaped, after an even one it is a brace. `++` never gives back what it took.
_TOKEN = re.compile(r"\\++(?:(?P<box>(?:boxed|fbox)\s*+\{)|(?P<brace>[{}]))?|[{}]")

# What may stand between two boxes that are one answer: `\boxed{1}, \boxed{2} and \boxed{3}`.
_LINK = re.compile(
    r"(?:\s|\$|\\[()\[\],;! ]|\\q?quad|,|;|\\text\s*\{[^{}]*\}|[a-z](?:_[0-9])?\s*="
    r"|(?!(?:no|not|or|but|then|wait|if|wrong|incorrect|instead|rather|actually|hmm)\b)[a-z]++){0,40}"
)
_MAX_BOXES = 20
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_SENTENCE = re.compile(r"(?<=[^0-9\s])\.\s+|(?<=[0-9])\.\s+(?=[A-Z])|\n\n+")
_SAYS = re.compile(r"=|:|\b(?:is|are|equals|was|be)\b|\\Rightarrow|\\implies")
_MATHS = re.compile(r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(([^\n]+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_DENIES = re.compile(r"(?i)\b(?:cannot|can't|not|no|impossible)\b")
_ANSWER = re.compile(r"(?i)\banswer\b|答案[是为]?")
_NO_NUMBER, _LEADS = re.compile("[^0-9=<>]{3,}"), re.compile(r"\b(?:is|are|equals|be)\b|:")
_BARE_BOX = re.compile(r"\\boxed\s*([-+]?[0-9][0-9,./]*)")
_MARKED = re.compile(r"####[ \t]*(\S[^\n]*)$")
_markdown = rewriter(
    (r"(?m)^[ \t]*#{1,6}[ \t]+(?=[^\d\s])", ""),
    (r"\*\*|__|`", ""),
    (r"(?<![\w*])\*(?! )([^*\n]+)(?<! )\*(?![\w*])", r"\1"),
)
_CLOSING = re.compile(r"(?is)\s*(?:i hope (?:it|this) is correct.*|<\|im_(?:start|end)\|>.*)$")


def after_thinking(text: str) -> str:
    """Return what stands behind the model's thinking (`<think>...</think>`): nothing where that has not ended."""
    *_, answer = text.rpartition("</think>")
    return "" if answer.lstrip().startswith("<think>") else answer


def tagged(text: str) -> str | None:
    """Return what the last `<answer>...</answer>` holds."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the complete box that opens last, or None where no box is complete.

    Braces nest; `\{` and `\}` are text. Time is linear in the length of `text`, whatever it holds.
    """
    opens = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if opens < 0:
        return None
    if bare := _BARE_BOX.match(text, opens):
        return bare[1].rstrip(".,")
    # Most responses end with their only box: look there first, and read the whole only if that box is not complete.
    boxes = _boxes(text, opens) or _boxes(text, 0)
    if not boxes:
        return None
    _, start, end = max(boxes, key=lambda box: box[1])
    return text[start:end]


def linked_boxes(text: str) -> list[str]:
    r"""Return the contents of the last box and of those that lead up to it as one answer (`\boxed{1}, \boxed{2}`)."""
    tail = text[-4000:]
    boxes = sorted(_boxes(tail, 0))
    linked = [tail[start:end] for _, start, end in boxes[-1:]]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes), strict=False):
        if len(linked) >= _MAX_BOXES or not _LINK.fullmatch(tail[before[2] + 1 : after[0]]):
            break
        linked.insert(0, tail[before[1] : before[2]])
    return linked


def is_prose(text: str) -> bool:
    """Whether `text` is sentences rather than an expression."""
    return len(_WORD.findall(re.sub(r"\\text[a-z]*\s*\{[^{}]*\}", "", text[:4000]))) >= 4


def conclusion(text: str) -> str | None:
    """Return what the last sentence of `text` says something is: `... so the answer is 10.` gives `10`."""
    if _DENIES.search(text[-2000:]):
        return None
    sentence = _last_sentence(text)
    *_, claim = _SAYS.split(sentence)
    claim = claim.strip().rstrip(".").strip()
    if claim != sentence.strip().rstrip(".") and claim.strip("$ ") and len(_WORD.findall(claim)) <= 3:
        maths = _MATHS.findall(claim)
        return next(filter(None, maths[-1])).strip() if maths else claim.strip("$ ")
    return None


def claimed(text: str) -> str | None:
    """Return what stands behind words that lead to it and hold no number: `The answer is 7`, `Total: 7`."""
    plain = re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", text)
    head, behind = _NO_NUMBER.match(plain), plain.rfind(":") + 1
    if head is None or not behind <= head.end() or _DENIES.search(plain):
        return None
    # What leads to it ends before the first number, and behind the last colon.
    leads = (lead.end() for lead in _LEADS.finditer(plain, 3, head.end()) if lead.end() >= behind)
    claim = plain[next(leads, len(plain)) :].lstrip()
    return claim if re.search("[0-9]", claim) else None


def unboxed(text: str) -> str | None:
    """Return what a response without a box says that the answer is: in tags, behind `####` or the word "answer"."""
    if (claim := tagged(text)) is not None:
        return claim
    text = _markdown(text[-2000:].rstrip().removesuffix("</answer>"))
    if last := _MARKED.search(text):
        return last[1]
    *_, last = [None, *_ANSWER.finditer(text)]
    if last and (claim := conclusion(":" + text[last.end() :].lstrip(" :：\n").split("\n\n")[0])):
        return claim
    sentence = _last_sentence(text)
    maths = _MATHS.findall(sentence)
    return next(filter(None, maths[-1])).strip() if maths else conclusion(sentence)


def _last_sentence(text: str) -> str:
    text = _CLOSING.sub("", text[-2000:]).strip()
    return next((sentence for sentence in reversed(_SENTENCE.split(text)) if sentence.strip(" .$")), "")


def _boxes(text: str, first: int) -> list[tuple[int, int, int]]:
    """Return the complete boxes from `first` on: where the command, the content and its closing brace begin."""
    stack: list[tuple[int, int]] = []  # of each open box; (-1, -1) for a plain brace
    boxes: list[tuple[int, int, int]] = []
    for match in _TOKEN.finditer(text, first):
        token = match[0]
        if match["box"]:
            stack.append((match.start(), match.end()))
            continue
        if token[-1] == "\\" or (match["brace"] and len(token) % 2 == 0):  # a bare run, or an escaped brace
            continue
        if token[-1] == "{":
            stack.append((-1, -1))
        elif stack and (opened := stack.pop()) != (-1, -1):
            boxes.append((*opened, match.start("brace") if match["brace"] else match.start()))
    return boxes
