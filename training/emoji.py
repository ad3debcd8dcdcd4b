"""`unimodal emoji`: pictures that nobody here drew, the emoji of a colour font, as a data set.

    a colour font + Unicode's names + CLDR's names and keywords
    -> pictures of 64 × 64 with captions (imagefolder) and text about the same words (JSONL)

The folder is what `training/recipes/emoji.yaml` walks over, with the code of every other walk.
docs/emoji.md describes the files.
"""

import hashlib
import json
import random
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from tokenizer_hf.errors import ConfigurationError, DataError
from tokenizer_hf.files import atomic_folder

MANIFEST = "emoji.json"
FONTS = Path("/usr/share/fonts")
FONT_FILE = "NotoColorEmoji.ttf"
CLDR = Path("/usr/share/unicode/cldr/common")
STRIKE = 109  # the one size that the font's bitmaps have
SIZE = 64

_SINGLE = (range(0xA9, 0xAF), range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
_ABSENT = "\U0010ffff"
_JOINERS = "\u200d\ufe0f"
_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
_SIGNS = "♀♂\U0001f9b0\U0001f9b1\U0001f9b2\U0001f9b3"  # gender and hair, as parts of a sequence
_PEOPLE = str.maketrans(
    {"👨": "🧑", "👩": "🧑", "👦": "🧒", "👧": "🧒", "👴": "🧓", "👵": "🧓"}
    | dict.fromkeys("👫👬👭", "🧑🤝🧑")
)
_MEMBERS = 6
"""Names in a line of text that lists what a keyword stands for."""


@dataclass(frozen=True)
class Emoji:
    """One picture to be.

    Attributes:
        text: the character or sequence, without variation selectors.
        names: what it is called, lower case, the best name first; at least one.
        keywords: CLDR's words for it, lower case; they repeat from emoji to emoji.
    """

    text: str
    names: tuple[str, ...]
    keywords: tuple[str, ...] = ()

    @property
    def captions(self) -> list[str]:
        """The names, and the keywords as one more caption."""
        words = ", ".join(self.keywords)
        return [*self.names, words] if words and words not in self.names else list(self.names)

    @property
    def file_name(self) -> str:
        return "-".join(f"{ord(character):x}" for character in self.text) + ".png"


# --- names and keywords ---------------------------------------------------------------------------


def read_annotations(common: str | Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Read the English names and keywords of CLDR, for single characters and for sequences.

    Args:
        common: CLDR's folder ``common``; ``annotations/en.xml`` and ``annotationsDerived/en.xml``
            in it are read.

    Returns:
        Character or sequence → (short name, keywords without the name), all in lower case.

    Raises:
        DataError: a file is missing or is not such XML.
    """
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for folder in ("annotations", "annotationsDerived"):
        file = Path(common) / folder / "en.xml"
        try:
            rows = ElementTree.parse(file).getroot().iter("annotation")
        except (OSError, ElementTree.ParseError) as error:
            raise DataError(
                f"no CLDR annotations in {file} ({error}); run "
                "`apt-get install unicode-cldr-core`, or give --cldr another copy of `common`"
            ) from error
        for row in rows:
            text = row.get("cp", "").replace("\ufe0f", "")
            value = _words(row.text or "")
            if row.get("type") == "tts":
                names[text] = value
            else:
                keywords[text] = tuple(filter(None, map(_words, value.split("|"))))
    return {
        text: (name, tuple(word for word in keywords.get(text, ()) if word != name))
        for text, name in names.items()
        if text and name
    }


def find_emoji(
    font: ImageFont.FreeTypeFont,
    annotations: dict[str, tuple[str, tuple[str, ...]]],
    progress: bool = False,
) -> list[Emoji]:
    """List what the font can show and somebody has named, without ASCII, by code points.

    Single characters need a name in CLDR or in Unicode; sequences (skin tones, professions, flags)
    one in CLDR. Of several skin tones of one emoji a single one is kept, another for each emoji:
    all of them would be two thirds of all pictures.
    """
    single = [chr(code) for codes in _SINGLE for code in codes]
    found: list[Emoji] = []
    toned: dict[str, list[str]] = defaultdict(list)
    for text in tqdm(
        sorted({*single, *annotations}), "characters", disable=None if progress else True
    ):
        unicode_name = _words(unicodedata.name(text, "")) if len(text) == 1 else ""
        name, keywords = annotations.get(text, ("", ()))
        names = tuple(dict.fromkeys(filter(None, (name, unicode_name))))
        if not names or text.isascii() or unicodedata.category(text[0]).startswith("M"):
            continue
        if not has_glyph(font, text):
            continue
        found.append(Emoji(text, names, keywords))
        if len(text) > 1 and set(text) & set(_TONES):
            toned[_without(text, _TONES)].append(text)
    kept = {min(texts, key=lambda text: _rank(f"tone {text}")) for texts in toned.values()}
    dropped = {text for texts in toned.values() for text in texts} - kept
    return [emoji for emoji in found if emoji.text not in dropped]


def families(emoji: Sequence[Emoji], pictures: Sequence[bytes]) -> list[list[int]]:
    """Group what must not be torn apart by a split.

    Together are: skin tones, genders and hair of one emoji; names with the same word before a colon
    ("kiss: man, man"), but for flags and keycaps; equal pictures.

    Returns:
        Positions in ``emoji``, by family; the plainest (shortest) of a family first.
    """
    leader: dict[Any, Any] = {}

    def lead(node: Any) -> Any:
        while leader.setdefault(node, node) != node:
            node = leader[node]
        return node

    for i, (one, picture) in enumerate(zip(emoji, pictures, strict=True)):
        ties: list[Any] = [("picture", picture), ("base", base(one.text))]
        stem, colon, _ = one.names[0].partition(":")
        if stem not in ("flag", "keycap"):
            ties.append(("stem", stem if colon else one.names[0]))
        for tie in ties:
            leader[lead(tie)] = lead(i)
    groups: dict[Any, list[int]] = defaultdict(list)
    for i in range(len(emoji)):
        groups[lead(i)].append(i)
    return [
        sorted(group, key=lambda i: (len(emoji[i].text), emoji[i].text))
        for group in groups.values()
    ]


def base(text: str) -> str:
    """Strip skin tone, gender, hair and joiners: a woman running and a man running are one base."""
    rest = _without(text, _JOINERS + _TONES).translate(_PEOPLE)
    return _without(rest, _SIGNS) or rest or text


# --- pictures -------------------------------------------------------------------------------------


def open_font(path: str | Path | None = None) -> ImageFont.FreeTypeFont:
    """Open the colour font, by default the one that Debian installs.

    Raises:
        DataError: no font there, or one that lacks bitmaps of this size.
    """
    if path is None:
        path = next(iter(sorted(FONTS.rglob(FONT_FILE))), None)
    if path is None or not Path(path).is_file():
        raise DataError(
            f"no font at {path or FONTS / '**' / FONT_FILE}; "
            "run `apt-get install fonts-noto-color-emoji`, or give --font a copy of " + FONT_FILE
        )
    try:
        return ImageFont.truetype(str(path), STRIKE)
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened at size {STRIKE} ({error}); expected Debian's {FONT_FILE} "
            "(`apt-get install fonts-noto-color-emoji`)"
        ) from error


def has_glyph(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether the font shows the character, or the whole sequence as one picture."""
    if len(text) > 1:  # else it is drawn as its parts, or as its first one alone
        one_cell = font.getlength(text) <= max(map(font.getlength, text))
        return one_cell and bytes(font.getmask(text)) != bytes(font.getmask(text[0]))
    mask = font.getmask(text)
    return mask.getbbox() is not None and bytes(mask) != _absent(font)


@cache
def _absent(font: ImageFont.FreeTypeFont) -> bytes:
    """What the font shows for a character that no font has: nothing, or a box."""
    return bytes(font.getmask(_ABSENT))


def draw_emoji(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """Draw on white, centred in a square: RGB, 64 × 64."""
    left, top, right, bottom = font.getbbox(text)
    side = int(max(right - left, bottom - top))
    square = Image.new("RGB", (side, side), "white")
    corner = ((side - right - left) / 2, (side - bottom - top) / 2)
    ImageDraw.Draw(square).text(corner, text, "black", font, embedded_color=True)
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


# --- text -----------------------------------------------------------------------------------------


def text_rows(emoji: Sequence[Emoji], rng: random.Random) -> list[dict[str, Any]]:
    """Make lines of text and chats of the same words, for the small language model.

    Every name with its keywords in three ways, every keyword with some of its names in two.
    """
    rows: list[dict[str, Any]] = []
    members: dict[str, list[str]] = defaultdict(list)
    for one in emoji:
        name = one.names[0]
        for word in one.keywords:
            members[word].append(name)
        if one.keywords:
            words = ", ".join(one.keywords)
            rows.append({"text": f"{name}: {words}"})
            rows.append(_chat(f"describe {name}", words))
            some = rng.sample(one.keywords, min(3, len(one.keywords)))
            rows.append(_chat(f"name {', '.join(some)}", name))
        rows += [{"text": other} for other in one.names]
    for word, names in members.items():
        if len(names) > 1:
            for make in (lambda t, w=word: {"text": f"{w}: {t}"}, lambda t, w=word: _chat(w, t)):
                rows.append(make(", ".join(rng.sample(names, min(_MEMBERS, len(names))))))
    rng.shuffle(rows)
    return rows


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


# --- the folder -----------------------------------------------------------------------------------


def write_emoji(
    out: str | Path,
    *,
    font: str | Path | None = None,
    cldr: str | Path | None = None,
    validation: int = 120,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the data set; the same font, CLDR, Python and Pillow write the same bytes.

    ::

        emoji.json                            what is in here, and what it was made from
        {train,validation}/metadata.jsonl     {"file_name", "captions", "emoji"}
        {train,validation}/1f600.png          RGB, 64 × 64, on white
        text/{train,validation}.jsonl         {"text"} or {"messages"}

    The split is by families (`families`), drawn by a hash: of a family held out, its plainest
    member is a validation picture and the others are in neither split. Equal pictures are one
    picture with the captions of all. The text of a split speaks of the emoji of that split alone.

    Args:
        out: the folder; an older one that this function wrote is replaced.
        font: default: Debian's, below ``/usr/share/fonts``.
        cldr: CLDR's folder ``common``; default: Debian's. Where Debian's is not installed the
            captions are Unicode's names alone and there are no sequences, which is said.
        validation: families held out.
        progress: show a progress bar.

    Returns:
        What ``emoji.json`` says.

    Raises:
        DataError: no font, no CLDR in the given folder, or too few emoji.
        ConfigurationError: ``out`` holds something else; a number that cannot be right.
        OSError: as the file system says; nothing half-written is left.
    """
    out = Path(out)
    if validation < 1:
        raise ConfigurationError(f"validation is {validation}; expected at least 1")
    if out.exists() and not (out / MANIFEST).is_file() and (out.is_file() or any(out.iterdir())):
        raise ConfigurationError(
            f"{out} is not empty and was not written by `unimodal emoji`; give another --out"
        )
    opened = open_font(font)
    annotations = _annotations(cldr)
    emoji = find_emoji(opened, annotations, progress)
    pictures = [
        draw_emoji(opened, one.text)
        for one in tqdm(emoji, "emoji", unit="picture", disable=None if progress else True)
    ]
    pixels = [picture.tobytes() for picture in pictures]
    groups = families(emoji, pixels)
    if len(groups) <= validation:
        raise DataError(
            f"the font shows {len(groups)} families of emoji, of which {validation} would be held "
            f"out; expected Debian's {FONT_FILE}, or a smaller --validation"
        )
    splits: dict[str, list[int]] = {"train": [], "validation": []}
    groups.sort(key=lambda group: _rank(emoji[group[0]].text))
    for number, group in enumerate(groups):
        if number < validation:
            splits["validation"] += [i for i in group if pixels[i] == pixels[group[0]]]
        else:
            splits["train"] += group
    splits["train"].sort(key=lambda i: _rank(emoji[i].text))
    manifest = {
        "font": Path(str(opened.path)).name,
        "font_sha256": hashlib.sha256(Path(str(opened.path)).read_bytes()).hexdigest(),
        "cldr": bool(annotations),
        "unicode": unicodedata.unidata_version,
        "families": len(groups),
    }
    with atomic_folder(out) as draft:
        (draft / "text").mkdir()
        for split, rows in splits.items():
            merged = dict(_merge_equal([(emoji[i], pixels[i], i) for i in rows]))
            _write_split(draft / split, [(one, pictures[i]) for i, one in merged.items()])
            lines = text_rows([emoji[i] for i in rows], random.Random(f"emoji {split}"))
            _write_lines(draft / "text" / f"{split}.jsonl", lines)
            manifest |= {split: len(merged), f"text_{split}": len(lines)}
        text = json.dumps(manifest, indent=2)
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _annotations(cldr: str | Path | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    if cldr is None and not (CLDR / "annotations").is_dir():
        print(
            f"no CLDR in {CLDR}: captions are Unicode's names alone, and there are no sequences; "
            "run `apt-get install unicode-cldr-core` for keywords that repeat",
            file=sys.stderr,
        )
        return {}
    return read_annotations(CLDR if cldr is None else cldr)


def _merge_equal(rows: Sequence[tuple[Emoji, bytes, int]]) -> Iterator[tuple[int, Emoji]]:
    """Yield one emoji for each picture, with the names and keywords of all that look like it."""
    same: dict[bytes, list[tuple[Emoji, int]]] = defaultdict(list)
    for one, picture, i in rows:
        same[picture].append((one, i))
    for equal in same.values():
        names = dict.fromkeys(name for one, _ in equal for name in one.names)
        words = dict.fromkeys(word for one, _ in equal for word in one.keywords)
        yield equal[0][1], Emoji(equal[0][0].text, tuple(names), tuple(words))


def _write_split(folder: Path, rows: Sequence[tuple[Emoji, Image.Image]]) -> None:
    folder.mkdir()
    for one, picture in rows:
        picture.save(folder / one.file_name, "PNG", optimize=True)
    lines = [
        {"file_name": one.file_name, "captions": one.captions, "emoji": one.text} for one, _ in rows
    ]
    _write_lines(folder / "metadata.jsonl", lines)


def _write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _without(text: str, characters: str) -> str:
    return text.translate(dict.fromkeys(map(ord, characters)))


def _rank(text: str) -> bytes:
    """A place in an order that is random and always the same."""
    return hashlib.sha256(text.encode()).digest()
