"""Random answers in the formats that models and people use, correct and wrong ones, for comparisons with other harnesses."""

import random
import string

LOREM = "the chart shows a bar for every year, and the values of the bars are given above them. "
OPTIONS = [
    {"A": "a red car", "B": "two dogs", "C": "Vitamin C", "D": "none"},
    {"A": "12", "B": "14", "C": "3", "D": "120"},
    {"A": "yes", "B": "no"},
    {"A": "Left", "B": "Right", "C": "Above", "D": "Below"},
    {"A": "a cat", "B": "an apple", "C": "Zebra", "D": "The Answer", "E": "E. coli"},
]
LISTS = ["A. red B. green\nC. blue D. none", "(A) yes (B) no", "A or B", "B, C", "A B C D", "1. yes\n2. no", "yes/no", "Z"]
SENTENCES = ["I don't know", "dont know", "Sorry, I can't help with images of people yet.", "Cannot determine the answer"]
SENTENCES += [
    "I'm sorry, but without the image provided",
    "Failed to obtain answer via API.",
    "not sure",
    "maybe",
    "N/A",
    "None",
]
WORDS = ["zero", "one", "two", "three", "four", "five", "ten", "eleven", "twelve", "twenty", "a dozen", "none", "twenty-one"]
PHRASES = [
    "red car",
    "12 May 2020",
    "New York",
    "café",
    "Straße",
    "İstanbul",
    "cat/dog",
    "ma'am",
    "isn't",
    "couldnt've",
    "東京",
]
PHRASES += [
    "Dr. No",
    "e.g. a cat",
    "U.S.A.",
    "$1,000",
    "1,000,000",
    "3.5 million",
    "12:30",
    "https://a.b/c?d=e",
    "x_1 + y",
    "ﬁne",
]
NUMBERS = [
    "3",
    "3.0",
    "3.",
    ".5",
    "0",
    "-2",
    "+2",
    "25%",
    "0.25",
    "1e3",
    "1,000",
    "1000",
    "inf",
    "nan",
    "1_000",
    "10",
    "100",
    "-0",
]
NUMBERS += ["2019", "٣", "３", "1/2", "1,,000", "5 %", "12.50", "\N{MINUS SIGN}3", "50%%"]

# Each format wraps an answer.
FORMATS = [
    *["{}"] * 6,
    *[
        "{}.",
        "{}!",
        "{} ?",
        "{},",
        " {} ",
        "\n{}\n",
        "\t{}",
        "  {}",
        "{}\u00a0",
        '"{}"',
        "'{}'",
        "`{}`",
        "``{}``",
        "({})",
        "[{}]",
    ],
    *["**{}**", "*{}*", "__{}__", "# {}", "- {}", "1. {}", "> {}", "```\n{}\n```", "${}$", "\\boxed{{{}}}", "$\\boxed{{{}}}$"],
    *[
        "<answer>{}</answer>",
        "<answer> {} </answer>",
        "<ANSWER>{}</ANSWER>",
        "<answer>{}",
        "<answer>x</answer><answer>{}</answer>",
    ],
    *[
        "<think>yes, no, A or 3</think>{}",
        "<think>\nno\n</think>\n<answer>{}</answer>",
        "so</think> {}",
        "<think>{}",
        "{}</think>",
    ],
    *[
        "<think></think></think>{}",
        "</think><think>{}",
        "<analysis>3</analysis>{}",
        "<THINK>no</THINK>{}",
        "<thinking>a</thinking>{}",
    ],
    *[
        "Answer: {}",
        "Answer:{}",
        "The answer is {}.",
        "the answer is: {}",
        "answer is **{}**",
        "The correct option is {}",
        "final answer\n{}",
    ],
    *[
        "the {}",
        "a {}",
        "an {}",
        "It is {}.",
        "{} units",
        "{} cm",
        "{}cm",
        "{}%",
        "{} %",
        "${}",
        "€{}",
        "{} dollars",
        "about {}",
        "~{}",
    ],
    *[
        "-{}",
        "{}.0",
        "{}0",
        "0{}",
        "+{}",
        "{},000",
        "{}, I think",
        "No, {}",
        "Yes, {}",
        "not {}",
        "{} or no",
        "{} and 3",
        "{}; {}",
    ],
    *[
        "{}\n{}",
        "{}\n\nBecause it is so.",
        "First,\n{}",
        "{} {}",
        "({}) is right",
        "{}: so",
        "{}) so",
        "Option {}",
        "I choose {}",
        "答案是{}",
    ],
    *[
        "{}?",
        "{}!!",
        "{} -",
        "- {} -",
        "/{}/",
        "{}/",
        "= {}",
        "x = {}",
        "{}@",
        "<b>{}</b>",
        "{{{}}}",
        "{}\\n",
        "{}…",
        "“{}”",
        "{}。",
    ],
    LOREM * 3 + "{}",
    "{}" + ". " * 40,
    LOREM + "{}. " + LOREM,
]
CHANGES = [str.upper, str.lower, str.title, str.strip, lambda text: text.replace(" ", "  "), lambda text: text.replace(",", "")]


class Answers:
    """Draws answers; the same ones for the same seed."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def misspelt(self, text: str) -> str:
        """Replace, insert or remove one character."""
        place = self.rng.randrange(len(text) + 1)
        return text[:place] + self.rng.choice(["", *"aeno .,'-1٣ßİ"]) + text[place + self.rng.randrange(2) :]

    def wrapped(self, core: str) -> str:
        """Return an answer in up to three formats, sometimes with other letters."""
        for _ in range(self.rng.choice([0, 0, 1, 1, 1, 2, 3])):
            form = self.rng.choice(FORMATS)
            core = form.replace("{}", core) if "{{" not in form else form.format(core)
        if self.rng.random() < 0.15:
            core = self.rng.choice(CHANGES)(core)
        return self.misspelt(core) if self.rng.random() < 0.1 else core

    def of(self, *cores: str) -> str:
        """Return one of the cores in a format, or now and then another answer, nothing, or a text that is very long."""
        draw = self.rng.random()
        if draw < 0.02:
            return self.rng.choice(["", " ", "\n", ".", "\N{ZERO WIDTH SPACE}"])
        if draw < 0.08:
            return self.rng.choice(SENTENCES + LISTS)
        if draw < 0.081:
            return LOREM * 20 + self.rng.choice(cores)
        if draw < 0.12:
            return self.wrapped(self.rng.choice(PHRASES + WORDS + NUMBERS))
        return self.wrapped(self.rng.choice(cores))

    def text(self) -> str:
        """Return a phrase, a number or a word without a format."""
        return self.rng.choice(self.rng.choice([PHRASES, NUMBERS, WORDS, ["yes", "no"], ["red", "blue", "don't know"]]))

    def near(self, reference: str) -> str:
        """Return an answer that is often equal to a reference, or close to it."""
        other = self.misspelt(reference) if self.rng.random() < 0.5 else self.text()
        try:
            scaled = f"{float(reference.rstrip('%')) * self.rng.choice([0.95, 1.05, 1.04, 1.06, 0.01, 100]):.6g}"
        except ValueError:
            scaled = reference.swapcase()
        return self.of(reference, reference, other, scaled)

    def yes_no(self) -> tuple[str, str]:
        """Return an answer and a reference, "yes" or "no"."""
        return self.of("yes", "no", "Yes", "No", "y", "n", "yes it is", "no, not at all", "nope"), self.rng.choice(
            ["yes", "no"]
        )

    def choice(self) -> tuple[str, str, dict[str, str]]:
        """Return an answer, a letter A to D and the options."""
        options = self.rng.choice(OPTIONS)
        letter, other = self.rng.choice(list(options)[:4]), self.rng.choice(string.ascii_uppercase[:6])
        cores = [
            letter,
            letter,
            other,
            other.lower(),
            options[letter],
            f"{letter}. {options[letter]}",
            f"{letter}: {options[letter]}",
        ]
        return self.of(*cores), letter, options

    def count(self) -> tuple[str, int]:
        """Return an answer and a count."""
        count = self.rng.choice([0, 1, 2, 3, 4, 10, 11, 12, 13, 20, 21, 120])
        other = self.rng.choice([count + 1, count, 10 * count + 3])
        words = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four", 10: "ten", 11: "eleven", 12: "twelve", 20: "twenty"}
        return self.of(str(count), str(other), words.get(count, "many"), words.get(other, "few")), count

    def accepted(self) -> tuple[str, list[str]]:
        """Return an answer and one to three accepted answers."""
        references = [self.text() for _ in range(self.rng.randint(1, 3))]
        return self.near(self.rng.choice(references)), references

    def people(self) -> tuple[str, list[str]]:
        """Return an answer and the answers of five people."""
        common, other = self.text(), self.text()
        people = [self.rng.choice([common, common, other, self.wrapped(common)]) for _ in range(5)]
        return self.near(common), people
