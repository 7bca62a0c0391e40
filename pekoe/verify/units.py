r"""What stands behind a number: a unit, or the name of what was counted. Anything else there is another answer.

A unit is a product of powers of the units below (`km h^{-1}`, `dollars per hour`, `square meters`). What was counted is
a noun in the plural, perhaps with words around it (`red marbles`, `years old`), none of which denies or chooses.
"""

from __future__ import annotations

import re
from collections import Counter

_NAMES = """
meter meters metre metres m; centimeter centimeters centimetre centimetres cm; millimeter millimeters mm; nanometer nm;
kilometer kilometers kilometre kilometres km kms; decimeter dm; inch inches in; foot feet ft; yard yards yd yds;
mile miles mi; gram grams g gm gms; kilogram kilograms kg kgs kilos; milligram milligrams mg; tonne tonnes ton tons;
pound pounds lb lbs; ounce ounces oz; second seconds sec secs s; minute minutes min mins; hour hours hr hrs h;
day days; week weeks; month months; year years yr yrs; millisecond milliseconds ms; liter liters litre litres L l;
milliliter milliliters mL ml; gallon gallons gal; cup cups; acre acres; hectare hectares ha; degree degrees deg \\circ;
radian radians rad; celsius; fahrenheit; kelvin K; newton newtons N; joule joules J; kilojoule kilojoules kJ;
watt watts W; kilowatt kilowatts kW; volt volts V; ampere amperes amp amps A; ohm ohms; pascal pascals Pa; kPa;
hertz Hz; mole moles mol; coulomb coulombs C; calorie calories cal; kcal; dollar dollars USD usd buck bucks; mph;
kph kmph; cent cents; euro euros EUR; yuan RMB rmb CNY; yen JPY; rupee rupees Rs rs INR; unit units; am a.m; pm p.m;
bit bits; byte bytes; knot knots; percent; feet; point points pts; person persons people
"""
UNITS = {alias: names.split()[0] for names in _NAMES.split(";") if names.split() for alias in names.split()}
_PLURALS = "people men women children feet teeth mice geese fish sheep deer dice cattle oxen cacti series pence"
_NO_NOUNS = """
or and not no never neither nor none but if is are was were be isnt arent has does do than times plus minus over
perhaps maybe yes this these those that its it they we you i so thus hence because when where unless except instead
either both another other others thirds halves fourths fifths sixths sevenths eighths ninths tenths dozens half
hundreds thousands hundredths thousandths millions billions scores tens ones less more fewer most least guess guesses
always from to until between about versus vs equals factorial cubed short one two three four five six seven eight nine
ten twelve
"""
_PLURAL, _NO_NOUN = frozenset(_PLURALS.split()), frozenset(_NO_NOUNS.split())
_NO_CJK = re.compile("[或不非无没万亿千百十半分]")
_TAIL = re.compile(r"(?:\\text\{[^{}]*\}|\\cdot|\^? ?\\circ|[^\W\d_]++\.?|[ ./·*-]|\^ ?\{? ?-?[1-4] ?\}?)++")
_STARTS = re.compile(r"(?<=[0-9})\]!.]) *(?=[^\W\d_]|\^? ?\\circ)|(?<=[^-+*/=<,(:_^&{\\ ]) *(?=\\text\{)")
_OF = r" ?\{ ?(\\text\{[^{}]*\}(?:\^ ?\{?-?[1-4]\}?)?) ?\}"
_FRACTION = re.compile(rf"\\frac{_OF}{_OF}")
_FACTOR = re.compile(r"([^\W\d_]+(?:\.[a-z])?|\\circ)\.?(?: ?\^ ?\{? ?(-?[1-4]))?|(/)")
_POWERS = {"square": 2, "sq": 2, "cubic": 3}


def split_unit(text: str, is_reference: bool = False) -> tuple[str, str]:
    """Return the value in `text` and the name of its unit, or `text` and "" where what follows the value is none.

    A reference offers no choice: any words behind its value name what was counted.
    """
    tail = max(0, len(text) - 120)
    whole = text[:tail] + _FRACTION.sub(r"\1/\2", text[tail:])
    for match in _STARTS.finditer(whole, tail):
        start, end = match.span()
        if start and _TAIL.fullmatch(whole, end) and (unit := _unit(whole[end:], is_reference)):
            return whole[:start].strip(), unit
    return text, ""


def _unit(text: str, is_reference: bool) -> str:
    """Return the one name of a unit or of what was counted; "" where `text` is neither."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace(r"\cdot", " ")
    bare = re.sub(r"([A-Za-z]+) squared", r"\1^2", bare)
    factors = _FACTOR.findall(re.sub(r"(?<![a-z])per(?![a-z])", "/", bare))
    words = [word for word, _, _ in factors if word]
    if not words or (len(words[0]) == 1 and words[0].isascii() and not text.startswith("\\text")):
        return ""  # the t of 2t, the m of 5m: a variable
    powers: Counter[str] = Counter()
    sign = times = 1
    for word, power, slash in factors:
        if slash:
            sign = -1
        elif word.lower() in _POWERS:
            times = _POWERS[word.lower()]
        elif name := UNITS.get(word) or UNITS.get(word.lower()):
            powers[name] += sign * times * int(power or 1)
            times = 1
        else:
            return "" if any(power for _, power, _ in factors) else _counted(words, is_reference)
    if set(powers) == {"degree", "coulomb"}:
        return "celsius"
    return " ".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()) if power)


def _counted(words: list[str], is_reference: bool) -> str:
    """Return the noun in the plural that the words are about, or ""."""
    lower = [word.lower().replace("'", "") for word in words]
    if len(words) > 6 or _NO_NOUN.intersection(lower):
        return ""
    if len(words) == 1 and not words[0].isascii():
        return "" if _NO_CJK.search(words[0]) else words[0]
    nouns = (word for word in lower if word in _PLURAL or re.fullmatch(r"[a-z]{2,}[^\Wsui_]s", word))
    return next(nouns, " ".join(words) if is_reference else "")
