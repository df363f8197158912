"""Find names of special tokens and byte-order marks in a text, and its Unicode normal form, before encoding it.

survey = Survey(["<|endoftext|>"])
survey.add("He said <|endoftext|>", is_end=True)
survey.lines()   # sentences to print
"""

import re
import unicodedata
from collections import Counter

FLUSH_CHARS = 2**18  # short documents are examined together
FULL_CHARS = 2**19  # after which the Unicode form is determined from samples
SAMPLE_CHARS = 2**14
SAMPLE_SHARE = 1 / 64  # of the rest of the text


class Survey:
    """Counts the names of special tokens in a text, and its accented letters by Unicode normal form."""

    def __init__(self, names: list[str], has_separator_option: bool = False):
        self.names, self.has_separator_option = names, has_separator_option
        self.counts = dict.fromkeys(names, 0)
        self.lone_names: set[str] = set()  # names that occur alone on a line
        self.n_marks = 0  # byte-order marks; those at the start of a file have been removed
        self.n_composed = self.n_decomposed = 0  # letters with accents: of one code point, and of several
        self.replaced: Counter[str] = Counter()  # characters that no normal form contains, such as the Angstrom sign
        self.n_characters = self.n_examined = 0
        self.parts: list[str] = []  # not yet examined
        self.size, self.tail = 0, ""  # characters in parts; the end of what was examined, which a name may start in

    def add(self, text: str, is_end: bool):
        """Examine a part of a document."""
        self.parts.append(text)
        if is_end:
            self.parts.append("\n")
        self.size += len(text)
        if self.size > FLUSH_CHARS:
            self._flush()

    def _flush(self):
        text = "".join(self.parts)
        self._count_names(self.tail + text)
        if not text.isascii():
            self._count_accents(text)
            self.n_marks += text.count("\ufeff")
        self.n_characters += len(text)
        n_tail = max(map(len, self.names)) - 1
        self.parts, self.size, self.tail = [], 0, (self.tail + text[-n_tail:])[-n_tail:]

    def _count_names(self, text: str):
        for name in self.names:
            rare = "|" if "|" in name else name[0]  # looking for one character takes a tenth of the time
            if rare in text and (n := text.count(name) - self.tail.count(name)):
                self.counts[name] += n
                if re.search(rf"^[ \t]*{re.escape(name)}[ \t]*$", text, re.MULTILINE):
                    self.lone_names.add(name)

    def _count_accents(self, text: str):
        is_sample = self.n_characters >= FULL_CHARS
        if is_sample and self.n_examined > FULL_CHARS + SAMPLE_SHARE * (self.n_characters - FULL_CHARS):
            return
        text = text[:SAMPLE_CHARS] if is_sample else text
        self.n_examined += len(text)
        if not unicodedata.is_normalized("NFC", text):
            replaced = [char for char in set(text) if not unicodedata.is_normalized("NFC", char)]
            self.replaced.update({char: text.count(char) for char in replaced})
            text = text.translate(dict.fromkeys(map(ord, replaced)))
            self.n_decomposed += max(0, len(text) - len(unicodedata.normalize("NFC", text)))
        if not unicodedata.is_normalized("NFD", text):
            self.n_composed += max(0, len(unicodedata.normalize("NFD", text)) - len(text))

    def lines(self) -> list[str]:
        """Return a sentence for each name in the text, and one about its accents if it has any."""
        self._flush()
        lines = []
        for name, count in self.counts.items():
            if count:
                times = "once" if count == 1 else f"{count:,} times"
                remedy = "remove it from the text"
                if self.has_separator_option and name in self.lone_names:
                    remedy = f"if these lines end documents, pass --separator='{name}'; otherwise, remove them"
                elif self.has_separator_option:
                    remedy += f", or put it on separate lines and pass --separator='{name}' if it ends documents"
                lines.append(f"the text contains {name} {times}, which becomes ordinary text, not a token: {remedy}")
        if self.n_marks:
            times = "once" if self.n_marks == 1 else f"{self.n_marks:,} times"
            problem = f"the text contains U+FEFF (a byte-order mark) {times} elsewhere than at the start of a file"
            lines.append(f"{problem}, which becomes part of the text: remove it")
        sample = " in a sample" if self.n_examined < self.n_characters and self.n_characters > FULL_CHARS else ""
        if self.n_composed and self.n_decomposed:
            counts = f"{self.n_composed:,} accents are precomposed and {self.n_decomposed:,} are combining{sample}"
            remedy = "convert the text to one form, such as NFC, so that each word has only one spelling"
            lines.append(f"Unicode: mixed normal forms, since {counts}: {remedy}")
        elif self.replaced:
            char, _ = self.replaced.most_common(1)[0]
            characters = f"{self.replaced.total():,} characters{sample}, such as U+{ord(char):04X} ({char})"
            lines.append(
                f"Unicode: no normal form, since NFC and NFD replace {characters}: convert the text to NFC, so that"
                " each word has only one spelling"
            )
        elif self.n_composed or self.n_decomposed:
            form, place = ("NFC", "are part of their letter") if self.n_composed else ("NFD", "follow their letter")
            lines.append(f"Unicode: {form}, {self.n_composed or self.n_decomposed:,} accents{sample} {place}")
        return lines
