r"""Units of numbers: 5 cm, 5 km/h, 5\text{ m}^2, $5, 5°."""

import re

# Unit -> its names. Each name may also have a plural "s".
_UNITS = {
    "mm": "millimeter", "cm": "centimeter", "m": "meter meters metre metres", "km": "kilometer", "in": "inch inches",
    "ft": "foot feet", "yd": "yard", "mi": "mile", "mi/h": "mph", "g": "gram", "kg": "kilogram", "mg": "milligram",
    "lb": "pound lbs", "oz": "ounce", "s": "second sec", "ms": "millisecond", "min": "minute", "h": "hour hr hrs",
    "day": "day", "week": "week", "month": "month", "year": "year yr", "l": "liter litre", "ml": "milliliter millilitre",
    "°": "degree deg", "rad": "radian", "$": "dollar usd", "€": "euro eur", "£": "gbp", "¥": "yen yuan rmb", "¢": "cent",
    "hz": "hertz", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "mol": "mole",
}  # fmt: skip
UNITS = {name + plural: unit for unit, names in _UNITS.items() for name in (unit, *names.split()) for plural in ("", "s")}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3"}
# A single letter is a unit only where it cannot be a variable: 5 m, 5\text{m}, but not 5m.
_LETTER = re.compile(r"\s*(-?[\d.,]+)\s+([mgshLNJWV])\s*(\^\s*\{?[23]\}?)?\s*\.?\s*")
_LETTER_AS_TEXT = re.compile(r"(.+)\\(?:text|mathrm)\s*\{\s*([mgshLNJWV])\s*\}\s*(\^\s*\{?[23]\}?)?\s*\.?\s*", re.DOTALL)
_TEXT_POWER = re.compile(r"\\(?:text|mathrm)\s*\{\s*([A-Za-z]{2,})\s*\}\s*\^\s*\{?([23])\}?")
_DEGREES = re.compile(r"(.*?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\^?\{?°\}?|\\degree)\s*\.?\s*", re.DOTALL)
# 60 km/h, 60\text{ km per hour}
_RATE = re.compile(r"(?<=[\d}])\s*(?:\\(?:text|mathrm)\s*\{)?\s*([A-Za-z]+)(?:\s*/\s*|\s+per\s+)([A-Za-z]+)\s*\}?\s*\.?$")


def unit_of_words(words: list[str]) -> str:
    """Return the unit that the first words after a number are, such as "square centimeters", or "" if they are none."""
    words = [re.sub(r"[.,;{} ]", "", word) for word in words[:2]]
    power = _POWERS.get(words[0].lower(), "") if words else ""
    name, _, digit = "".join(words[1:] if power else words[:1]).partition("^")
    unit = UNITS.get(name) or UNITS.get(name.lower(), "")
    return unit + (power or (digit and "^" + digit[0])) if unit else ""


def without_unit(text: str) -> tuple[str, str]:
    r"""Split units that are not words from the end of a text: 5 m, 5 km/h, 5\text{ m}. Returns the text and the unit."""
    text = _TEXT_POWER.sub(r" \1^\2 ", text)
    if (match := _RATE.search(text)) and match[1].lower() in UNITS and match[2].lower() in UNITS:
        return text[: match.start()], f"{UNITS[match[1].lower()]}/{UNITS[match[2].lower()]}"
    if match := _DEGREES.fullmatch(text):
        return match[1], "°"
    match = _LETTER.fullmatch(text) or _LETTER_AS_TEXT.fullmatch(text)
    return (match[1], match[2].lower() + re.sub(r"[{} ]", "", match[3] or "")) if match else (text, "")
